"""transformers' Trainer and gradient checkpointing on injected models; examples/train_lora_switch.py is what runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fusedmerge as fm

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_lora_switch.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("train_lora_switch", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_trainer_trains_saves_resumes_and_loads(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken off after its first checkpoint and resumed, the Trainer ends at the same bits."""
    options = ["--steps", "8", "--length", "32"]
    whole = example.main([*options, "--out", str(tmp_path / "out")])
    assert "the same logits: True" in capsys.readouterr().out
    logged = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert logged[-1] < logged[0] - 0.1
    reached = trained(whole.model)
    (router,) = fm.moe.structure(whole.model).routers.values()
    start = fm.moe.inject(example.base(None), example.CONFIG, seed=0)
    (untrained,) = fm.moe.structure(start).routers.values()
    assert not torch.equal(router.weight, untrained.weight)

    (tmp_path / "out" / "checkpoint-8").rename(tmp_path / "whole")
    resumed = example.main([*options, "--out", str(tmp_path / "out"), "--resume"])
    assert resumed.state.global_step == 8
    again = trained(resumed.model)
    assert again.keys() == reached.keys()
    assert all(torch.equal(again[name], reached[name]) for name in again)

    loaded = fm.moe.load(example.base(None), tmp_path / "out" / "experts")
    assert all(torch.equal(parameter, reached[name]) for name, parameter in loaded.named_parameters() if name in reached)


@pytest.mark.parametrize("method", ["lora_switch", "mola", "mixlora"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(method: str, use_reentrant: bool) -> None:
    """With dropout in the experts, whose mask must come again. The router gets its gradient through the checkpointed layers."""
    found = []
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(2))
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1
        )
        options: dict[str, Any] = {"num_experts": 4, "top_k": 2, "r": 4, "lora_dropout": 0.3, "z_loss_coef": 0.01}
        options["init_lora_weights"] = False
        model = fm.moe.inject(LlamaForCausalLM(config), fm.moe.LoRAMoEConfig(method=method, **options), seed=1).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()  # reentrant checkpointing needs an input that wants a gradient
        torch.manual_seed(4)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        assert gradient is not None, name
        other = found[1][1][name]
        assert other is not None, name
        scale = gradient.abs().max()
        assert scale > 0, name
        assert float((gradient - other).abs().max() / scale) < 1e-5, name
