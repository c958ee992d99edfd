"""What the suites measure: weights of a backbone's shapes, banks over them, mixtures, and the check against float64 truth."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import fusedmerge as fm
from fusedmerge import reference
from fusedmerge.commands.demo_checks import Truth, weight_errors
from fusedmerge.commands.tables import percent
from perf.backbones import LLAMA_2_7B, LLAMA_3_8B, LLAMA_70B_LAYER, MISTRAL_7B, Backbone

if TYPE_CHECKING:
    import torch


__all__ = ["Mixture", "backbones", "checked", "errors", "llama", "make_bank", "make_weights", "mixtures"]

Mixture = dict[str, float]
LEAST_ROUNDED = 0.999  # the share of bfloat16 weights that a switch rounds correctly (KERNELS.md, "Numerics")


def backbones(where: torch.device) -> tuple[Backbone, ...]:
    """Llama-2-7B, Mistral-7B, Llama-3-8B and a layer of Llama-3-70B; on a CPU small ones of their proportions, about 50 M weights each."""
    real = (LLAMA_2_7B, MISTRAL_7B, LLAMA_3_8B, LLAMA_70B_LAYER)
    if where.type == "cuda":
        return real
    return (LLAMA_2_7B.scaled(640, 10), MISTRAL_7B.scaled(640, 9), LLAMA_3_8B.scaled(640, 9), LLAMA_70B_LAYER.scaled(2048, 1))


def make_weights(backbone: Backbone, where: torch.device, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random bfloat16 weights in the backbone's shapes."""
    import torch

    generator = torch.Generator(where).manual_seed(seed)
    return {
        name: torch.empty(shape, dtype=torch.bfloat16, device=where).normal_(0.0, 0.02, generator=generator)
        for name, shape in backbone.linears().items()
    }


def llama(backbone: Backbone, where: torch.device, seed: int = 0) -> torch.nn.Module:
    """A random bfloat16 LlamaForCausalLM by transformers, made where it is to be."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=backbone.hidden, intermediate_size=backbone.intermediate, num_hidden_layers=backbone.layers,
        num_attention_heads=backbone.hidden // backbone.head_dim, num_key_value_heads=backbone.kv // backbone.head_dim,
        vocab_size=backbone.vocab, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(where):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def make_bank(weights: Mapping[str, torch.Tensor], num_adapters: int, r: int, seed: int = 1, delta: float = 0.07) -> fm.AdapterBank:
    """`num_adapters` random bfloat16 adapters "0", "1", ..., made on the weights' device, |B A| / |W| of about `delta` on every target."""
    import torch

    generator = torch.Generator(next(iter(weights.values())).device).manual_seed(seed)

    def stacks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, cols = weight.shape
        spread = delta * float(weight.float().norm()) / (rows * r) ** 0.5
        a = torch.empty(num_adapters, r, cols, dtype=torch.bfloat16, device=weight.device).normal_(0.0, cols**-0.5, generator=generator)
        b = torch.empty(num_adapters, rows, r, dtype=torch.bfloat16, device=weight.device).normal_(0.0, spread, generator=generator)
        return a, b

    return fm.AdapterBank.from_tensors({name: stacks(weight) for name, weight in weights.items()}, 1.0)


def mixtures(names: Sequence[str], k: int, count: int = 64, seed: int = 0) -> list[Mixture]:
    """`count` random mixtures of k of more than k adapters, to go round in: gates in [0.1, 0.9] before they are made to add up to 1, and
    no two neighbours of the same adapters (a switch to what is merged does nothing)."""
    rng = random.Random(seed)
    found: list[Mixture] = []
    while len(found) < count:
        gates = [rng.uniform(0.1, 0.9) for _ in range(k)]
        mixture = {name: gate / sum(gates) for name, gate in zip(rng.sample(list(names), k), gates, strict=True)}
        neighbours = [*found[-1:], *(found[:1] if len(found) == count - 1 else [])]
        if all(mixture.keys() != other.keys() for other in neighbours):
            found.append(mixture)
    return found


def errors(
    live: Mapping[str, torch.Tensor], base: Mapping[str, Any], bank: fm.AdapterBank, mixture: Mixture, rows: int | None = None
) -> dict[str, float]:
    """How far weights are from base + mixture in float64 (see `weight_errors`), on every target; rows: on so many of each, first and last
    among them, None for all. base: pristine tensors (or float64 arrays)."""
    found, counts = [], []
    slots = [(bank.slot(name), gate) for name, gate in mixture.items()]
    for name, weight in live.items():
        chosen = _sample(weight.shape[0], rows)
        members = [m._replace(b=m.b[chosen]) for m in reference.members(bank.target(name), slots)]
        pristine = reference.to_float64(base[name][chosen])
        truth = Truth(reference.merged(pristine, members), reference.error_bound(pristine, members, str(weight.dtype)[6:]))
        found.append(weight_errors({name: weight[chosen]}, {name: truth}))
        counts.append(truth.exact.size)
    whole = sum(counts)
    return {
        "of_bound": max(error["of_bound"] for error in found),
        "misrounded": sum(error["misrounded"] * count for error, count in zip(found, counts, strict=True)) / whole,
        "of_rounding": (sum(error["of_rounding"] ** 2 * count for error, count in zip(found, counts, strict=True)) / whole) ** 0.5,
    }


def _sample(rows: int, count: int | None) -> list[int]:
    if count is None or count >= rows:
        return list(range(rows))
    return sorted({0, rows - 1, *random.Random(rows).sample(range(rows), count - 2)})


def checked(
    live: Mapping[str, torch.Tensor], base: Mapping[str, Any], bank: fm.AdapterBank, mixture: Mixture, rows: int | None = 16
) -> dict[str, float]:
    """`errors`, and an AssertionError for anything less than what an exact switch promises."""
    found = errors(live, base, bank, mixture, rows)
    assert found["of_bound"] <= 1.0, f"an error of {found['of_bound']:.3g} times the bound"
    assert found["misrounded"] <= 1.0 - LEAST_ROUNDED, f"{percent(found['misrounded'])} misrounded"
    return found
