"""What the demo checks: merged weights and logits against float64 truth, beside PEFT's; and checkpoints written and read back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fusedmerge.commands.demo_setup import Stage, clone, peft_load, weights_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from fusedmerge.bank import AdapterBank
    from fusedmerge.reference import Member

__all__ = ["Truth", "accuracy", "checkpoint", "differing", "same_bits", "truth_from_bank", "truth_from_files", "weight_errors"]

Mixture = dict[str, float]
Weights = dict[str, "torch.Tensor"]


def accuracy(stage: Stage) -> dict[str, Any]:
    """The shown mixture, merged in every way there is, against the truth over the adapter files' factors and the bank's own."""
    from fusedmerge.bank import AdapterBank
    from fusedmerge.switcher import Switcher

    model = copy.deepcopy(stage.base)
    banks = {name: AdapterBank.from_peft(stage.adapters, model, dtype=dtype) for name, dtype in _bank_dtypes().items()}
    targets = banks["bfloat16"].targets
    live, base = weights_of(model, targets), clone(weights_of(model, targets))
    merged = {"PEFT merge_adapter": merge_by_peft(stage, targets), "PEFT add_weighted_adapter(cat)": merge_by_peft_cat(stage, targets)}
    for name, bank in banks.items():
        switcher = Switcher(model, bank)
        switcher.switch(stage.shown)
        merged[f"Switcher, {name} bank"] = clone(live)
        switcher.close()
    merged["fusedmerge merge (files)"] = merge_by_files(stage, targets)
    files = truth_from_files(base, stage.adapters, stage.shown)
    stored = truth_from_bank(base, banks["bfloat16"], stage.shown)
    logits = Logits(stage.base, stage.config.seed)
    exact = {"files": logits(_exact(files)), "bank": logits(_exact(stored))}

    def row(method: str, weights: Weights, truth: str) -> dict[str, Any]:
        errors = weight_errors(weights, files if truth == "files" else stored)
        return {"method": method, "truth": truth, **errors, "logits": relative(logits(weights), exact[truth])}

    rows = [row(method, weights, "files") for method, weights in merged.items()]
    rows.append(row("Switcher, bfloat16 bank", merged["Switcher, bfloat16 bank"], "bank"))
    rows.append(row("(the backbone, nothing merged)", base, "files"))
    return {
        "mixture": stage.shown,
        "rows": rows,
        "files_as_switcher": same_bits(merged["fusedmerge merge (files)"], merged["Switcher, float32 bank"]),
    }


def _exact(truth: Mapping[str, Truth]) -> dict[str, Any]:
    return {target: entry.exact for target, entry in truth.items()}


def _bank_dtypes() -> dict[str, torch.dtype]:
    import torch

    return {"bfloat16": torch.bfloat16, "float32": torch.float32}


def merge_by_peft(stage: Stage, targets: tuple[str, ...]) -> Weights:
    """PEFT's merge_adapter, gates by set_scale."""
    from fusedmerge.commands.demo_setup import PeftSwitch

    model = peft_load(stage.base, stage.adapters)
    PeftSwitch(model).switch(stage.shown)
    return clone(weights_of(model, targets))


def merge_by_peft_cat(stage: Stage, targets: tuple[str, ...]) -> Weights:
    """PEFT's add_weighted_adapter with combination_type="cat", then merge_and_unload."""
    model = peft_load(stage.base, stage.adapters)
    model.add_weighted_adapter(list(stage.shown), list(stage.shown.values()), "mixture", combination_type="cat")
    return clone(weights_of(model.merge_and_unload(adapter_names=["mixture"]), targets))


def merge_by_files(stage: Stage, targets: tuple[str, ...]) -> Weights:
    """The offline merge, checkpoint to checkpoint, loaded by transformers."""
    from transformers import AutoModelForCausalLM

    from fusedmerge.checkpoint import merge_checkpoint

    out = stage.out / "merged-offline"
    chosen = [(stage.adapters[name], gate) for name, gate in stage.shown.items()]
    merge_checkpoint(stage.out / "base", chosen, out, overwrite=True, progress=False)
    return weights_of(AutoModelForCausalLM.from_pretrained(str(out), dtype=stage.base.dtype), targets)


