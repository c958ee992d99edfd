"""fusedmerge: LoRA mixtures at the speed of the backbone they adapt.

Importing this package needs numpy only; torch, CuPy and the compiled extension are loaded when something is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fusedmerge.errors import FusedMergeError

if TYPE_CHECKING:
    from fusedmerge.backend import backends as backends
    from fusedmerge.bank import AdapterBank as AdapterBank
    from fusedmerge.switcher import Switcher as Switcher

__version__ = "0.1.0"

_LAZY = {"AdapterBank": "fusedmerge.bank", "Switcher": "fusedmerge.switcher", "backends": "fusedmerge.backend"}

__all__ = ["FusedMergeError", "__version__", *_LAZY]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
