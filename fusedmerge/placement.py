"""Whether a model still keeps its weights where they were when a Switcher was built.

A kernel writes through pointers. `model.to(...)`, a replaced Parameter or module, `share_memory()` and FSDP's resizing all leave the old
storage behind, or free it; writing there would miss the model at best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from fusedmerge.errors import StateError

if TYPE_CHECKING:
    import torch

    from fusedmerge.weights import Weight, Weights

__all__ = ["Placement"]

Holders = list[dict[str, Any]]
Look = Callable[[Holders, list[str], int], Any]  # holders, a name in each, how many hold modules -> what is there; None: not everything


def _signature(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _look(holders: Holders, names: list[str], num_modules: int) -> Any:
    """The identity of the modules and the signatures of the tensors."""
    members: list[Any] = list(map(dict.get, holders, names))
    try:
        return list(map(id, members[:num_modules])), list(map(_signature, members[num_modules:]))
    except AttributeError:  # None has no data_ptr
        return None


def _fast_look() -> Look | None:
    """The same by the extension, in a sixth of the time. torch shows it tensors from 2.10 on."""
    import torch

    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    try:
        from fusedmerge._ext import describe_places
    except ImportError:
        return None
    return None if exchange is None else partial(describe_places, exchange)


class Placement:
    """Where some weights are: their modules' places in the model, and their storage.

    `check` comes before every switch, so it looks at all of them at once; only if that is not as it was, at one after the other.
    """

    def __init__(self, root: Weights, weights: Mapping[str, Weight]) -> None:
        self._weights = dict(weights)
        self._signatures = {name: _signature(weight.tensor) for name, weight in weights.items()}
        bare = {name: weight.tensor for name, weight in weights.items() if weight.owner is None}
        steps: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}  # from the root to the weights' owners
        for weight in weights.values():
            module: Any = root
            for part in weight.path.split(".") if weight.path else ():
                children = module._modules
                module = children[part]
                steps[id(children), part] = (children, part, module)
        self._steps = list(steps.values())  # holds the modules: no other can have their identity
        self._holders = [holder for holder, _, _ in self._steps]
        self._names = [name for _, name, _ in self._steps]
        for name, weight in weights.items():
            owner = weight.owner
            if owner is None:
                self._holders.append(bare)
            else:
                self._holders.append(owner._parameters if weight.attribute in owner._parameters else owner._buffers)
            self._names.append(name if owner is None else weight.attribute)
        self._look: Look = _fast_look() or _look
        self._places = self._now()
        if self._places is None:
            self._look = _look
            self._places = self._now()

    def check(self, operation: str) -> None:
        """Raise StateError, naming a weight that is not where it was."""
        if self._now() != self._places:
            self._find(operation)

    def _now(self) -> Any:
        return self._look(self._holders, self._names, len(self._steps))

    def _find(self, operation: str) -> None:
        for holder, name, module in self._steps:
            if holder.get(name) is not module:
                raise StateError(operation, f"module {name}", "the one it was when the Switcher was built", "another; build a new Switcher")
        for name, weight in self._weights.items():
            owner = weight.owner
            now = weight.tensor if owner is None else owner._parameters.get(weight.attribute, owner._buffers.get(weight.attribute))
            if now is None or _signature(now) != self._signatures[name]:  # a new Parameter over the old storage is as good
                raise StateError(operation, name, "the storage it had when the Switcher was built", "another; build a new Switcher")
