"""fusedmerge: LoRA mixtures at the speed of the backbone they adapt.

Importing this package needs numpy only; torch, CuPy and the compiled extension are loaded when something is used.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import TYPE_CHECKING

from fusedmerge.errors import FusedMergeError

if TYPE_CHECKING:
    from fusedmerge import moe as moe
    from fusedmerge.backend import backends as backends
    from fusedmerge.bank import AdapterBank as AdapterBank
    from fusedmerge.cost import crossover as crossover
    from fusedmerge.ops import lora_linear as lora_linear
    from fusedmerge.ops import route_topk as route_topk
    from fusedmerge.switcher import Switcher as Switcher

__version__ = "0.1.0"

_LAZY = {
    "AdapterBank": "fusedmerge.bank",
    "Switcher": "fusedmerge.switcher",
    "backends": "fusedmerge.backend",
    "crossover": "fusedmerge.cost",
    "lora_linear": "fusedmerge.ops",
    "route_topk": "fusedmerge.ops",
}

__all__ = ["FusedMergeError", "__version__", "moe", *_LAZY]  # noqa: PLE0604


def _log_as_asked() -> None:
    """FUSEDMERGE_LOGLEVEL=DEBUG|INFO|WARNING|ERROR: what this package logs from there on goes to stderr. Unset: as the program has it."""
    level = os.environ.get("FUSEDMERGE_LOGLEVEL", "").upper()
    if level in ("DEBUG", "INFO", "WARNING", "ERROR"):
        logger, handler = logging.getLogger(__name__), logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False


_log_as_asked()


def __getattr__(name: str) -> object:
    if name == "moe":
        return importlib.import_module("fusedmerge.moe")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "moe", *_LAZY])
