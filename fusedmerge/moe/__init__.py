"""LoRA-MoE models: token-wise pre-gating (LoRA-Switch, arXiv 2405.17741) and the methods it is compared with.

Loaded on first use (`fusedmerge.moe`), so that `import fusedmerge` needs no torch.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusedmerge.moe.compose import compose as compose
    from fusedmerge.moe.compose import token_table as token_table
    from fusedmerge.moe.config import LoRAMoEConfig as LoRAMoEConfig
    from fusedmerge.moe.decoder import Decoder as Decoder
    from fusedmerge.moe.experts import ExpertSet as ExpertSet
    from fusedmerge.moe.generate import generate as generate
    from fusedmerge.moe.inject import eject as eject
    from fusedmerge.moe.inject import inject as inject
    from fusedmerge.moe.routing import checkpoint as checkpoint
    from fusedmerge.moe.storage import load as load
    from fusedmerge.moe.storage import save as save
    from fusedmerge.moe.structure import aux_loss as aux_loss
    from fusedmerge.moe.structure import structure as structure
    from fusedmerge.moe.training import train as train

_LAZY = {
    "Decoder": "decoder",
    "ExpertSet": "experts",
    "LoRAMoEConfig": "config",
    "aux_loss": "structure",
    "checkpoint": "routing",
    "compose": "compose",
    "eject": "inject",
    "generate": "generate",
    "inject": "inject",
    "load": "storage",
    "save": "storage",
    "structure": "structure",
    "token_table": "compose",
    "train": "training",
}

__all__ = [*_LAZY]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(f"fusedmerge.moe.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


class _Package(types.ModuleType):
    """Functions and the files that hold them share names (inject, structure): here the name means the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _LAZY and isinstance(value, types.ModuleType)):  # the import system binds a submodule to its package
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
