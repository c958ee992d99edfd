"""Whether a model still keeps its weights where they were when a Switcher was built.

A kernel writes through pointers. `model.to(...)`, a replaced Parameter or module, `share_memory()` and FSDP's resizing all leave the old
storage behind, or free it; writing there would miss the model at best.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusedmerge.errors import StateError

if TYPE_CHECKING:
    import torch

    from fusedmerge.weights import Weight, Weights

__all__ = ["Placement"]


def _signature(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


class Placement:
    """Where some weights are: their modules' places in the model, and their storage."""

    def __init__(self, root: Weights, weights: Mapping[str, Weight]) -> None:
        self._weights = dict(weights)
        self._signatures = {name: _signature(weight.tensor) for name, weight in weights.items()}
        self._links: dict[tuple[int, str], tuple[dict[str, Any], str, torch.nn.Module]] = {}  # every step from the root to an owner
        for weight in weights.values():
            module: Any = root
            for part in weight.path.split(".") if weight.path else ():
                children = module._modules
                module = children[part]
                self._links[id(children), part] = (children, part, module)

    def check(self, operation: str) -> None:
        """Raise StateError, naming a weight that is not where it was."""
        for children, part, module in self._links.values():
            if children.get(part) is not module:
                raise StateError(operation, f"module {part}", "the one it was when the Switcher was built", "another; build a new Switcher")
        for name, weight in self._weights.items():
            owner = weight.owner
            now = weight.tensor if owner is None else owner._parameters.get(weight.attribute, owner._buffers.get(weight.attribute))
            if now is None or _signature(now) != self._signatures[name]:
                raise StateError(operation, name, "the storage it had when the Switcher was built", "another; build a new Switcher")
