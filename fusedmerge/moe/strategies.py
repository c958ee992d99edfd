"""How a decoder's linears are applied: plain, with experts beside them, or with experts merged into them.

| strategy | a decoded token costs, beside the backbone | paper (arXiv 2405.17741) |
|---|---|---|
| backbone | nothing; no experts | - |
| unfused | router, gathers and two small GEMMs per adapted linear, in plain torch | what dynamic adapters do, section 2 |
| merged-simple | each adapted weight read, changed and written by torch's GEMM, linear by linear | "simple merge" of the ablation |
| merged | one switch of all adapted weights in one launch | the method, section 3 |
| fused | the chosen experts' bytes (`fusedmerge.lora_linear`) | - |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fusedmerge.backend.cpu import exact_products
from fusedmerge.errors import StateError
from fusedmerge.moe.experts import ExpertLinear
from fusedmerge.moe.fused_kernels import FusedKernels, kernels_for
from fusedmerge.moe.unmerged import Apply, Fused, Routed, Unfused, add_unfused
from fusedmerge.switcher import Switcher

if TYPE_CHECKING:
    from torch import Tensor

    from fusedmerge.moe.decoder import Decoder

__all__ = ["MERGED", "STRATEGIES", "UNMERGED", "Apply", "add_unfused", "make", "one_route"]

UNMERGED = ("backbone", "unfused", "fused")
MERGED = ("merged-simple", "merged")
STRATEGIES = (*UNMERGED, *MERGED, "auto")
GATE_TOLERANCE = 1e-5  # how far equal rows of a batch may come apart in the router's float32 GEMM


def make(decoder: Decoder, strategy: str) -> Apply:
    """The strategy of that name (all but "auto"). Raises StateError where the decoder has no experts, or they cannot be merged."""
    if strategy != "backbone" and decoder.experts is None:
        raise StateError("Decoder", "experts", f'some, for strategy "{strategy}"', "a plain backbone")
    if strategy == "fused" and (backend := kernels_for(decoder)) is not None:
        return FusedKernels(decoder, backend)
    kinds = {"backbone": Apply, "unfused": Unfused, "fused": Fused, "merged-simple": MergedSimple, "merged": Merged}
    return kinds[strategy](decoder)


def one_route(ids: Tensor, gates: Tensor, strategy: str) -> tuple[Tensor, Tensor]:
    """The route [k] that a whole batch [B, 1, k] shares. For B > 1 this waits for the device. Raises StateError where rows differ."""
    if len(ids) > 1:
        same = (ids == ids[:1]).all() & ((gates - gates[:1]).abs() <= GATE_TOLERANCE).all()
        if not bool(same):
            expected = f'one route for the whole batch (strategy "{strategy}" merges it into the weights; "fused" and "unfused" need none)'
            raise StateError("generate", "routes", expected, f"{len(torch.unique(ids.flatten(1), dim=0))} or more in a batch of {len(ids)}")
    return ids[0, 0], gates[0, 0].float()


class _Merging(Routed):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        if self.experts.method == "mixlora":
            expected = 'experts that are linear in the output (strategy "fused" or "unfused" runs these)'
            raise StateError("Decoder", "method", expected, "mixlora, whose gates come after the non-linearity")


class MergedSimple(_Merging):
    """Each adapted weight is set to round(base + sum gate * scaling * B A) just before it is used, with torch's own GEMM.

    From a pristine copy, as the Switcher does it, so that errors do not add up; a router per linear is as good as one for all.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.base = {name: decoder.weights[name].clone() for name in self.experts.linears}

    def project(self, x: Tensor, names: Sequence[str]) -> Sequence[Tensor]:
        for name in names:
            if name in self.base:
                expert = self.experts.linears[name]
                merge_simple(
                    self.decoder.weights[name], self.base[name], expert, *one_route(*self.route(expert.router, x), "merged-simple")
                )
        return self.decoder.linears(x, names)

    def restore(self) -> None:
        for name, base in self.base.items():
            self.decoder.weights[name].copy_(base)


@torch.no_grad()
def merge_simple(live: Tensor, base: Tensor, expert: ExpertLinear, ids: Tensor, gates: Tensor) -> None:
    """live [out, in] = round(base + sum_j gates_j s_j B_j A_j), ids and gates [k] (0 where the id is -1)."""
    wide = torch.promote_types(live.dtype, torch.float32)
    ids = ids.long()
    a = expert.a[ids].to(wide).flatten(0, 1)  # [k r, in]
    b = expert.b[ids].to(wide) * (gates * expert.scaling[ids])[:, None, None]  # [k, out, r]
    with exact_products():
        live.copy_(torch.addmm(base.to(wide), b.transpose(0, 1).flatten(1), a))


class Merged(_Merging):
    """One switch of all adapted weights per token, at the first adapted linear; from there on the plain backbone."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        if not self.experts.mergeable:
            expected = 'one route per token for all linears (strategy "fused", "unfused" or "merged-simple" runs these)'
            raise StateError("Decoder", "routers", expected, f"{len(self.experts.routers)} routers ({self.experts.method})")
        self.switcher = Switcher({name: decoder.weights[name] for name in self.experts.linears}, self.experts.make_bank())
        self.router = next(iter(self.experts.linears.values())).router

    def project(self, x: Tensor, names: Sequence[str]) -> Sequence[Tensor]:
        if not self.chosen and any(name in self.experts.linears for name in names):
            self.switcher.switch(*one_route(*self.route(self.router, x), "merged"))
        return self.decoder.linears(x, names)

    def restore(self) -> None:
        self.switcher.restore()

    def close(self) -> None:
        self.switcher.close()
