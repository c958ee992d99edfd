"""The decode step in a real CUDA graph: the same logits as the truth's, and no synchronisation."""

from __future__ import annotations

import copy

import pytest
import torch

import fusedmerge as fm
from fusedmerge.moe.decoder import Decoder
from fusedmerge.moe.experts import ExpertSet
from fusedmerge.moe.fused_kernels import FusedKernels
from fusedmerge.moe.measure import count_launches
from fusedmerge.moe.session import DecoderSession
from tests.moe.decoder_kit import forced, relative, routed, truth_logits, write_model

pytestmark = pytest.mark.gpu
RUNS = [("lora_switch", "backbone")]
RUNS += [("lora_switch", strategy) for strategy in ("unfused", "merged-simple", "merged", "fused")]
RUNS += [("lora", "merged"), ("lora", "fused"), ("mola", "fused"), ("mola", "merged-simple"), ("mixlora", "unfused"), ("mixlora", "fused")]


def saved(directory, method):
    model = write_model(directory / "base", dtype=torch.bfloat16, hidden_size=64, intermediate_size=160)
    sizes = {} if method == "lora" else {"num_experts": 4}
    config = fm.moe.LoRAMoEConfig(method=method, r=16, lora_alpha=16, init_lora_weights=False, router_init_std=0.3, **sizes)
    fm.moe.save(fm.moe.inject(model, config), directory / "experts")
    return directory / "base", directory / "experts"


@pytest.mark.parametrize(("method", "strategy"), RUNS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_captured_step(tmp_path, method, strategy, packed):
    base, experts = saved(tmp_path, method)
    tokens = torch.randint(0, 67, (1, 60), generator=torch.Generator().manual_seed(0))
    plain = Decoder.from_pretrained(base)
    rounding = relative(forced(plain, "backbone", tokens, 9), truth_logits(plain, None, tokens)[:, 8:])
    decoder = Decoder.from_pretrained(base, experts=experts, device="cuda", packed=packed)
    found = []
    with DecoderSession(decoder, strategy, 1, 60) as session:
        assert isinstance(session._decode, FusedKernels) == (strategy == "fused")
        found.append(session.prefill(tokens[:, :9].cuda()))
        found.append(session.step(tokens[:, 9].cuda()).clone())
        assert session._graph is not None
        for token in tokens[0, 10:].cuda().split(1):
            torch.cuda.set_sync_debug_mode("error")
            try:
                logits = session.step(token)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            found.append(logits.clone())
    logits = torch.stack(found, dim=1).cpu()
    if strategy == "backbone":
        exact = truth_logits(plain, None, tokens)
    else:
        eager, played = routed(decoder, strategy, tokens.cuda(), 9)
        assert strategy != "fused" or torch.equal(eager.cpu(), logits)
        on_cpu = Decoder.from_pretrained(base, experts=experts)
        exact = truth_logits(plain, ExpertSet(on_cpu.experts.method, on_cpu.experts.linears, played.routers), tokens)
    error = relative(logits, exact[:, 8:])
    assert error.mean() < 1.5 * rounding.mean()
    assert error.max() < 2.5 * rounding.max()
    assert all(torch.equal(decoder.weights[name].cpu(), plain.weights[name]) for name in plain.weights)


@pytest.mark.parametrize("method", ["lora_switch", "mola"])
@pytest.mark.parametrize("batch", [4, 16])
def test_rows_with_routes_of_their_own(tmp_path, method, batch):
    """A captured fused step has the eager one's bits, and is as near to the truth as the backbone."""
    base, experts = saved(tmp_path, method)
    tokens = torch.randint(0, 67, (batch, 20), generator=torch.Generator().manual_seed(0))
    plain = Decoder.from_pretrained(base)
    rounding = relative(forced(plain, "backbone", tokens, 9), truth_logits(plain, None, tokens)[:, 8:])
    decoder = Decoder.from_pretrained(base, experts=experts, device="cuda")
    captured = forced(decoder, "fused", tokens.cuda(), 9)
    eager, played = routed(decoder, "fused", tokens.cuda(), 9)
    assert torch.equal(captured, eager)
    on_cpu = Decoder.from_pretrained(base, experts=experts)
    exact = truth_logits(plain, ExpertSet(method, on_cpu.experts.linears, played.routers), tokens)
    error = relative(eager.cpu(), exact[:, 8:])
    assert error.mean() < 1.5 * rounding.mean()
    assert error.max() < 2.5 * rounding.max()


@pytest.mark.parametrize("strategy", ["unfused", "merged", "fused"])
def test_generations_follow_each_other(tmp_path, strategy):
    base, experts = saved(tmp_path, "lora_switch")
    decoder = Decoder.from_pretrained(base, experts=experts, device="cuda", packed=True)
    for seed in range(2):
        prompt = torch.randint(0, 67, (1, 7), generator=torch.Generator().manual_seed(seed)).cuda()
        tokens = fm.moe.generate(decoder, prompt, 30, strategy=strategy)
        logits = decoder.logits(tokens)[0, 6:-1].float()  # un-merged, in one forward
        chosen = logits.gather(1, tokens[0, 7:, None])[:, 0]
        assert (logits.amax(dim=1) - chosen).max() < 0.1 * logits.std()  # greedy, but for rounding


def test_an_injected_model(tmp_path):
    base, experts = saved(tmp_path, "lora_switch")
    model = type(write_model(tmp_path / "other")).from_pretrained(base, dtype=torch.bfloat16)
    model = fm.moe.load(model, experts).cuda()
    before = copy.deepcopy(model.state_dict())
    prompt = torch.randint(0, 67, (1, 7), generator=torch.Generator().manual_seed(0)).cuda()
    for strategy in ("unfused", "merged-simple", "merged", "fused"):
        assert fm.moe.generate(model, prompt, 20, strategy=strategy).shape == (1, 27)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_merged_adds_one_launch_and_the_routers(tmp_path):
    base, experts = saved(tmp_path, "lora_switch")
    token, counts = torch.ones(1, dtype=torch.int64, device="cuda"), {}
    for strategy in ("backbone", "merged"):
        decoder = Decoder.from_pretrained(base, experts=experts, device="cuda", packed=True)
        with DecoderSession(decoder, strategy, 1, 20) as session:
            session.prefill(torch.zeros(1, 5, dtype=torch.int64, device="cuda"))
            session.step(token)
            counts[strategy] = count_launches(lambda session=session: session.step(token), token.device)
    seen = torch.randn(1, 1, 64, device="cuda").bfloat16()
    router = count_launches(lambda: decoder.experts.routers["router"](seen), token.device)
    assert counts["merged"] == counts["backbone"] + 1 + router