def checkpoint(stage: Stage) -> dict[str, Any]:
    """Save a live merged model with its own save_pretrained, and load it back."""
    from transformers import AutoModelForCausalLM

    from fusedmerge.bank import AdapterBank
    from fusedmerge.switcher import Switcher

    model = copy.deepcopy(stage.base)
    switcher = Switcher(model, AdapterBank.from_peft(stage.adapters, model))
    with switcher.switched(stage.shown):
        model.save_pretrained(str(stage.out / "merged-live"))
        live = clone(dict(model.state_dict()))
    loaded = AutoModelForCausalLM.from_pretrained(str(stage.out / "merged-live"), dtype=stage.base.dtype)
    return {
        "directory": str(stage.out / "merged-live"),
        "bytes": sum(path.stat().st_size for path in (stage.out / "merged-live").iterdir()),
        "loaded_equals_live": same_bits(dict(loaded.state_dict()), live),
        "restored_bitwise": same_bits(dict(model.state_dict()), dict(stage.base.state_dict())),
    }


class Truth(NamedTuple):
    """What one merged weight should be, in float64."""

    exact: NDArray[np.float64]  # [rows, cols]
    bound: NDArray[np.float64]  # [rows, cols], the error that the switch may have: half an ulp and a float32 accumulation's


def truth_from_files(base: Weights, paths: Mapping[str, Path], mixture: Mixture) -> dict[str, Truth]:
    """Float64 truth over the factors as the adapter files hold them."""
    from fusedmerge import reference
    from fusedmerge.formats.peft import read_peft

    adapters = {name: read_peft(paths[name]) for name in mixture}
    found = {}
    for target, weight in base.items():
        members = []
        for name, gate in mixture.items():
            factors = adapters[name].targets.get(target)
            if factors is not None:
                a, b = reference.to_float64(factors.a), reference.to_float64(factors.b)
                members.append(reference.Member(a, b, factors.scaling, gate))
        found[target] = _truth(weight, members)
    return found


def truth_from_bank(base: Weights, bank: AdapterBank, mixture: Mixture) -> dict[str, Truth]:
    """Float64 truth over the factors as a bank holds them."""
    from fusedmerge import reference

    slots = [(bank.slot(name), gate) for name, gate in mixture.items()]
    return {target: _truth(weight, reference.members(bank.target(target), slots)) for target, weight in base.items()}


def _truth(weight: torch.Tensor, members: Sequence[Member]) -> Truth:
    from fusedmerge import reference

    base, dtype = reference.to_float64(weight), str(weight.dtype).removeprefix("torch.")
    return Truth(reference.merged(base, members), reference.error_bound(base, members, dtype))


def weight_errors(weights: Mapping[str, torch.Tensor], truth: Mapping[str, Truth]) -> dict[str, float]:
    """How far merged weights are from the truth.

    misrounded: the share of weights that are not the truth correctly rounded. of_bound: the largest error as a share of what the switch may
    have. of_rounding: the errors' root mean square as a multiple of correct rounding's (1 is the best that the dtype can do).
    """
    from fusedmerge import reference

    wrong, total, of_bound, square, least = 0, 0, 0.0, 0.0, 0.0
    for target, (exact, bound) in truth.items():
        got = reference.to_float64(weights[target])
        rounded = reference.round_to(exact, str(weights[target].dtype).removeprefix("torch."))
        wrong += int((got != rounded).sum())
        total += exact.size
        of_bound = max(of_bound, float((abs(got - exact) / bound).max()))
        square += float(((got - exact) ** 2).sum())
        least += float(((rounded - exact) ** 2).sum())
    return {"misrounded": wrong / total, "of_bound": of_bound, "of_rounding": (square / least) ** 0.5}


class Logits:
    """Logits of a float64 copy of the model under given weights: what an error in the weights does to the output, and nothing else."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        import torch

        self._model = copy.deepcopy(model).double()
        generator = torch.Generator().manual_seed(seed)
        self._ids = torch.randint(0, model.config.vocab_size, (2, 32), generator=generator)

    def __call__(self, weights: Mapping[str, Any]) -> torch.Tensor:
        import torch

        with torch.no_grad():
            for name, into in weights_of(self._model, list(weights)).items():
                into.copy_(torch.as_tensor(weights[name]))
            return self._model(self._ids).logits


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    """||got - exact|| / ||exact||."""
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def differing(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    """The share of elements whose values differ."""
    return sum(int((left[name] != right[name]).sum()) for name in right) / sum(tensor.numel() for tensor in right.values())


def same_bits(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors hold the same names, dtypes and bits (so -0.0 is not 0.0, and NaN is itself)."""
    import torch

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().contiguous().view(torch.uint8)

    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(bits(left[name]), bits(right[name])) for name in left
    )
