"""Whether a model still keeps its weights where they were when a Switcher was built.

A kernel writes through pointers. `model.to(...)`, a replaced Parameter or module, `share_memory()` and FSDP's resizing all leave the old
storage behind, or free it; writing there would miss the model at best.
"""

from __future__ import annotations

import operator
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
    """Where some weights are: their modules' places in the model, and their storage.

    `check` comes before every switch, so it first compares everything in a few passes without Python code of their own; only if one of them
    finds a difference are the weights looked at one by one.
    """

    def __init__(self, root: Weights, weights: Mapping[str, Weight]) -> None:
        self._weights = dict(weights)
        self._signatures = {name: _signature(weight.tensor) for name, weight in weights.items()}
        links: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}  # every step from the root to a weight
        for weight in weights.values():
            if weight.owner is None:
                continue
            module: Any = root
            for part in weight.path.split(".") if weight.path else ():
                children = module._modules
                module = children[part]
                links[id(children), part] = (children, part, module)
            held = weight.owner._parameters if weight.attribute in weight.owner._parameters else weight.owner._buffers
            links[id(held), weight.attribute] = (held, weight.attribute, weight.tensor)
        self._holders = [holder for holder, _, _ in links.values()]
        self._names = [name for _, name, _ in links.values()]
        self._members = [member for _, _, member in links.values()]
        tensors = [weight.tensor for weight in weights.values()]
        self._contiguous = [tensor for tensor in tensors if tensor.is_contiguous()]
        self._strided = [tensor for tensor in tensors if not tensor.is_contiguous()]
        self._tensors = self._contiguous + self._strided
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._strides = [tensor.stride() for tensor in self._strided]

    def check(self, operation: str) -> None:
        """Raise StateError, naming a weight that is not where it was."""
        if not self._is_as_it_was():
            self._find(operation)

    def _is_as_it_was(self) -> bool:
        import torch

        return (
            all(map(operator.is_, map(dict.get, self._holders, self._names), self._members))
            and list(map(torch.Tensor.data_ptr, self._tensors)) == self._addresses
            and all(map(torch.Tensor.is_contiguous, self._contiguous))
            and [tensor.stride() for tensor in self._strided] == self._strides
        )

    def _find(self, operation: str) -> None:
        for holder, name, member in zip(self._holders, self._names, self._members, strict=True):
            if holder.get(name) is not member and hasattr(member, "_modules"):
                raise StateError(operation, f"module {name}", "the one it was when the Switcher was built", "another; build a new Switcher")
        for name, weight in self._weights.items():
            owner = weight.owner
            now = weight.tensor if owner is None else owner._parameters.get(weight.attribute, owner._buffers.get(weight.attribute))
            if now is None or _signature(now) != self._signatures[name]:  # a new Parameter over the old storage is as good
                raise StateError(operation, name, "the storage it had when the Switcher was built", "another; build a new Switcher")
