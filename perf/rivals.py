"""The other ways to put a mixture into weights, for the switch to be measured beside: each sets it anew from the same bank.

A rival is a function of the mixture. `live` is where it writes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import fusedmerge as fm
from fusedmerge.commands.demo_setup import PeftSwitch, lora_layers, weights_of
from perf.subjects import Mixture

if TYPE_CHECKING:
    import torch


__all__ = ["Addmm", "Switch", "addmm_float32", "copy_of", "peft"]

Switch = Callable[[Mixture], Any]
Weights = Mapping[str, "torch.Tensor"]
COPY_BYTES = 1 << 30  # of the buffers that stand for larger ones


def copy_of(nbytes: float, where: torch.device) -> Callable[[Any], None]:
    """A copy whose traffic is `nbytes`, half read and half written, in pieces of at most 1 GiB."""
    import torch

    whole, piece = int(nbytes) // 2, min(int(nbytes) // 2, COPY_BYTES)
    source, into = (torch.ones(piece, dtype=torch.uint8, device=where) for _ in range(2))  # not zeros: those pages would be one

    def run(_: Any) -> None:
        for start in range(0, whole, piece):
            size = min(piece, whole - start)
            into[:size].copy_(source[:size])

    return run


def peft(model: torch.nn.Module, bank: fm.AdapterBank, r: int) -> tuple[Weights, dict[str, Switch], Callable[[], None]]:
    """PEFT's unmerge_adapter + set_scale + merge_adapter on a copy of the model: (its weights, {factors' dtype: switch}, take all out).

    The bank's adapters are there twice, with float32 factors (PEFT's default) and with bfloat16 ones.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=r, target_modules=sorted({name.split(".")[-2] for name in bank.targets}))
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    wrapped: Any = None
    for dtype in dtypes:
        for name in bank.names:
            if wrapped is None:
                wrapped = get_peft_model(copy.deepcopy(model), config, adapter_name=f"{dtype}_{name}")
            else:
                wrapped.add_adapter(f"{dtype}_{name}", config)
    for layer, name in zip(lora_layers(wrapped), bank.targets, strict=True):
        target = bank.target(name)
        for dtype, kind in dtypes.items():
            for slot, adapter in enumerate(bank.names):
                for part, factor in ((layer.lora_A, target.a[slot, :r]), (layer.lora_B, target.b[slot, :, :r])):
                    part[f"{dtype}_{adapter}"].weight.data = factor.to(kind, copy=True)
    switcher = PeftSwitch(wrapped)

    def switch(dtype: str) -> Switch:
        return lambda mixture: switcher.switch({f"{dtype}_{name}": gate for name, gate in mixture.items()})

    return weights_of(wrapped, bank.targets), {dtype: switch(dtype) for dtype in dtypes}, switcher.restore


def addmm_float32(base: Weights, live: Weights, bank: fm.AdapterBank) -> Switch:
    """The plain loop that is right: widen each base matrix, addmm_ each expert in float32, round into place."""

    def switch(mixture: Mixture) -> None:
        for name, tensor in live.items():
            target, wide = bank.target(name), base[name].float()
            for expert, gate in mixture.items():
                slot = bank.slot(expert)
                wide.addmm_(target.b[slot].float(), target.a[slot].float(), alpha=gate * target.scalings[slot])
            tensor.copy_(wide)

    return switch


class Addmm:
    """The fast loop: gates folded into 16-bit factors (which misrounds), the chosen factors gathered, one addmm per matrix.

    Ids and gates are read on the device, so that the loop can be captured in a CUDA graph.
    """

    def __init__(self, base: Weights, live: Weights, bank: fm.AdapterBank, k: int) -> None:
        import torch

        where = next(iter(live.values())).device
        self._matrices = [(base[name], bank.target(name), tensor) for name, tensor in live.items()]
        self._bank = bank
        self._ids = torch.zeros(k, dtype=torch.int64, device=where)
        self._gates = torch.zeros(k, dtype=torch.float32, device=where)
        self._merge: Callable[..., None] = merge_matrix

    def __call__(self, mixture: Mixture) -> None:
        self.select(mixture)
        self.run()

    def select(self, mixture: Mixture) -> None:
        """Put ids and gates on the device."""
        import torch

        self._ids.copy_(torch.tensor([self._bank.slot(name) for name in mixture]))
        self._gates.copy_(torch.tensor(list(mixture.values())))

    def run(self) -> None:
        """Merge what was selected."""
        for base, target, live in self._matrices:
            self._merge(base, target.a, target.b, target.scaling, self._ids, self._gates, live)

    def captured(self) -> Switch:
        """The same in one CUDA graph."""
        import torch

        self.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()

        def switch(mixture: Mixture) -> None:
            self.select(mixture)
            graph.replay()

        return switch

    def compiled(self) -> Switch:
        """The same with the step for one matrix through torch.compile. Raises what torch.compile raises, at the first call."""
        import torch

        self._merge = torch.compile(merge_matrix, dynamic=False)
        return self


def merge_matrix(
    base: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, live: torch.Tensor
) -> None:
    """live = base + [c_e B_e] [A_e], all in the weights' dtype. a [N, R, cols], b [N, rows, R], ids [k], gates [k]."""
    import torch

    coefficients = (gates * scaling.index_select(0, ids)).to(b.dtype)
    chosen_a = a.index_select(0, ids).flatten(0, 1)  # [k R, cols]
    chosen_b = (b.index_select(0, ids) * coefficients[:, None, None]).transpose(0, 1).flatten(1)  # [rows, k R]
    torch.addmm(base, chosen_b, chosen_a, out=live)
