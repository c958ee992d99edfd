"""The benchmark's model and adapters, and the other ways to switch them that it is measured beside."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fusedmerge as fm
from fusedmerge.commands.demo_setup import ModelSize, PeftSwitch, build_llama, clone, peft_load, weights_of, write_adapters

MODEL = ModelSize(hidden=640, intermediate=1728, layers=10, heads=10, vocab=1024)  # 50.9 M parameters
NUM_ADAPTERS, RANK, TOP_K = 8, 64, 2
Mixture = dict[str, float]
Switch = Callable[[Mixture], Any]


@dataclass
class Subject:
    """A Switcher and what the rivals are made from."""

    model: torch.nn.Module
    bank: fm.AdapterBank
    switcher: fm.Switcher
    paths: dict[str, Path]
    pristine: dict[str, torch.Tensor]

    @property
    def live(self) -> dict[str, torch.Tensor]:
        """The model's own adapted weights."""
        return weights_of(self.model, self.bank.targets)

    @property
    def adapted_bytes(self) -> int:
        """Bytes of the adapted weights."""
        return sum(tensor.nbytes for tensor in self.pristine.values())

    def switch_bytes(self) -> int:
        """The least traffic of a switch: the base read, the live weights written, the chosen experts' factors read."""
        factors = sum(self.bank.target(n).a[0].nbytes + self.bank.target(n).b[0].nbytes for n in self.bank.targets)
        return 2 * self.adapted_bytes + TOP_K * factors


def make_subject(directory: Path) -> Subject:
    """The 50 M-parameter bfloat16 model, with 8 adapters of rank 64 on all its linears, written by PEFT and read back."""
    config = {"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear"}
    model = build_llama(MODEL)
    paths = write_adapters(model, directory, {f"adapter_{i}": config for i in range(NUM_ADAPTERS)}, delta=0.07)
    bank = fm.AdapterBank.from_peft(paths, model)
    pristine = clone(weights_of(model, bank.targets))
    return Subject(model, bank, fm.Switcher(model, bank), paths, pristine)


def mixtures(names: Sequence[str], count: int, seed: int = 0) -> list[Mixture]:
    """`count` random top-2 mixtures whose gates add up to 1."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        gate = rng.uniform(0.1, 0.9)
        found.append(dict(zip(rng.sample(list(names), TOP_K), (gate, 1.0 - gate), strict=True)))
    return found


# ---------------------------------------------------------------------- the other ways; each sets a mixture in weights of its own


def peft_switch(subject: Subject, dtype: torch.dtype) -> tuple[Switch, Mapping[str, torch.Tensor]]:
    """PEFT's unmerge_adapter + set_scale + merge_adapter, with its factors in `dtype` (float32 is PEFT's default)."""
    model = peft_load(subject.model, subject.paths, autocast_adapter_dtype=dtype == torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return PeftSwitch(model).switch, weights_of(model, subject.bank.targets)


def copy_switch(subject: Subject) -> tuple[Switch, Mapping[str, torch.Tensor]]:
    """No switch at all: the pristine weights copied over the live ones, the same bytes but for the factors."""
    live = clone(subject.pristine)

    def switch(_: Mixture) -> None:
        for name, tensor in live.items():
            tensor.copy_(subject.pristine[name])

    return switch, live


def addmm_float32(subject: Subject) -> tuple[Switch, Mapping[str, torch.Tensor]]:
    """The plain loop: widen each base matrix, addmm_ each expert in float32, round into place."""
    live, bank = clone(subject.pristine), subject.bank

    def switch(mixture: Mixture) -> None:
        for name, tensor in live.items():
            target, wide = bank.target(name), subject.pristine[name].float()
            for expert, gate in mixture.items():
                slot = bank.slot(expert)
                wide.addmm_(target.b[slot].float(), target.a[slot].float(), alpha=gate * target.scaling[slot].item())
            tensor.copy_(wide)

    return switch, live


def addmm_bfloat16(subject: Subject) -> tuple[Switch, Mapping[str, torch.Tensor]]:
    """The fast and wrong loop: gates folded into bfloat16 factors, all experts in one bfloat16 addmm."""
    live, bank = clone(subject.pristine), subject.bank

    def switch(mixture: Mixture) -> None:
        for name, tensor in live.items():
            target = bank.target(name)
            slots = [bank.slot(expert) for expert in mixture]
            gates = [gate * target.scaling[slot].item() for slot, gate in zip(slots, mixture.values(), strict=True)]
            a = torch.cat([target.a[slot] for slot in slots])
            b = torch.cat([target.b[slot] * gate for slot, gate in zip(slots, gates, strict=True)], dim=1)
            torch.addmm(subject.pristine[name], b, a, out=tensor)

    return switch, live
