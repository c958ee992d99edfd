"""The experts and routers that a decoder runs beside its linears."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from fusedmerge.bank import AdapterBank
from fusedmerge.errors import DeviceError, DtypeError, InvalidTypeError, InvalidValueError, ShapeError, StateError, UnknownNameError
from fusedmerge.moe.structure import find
from fusedmerge.ops import route_topk

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["METHODS", "ExpertLinear", "ExpertSet", "Routes"]

METHODS = ("lora", "lora_switch", "mola", "mixlora")  # what the decoder runs; every method runs through transformers and `generate`

Routes = Callable[["Tensor"], "tuple[Tensor, Tensor]"]  # x [..., in] -> ids int32 [..., k], gates float32 [..., k]


@dataclass(frozen=True)
class ExpertLinear:
    """The experts of one linear."""

    a: Tensor  # [N, r, in]
    b: Tensor  # [N, out, r]
    scaling: Tensor  # [N] float32
    router: str | None  # whose choice holds here: a name in `ExpertSet.routers`; None: expert 0, always, at gate 1


@dataclass
class ExpertSet:
    """Experts of some linears, by weight name, and the routers that choose among them, by name.

    A router is asked at most once in a forward, with the input of the first linear in execution order that has its name.
    """

    method: str
    linears: Mapping[str, ExpertLinear]
    routers: Mapping[str, Routes] = field(default_factory=dict)
    bank: AdapterBank | None = None  # over the same factors, where there is one already

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidValueError(
                "Decoder", "method", f"one of {', '.join(METHODS)} (others run through transformers)", repr(self.method)
            )
        for name, linear in self.linears.items():
            if linear.router is not None and linear.router not in self.routers:
                raise UnknownNameError("Decoder", f"router of {name}", f"one of {', '.join(self.routers) or 'none'}", repr(linear.router))

    @classmethod
    def of_bank(cls, bank: AdapterBank, router_weight: Tensor, top_k: int, *, normalize: bool = True) -> ExpertSet:
        """`lora_switch` over a bank: one router, router_weight [N, in], at the first adapted linear. The bank's factors are used in place.

        Raises ShapeError where the router has not one row per slot of the bank; `route_topk` checks the rest.
        """
        if not isinstance(bank, AdapterBank):
            raise InvalidTypeError("Decoder", "bank", "an AdapterBank", type(bank).__name__)
        if router_weight.dim() != 2 or len(router_weight) != len(bank.slots):
            raise ShapeError("Decoder", "router_weight", f"[{len(bank.slots)}, in] (the bank's slots)", list(router_weight.shape))
        linears = {}
        for name in bank.targets:
            target = bank.target(name)
            rank = max(target.ranks)  # the bank pads ranks; zeros need not be read
            linears[name] = ExpertLinear(target.a[:, :rank], target.b[..., :rank], target.scaling, "token")
        return cls("lora_switch", linears, {"token": partial(route_topk, router_weight=router_weight, k=top_k, normalize=normalize)}, bank)

    @classmethod
    def of_model(cls, model: torch.nn.Module) -> ExpertSet | None:
        """The experts of a model that `inject` has adapted, in its weights' dtype; None for a plain model.

        Raises InvalidValueError for a method that the decoder does not run.
        """
        found = find(model)
        if found is None:
            return None
        linears = {}
        for name, part in found.linears.items():
            dtype = part.base_layer.weight.dtype
            router = None if part.static else part.shared or part.name
            linears[name] = ExpertLinear(part.lora_A.detach().to(dtype), part.lora_B.detach().to(dtype), part.scaling, router)
        return cls(found.config.method, linears, found.routers)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], weights: Mapping[str, Tensor]) -> ExpertSet:
        """What `fusedmerge.moe.save` wrote, or a layout that `fusedmerge.moe.load` knows, for a decoder's weights. Errors are `load`'s."""
        from fusedmerge.moe.storage import load

        found = cls.of_model(load(_skeleton(weights), directory))
        assert found is not None
        return found

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise where the experts do not fit the weights of a decoder's linears: UnknownNameError, ShapeError, DtypeError, DeviceError."""
        for name, linear in self.linears.items():
            if name not in weights:
                raise UnknownNameError("Decoder", "experts", "linears in the decoder's layers", name)
            weight = weights[name]
            count, rank = linear.a.shape[:2]
            expected = {"a": (count, rank, weight.shape[1]), "b": (count, weight.shape[0], rank), "scaling": (count,)}
            for part, shape in expected.items():
                tensor = getattr(linear, part)
                if tuple(tensor.shape) != shape:
                    raise ShapeError("Decoder", f"{part} of {name}", list(shape), list(tensor.shape))
                if tensor.device != weight.device:
                    raise DeviceError("Decoder", f"{part} of {name}", weight.device, tensor.device)
                if part != "scaling" and tensor.dtype != weight.dtype:
                    raise DtypeError("Decoder", f"{part} of {name}", f"the weight's dtype ({weight.dtype})", tensor.dtype)

    @property
    def mergeable(self) -> bool:
        """Whether one mixture can be merged into all weights: one choice per token, made for all linears, gates linear in the output."""
        return self.method != "mixlora" and len({linear.router for linear in self.linears.values()}) == 1

    def make_bank(self) -> AdapterBank:
        """The bank over these factors: the given one, or a copy. Slot numbers are expert ids. Raises StateError unless `mergeable`."""
        if self.bank is not None:
            return self.bank
        if not self.mergeable:
            raise StateError("merge", "method", "one route per token for all linears (lora_switch, lora)", self.method)
        tensors = {name: (linear.a.detach(), linear.b.detach()) for name, linear in self.linears.items()}
        count = len(next(iter(self.linears.values())).a)
        scaling = {name: linear.scaling for name, linear in self.linears.items()}
        return AdapterBank.from_tensors(tensors, scaling, [f"expert_{index}" for index in range(count)])

    def to(self, dtype: torch.dtype) -> ExpertSet:
        """A copy with factors in another dtype. Routers stay as they are: they compute in float32 at least."""
        linears = {name: ExpertLinear(x.a.to(dtype), x.b.to(dtype), x.scaling, x.router) for name, x in self.linears.items()}
        return ExpertSet(self.method, linears, self.routers)


def _skeleton(weights: Mapping[str, Tensor]) -> torch.nn.Module:
    """The modules of a transformers model over given weights, without its forward: what `inject` adapts and `load` fills."""
    nn = torch.nn
    root = nn.Module()
    for name, weight in weights.items():
        *parents, leaf, kind = name.split(".")
        if kind != "weight" or not (leaf.endswith("_proj") or leaf == "embed_tokens"):
            continue
        module = root
        for part in parents:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if leaf == "embed_tokens":
            made: nn.Module = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
        else:
            made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        made.weight = nn.Parameter(weight, requires_grad=False)
        module.add_module(leaf, made)
        if leaf == "gate_proj":
            module.add_module("act_fn", nn.SiLU())
    return root.eval()
