"""Launch counts and peak memory of calls whose costs are known, and of the decoder's strategies."""

from __future__ import annotations

import os

import pytest
import torch

from fusedmerge.moe.decoder import Decoder
from fusedmerge.moe.measure import count_launches, peak_memory
from fusedmerge.moe.session import DecoderSession
from tests.moe.decoder_kit import make_experts, write_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setitem(os.environ, "KINETO_LOG_LEVEL", "6")


def test_operations_that_compute_are_counted():
    x = torch.randn(4, 6)
    assert count_launches(lambda: x + 1, CPU) == 1
    assert count_launches(lambda: torch.nn.functional.linear(x, x), CPU) == 1  # one, though torch calls others inside
    assert count_launches(lambda: (x.T, x.view(24), x[1:], x.unflatten(1, (2, 3)), x.float(), torch.empty(3)), CPU) == 0
    assert count_launches(lambda: x.T.reshape(24), CPU) == 1  # this one copies
    assert count_launches(lambda: x.double().add_(1), CPU) == 2
    assert count_launches(lambda: x.clone().copy_(x), CPU) == 2


def test_peak_memory_is_the_largest_sum():
    def call():
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        both = torch.empty(3000, dtype=torch.uint8), torch.empty(500, dtype=torch.uint8)
        del both
        return torch.empty(10, dtype=torch.uint8)

    assert peak_memory(call, CPU) == 3500


@pytest.mark.parametrize("packed", [False, True])
def test_merged_adds_one_launch_and_the_routers(tmp_path, packed):
    write_model(tmp_path, dtype=torch.bfloat16)
    token = torch.ones(1, dtype=torch.int64)

    def step(method, strategy):
        decoder = Decoder.from_pretrained(tmp_path, packed=packed)
        decoder.experts = make_experts(decoder, method)
        with DecoderSession(decoder, strategy, 1, 9) as session:
            session.prefill(torch.zeros(1, 5, dtype=torch.int64))
            session.step(token)
            return count_launches(lambda: session.step(token), CPU), decoder

    backbone, decoder = step("lora_switch", "backbone")
    seen = torch.randn(1, 1, 32).bfloat16()
    router = count_launches(lambda: decoder.experts.routers["token"](seen), CPU)
    assert router > 0
    assert step("lora_switch", "merged")[0] == backbone + 1 + router
    assert step("lora", "merged")[0] == backbone + 1
    linears = sum(len(names) for names in decoder.names)
    unfused = step("lora_switch", "unfused")[0]
    assert unfused >= backbone + router + 4 * linears  # two gathers, two products
    assert step("mola", "unfused")[0] >= unfused + router * (linears - 1)  # a router for each


@pytest.mark.parametrize(("packed", "apart"), [(False, 2 + 7 + 2 + 2), (True, 2 + 4 + 2 + 2)])
def test_fused_counts_each_kernel_of_a_group(tmp_path, packed, apart):
    """Eight in place of a layer's norms, linears, SiLU and its product, and residual sums."""
    write_model(tmp_path, dtype=torch.bfloat16)
    decoder = Decoder.from_pretrained(tmp_path, packed=packed)
    decoder.experts = make_experts(decoder)

    def step(strategy):
        with DecoderSession(decoder, strategy, 1, 9) as session:
            session.prefill(torch.zeros(1, 5, dtype=torch.int64))
            return count_launches(lambda: session.step(torch.ones(1, dtype=torch.int64)), CPU)

    assert step("fused") == step("backbone") + len(decoder.names) * (8 - apart)
