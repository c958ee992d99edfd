"""The backbone's weights: their names, and whether a switch may write into them.

Names are those of the bare model: wrappers that PEFT, torch.compile, DDP and FSDP add are dropped, so that an adapter trained in one
setting finds its weights in another.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

from fusedmerge.checks import as_tensor, shorten
from fusedmerge.errors import DeviceError, DtypeError, InvalidTypeError, InvalidValueError, ShapeError, StateError, UnknownNameError

if TYPE_CHECKING:
    import torch

__all__ = ["Weight", "Weights", "canonical_name", "check_writable", "collect", "overlap"]

Weights = Union["torch.nn.Module", Mapping[str, "torch.Tensor"]]

_LEADING = re.compile(r"^(?:module\.|base_model\.model\.|_orig_mod\.|_fsdp_wrapped_module\.)+")
_INNER = re.compile(r"(?:(?<=\.)|^)(?:base_layer|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def canonical_name(name: str) -> str:
    """The weight's name in the bare model.

    >>> canonical_name("module.base_model.model.layers.0.q_proj.base_layer.weight")
    'layers.0.q_proj.weight'
    """
    return _INNER.sub("", _LEADING.sub("", name))


@dataclass(frozen=True)
class Weight:
    """One weight of the backbone."""

    name: str  # canonical
    tensor: torch.Tensor  # [out, in], or [in, out] where transposed
    transposed: bool | None  # True: Conv1D and embeddings; False: Linear; None: not known (a bare tensor)
    quantised: str = ""  # the quantisation's name, where the module shows one
    owner: torch.nn.Module | None = None  # the module that holds it as parameter `attribute`
    attribute: str = ""
    path: str = ""  # the owner's, from the model's root


def collect(weights: Weights, operation: str) -> dict[str, Weight]:
    """All weights by canonical name. A module that is registered twice keeps both names, with one tensor."""
    import torch

    if isinstance(weights, torch.nn.Module):
        entries = _module_weights(weights)
    elif isinstance(weights, Mapping):
        entries = ((name, _bare_weight(name, tensor, operation)) for name, tensor in weights.items())
    else:
        raise InvalidTypeError(operation, "weights", "an nn.Module or a mapping of weight name to tensor", type(weights).__name__)
    found: dict[str, Weight] = {}
    for raw, weight in entries:
        if weight.name in found and found[weight.name].tensor is not weight.tensor:
            raise InvalidValueError(operation, "weights", "one weight per name", f'two weights named "{weight.name}" (one is "{raw}")')
        found[weight.name] = weight
    return found


def _bare_weight(name: object, tensor: object, operation: str) -> Weight:
    import torch

    tensor = as_tensor(tensor)
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise InvalidTypeError(operation, f"weights[{name!r}]", "a tensor (or array with DLPack) under a str", type(tensor).__name__)
    return Weight(canonical_name(name), tensor, None)


def _module_weights(model: torch.nn.Module) -> Iterable[tuple[str, Weight]]:
    import torch

    for prefix, module in model.named_modules(remove_duplicate=False):
        kind = type(module).__name__
        transposed = {"Conv1D": True}.get(kind)
        if isinstance(module, torch.nn.Embedding):
            transposed = True
        elif isinstance(module, torch.nn.Linear):
            transposed = False
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            raw = f"{prefix}.{name}" if prefix else name
            layout = transposed if name == "weight" else None
            yield raw, Weight(canonical_name(raw), tensor, layout, _quantisation(tensor), module, name, prefix)
        for name in ("qweight", "weight_packed"):  # GPTQ, AWQ and compressed-tensors hold no plain weight at all
            tensor = getattr(module, name, None)
            if isinstance(tensor, torch.Tensor) and "weight" not in module._parameters:
                raw = f"{prefix}.weight" if prefix else "weight"
                yield raw, Weight(canonical_name(raw), tensor, transposed, f"{kind}.{name}")


def _quantisation(tensor: torch.Tensor) -> str:
    """The name of a weight's quantisation, or "" for a plain one."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    kind = type(tensor).__name__
    if getattr(tensor, "quant_state", None) is not None or kind in ("Params4bit", "Int8Params"):
        return kind
    if is_traceable_wrapper_subclass(tensor) or tensor.is_quantized:
        return kind
    return ""


def check_writable(targets: Mapping[str, tuple[int, int]], found: Mapping[str, Weight], operation: str) -> dict[str, torch.Tensor]:
    """The tensors of `targets` (name -> [rows, cols]), each checked for whatever would make a merge into it wrong."""
    import torch

    missing = [name for name in targets if name not in found]
    if missing:
        raise UnknownNameError(operation, "targets", "weights that the model has", f"no {shorten(missing)}")
    for name, shape in targets.items():
        weight = found[name]
        tensor = weight.tensor
        if tensor.layout is not torch.strided:
            raise ShapeError(operation, name, "a dense weight", tensor.layout)
        if weight.quantised or not tensor.is_floating_point():
            got = weight.quantised or str(tensor.dtype)
            raise DtypeError(operation, name, "a plain weight; merge into the unquantised base instead", f"a quantised one ({got})")
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise DtypeError(operation, name, "bfloat16, float16 or float32", tensor.dtype)
        if tensor.device.type == "meta":
            raise DeviceError(operation, name, "a weight with storage (load or materialise the model first)", "device meta")
        if tuple(tensor.shape) != tuple(shape):
            raise ShapeError(operation, name, f"shape {list(shape)}", list(tensor.shape))
        if (tensor.shape[1] > 1 and tensor.stride(1) != 1) or (tensor.shape[0] > 1 and tensor.stride(0) < tensor.shape[1]):
            raise ShapeError(operation, name, "rows that are contiguous and do not overlap", f"strides {tensor.stride()}")
        if tensor.grad_fn is not None:
            raise StateError(operation, name, "a leaf tensor", f"a tensor with a grad_fn ({type(tensor.grad_fn).__name__})")
    _check_untied(targets, found, operation)
    return {name: found[name].tensor.detach() for name in targets}


def _check_untied(targets: Mapping[str, tuple[int, int]], found: Mapping[str, Weight], operation: str) -> None:
    """No target may share memory with another weight: it would be adapted twice, or adapt a weight that has no adapter.

    A second name of the very same module is no other weight, unless both names are targets.
    """
    import torch

    by_storage: dict[tuple[str, int], list[Weight]] = defaultdict(list)
    for weight in found.values():
        if not weight.quantised and weight.tensor.device.type != "meta" and weight.tensor.layout is torch.strided:
            by_storage[_storage(weight.tensor)].append(weight)
    for name in targets:
        mine = found[name]
        for other in by_storage[_storage(mine.tensor)]:
            alias = other.owner is not None and other.owner is mine.owner and other.attribute == mine.attribute
            if other.name != name and (other.name in targets or not alias) and overlap(mine.tensor, other.tensor):
                raise StateError(operation, name, "a weight of its own", f"one that is tied to or overlaps {other.name}")


def _storage(tensor: torch.Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr()


def overlap(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two strided tensors of one storage share an element (told exactly for slices of one row-major matrix)."""
    if x.numel() == 0 or y.numel() == 0 or _storage(x) != _storage(y):
        return False
    (x0, x1), (y0, y1) = _byte_range(x), _byte_range(y)
    if x1 <= y0 or y1 <= x0:
        return False
    if x.dim() == y.dim() == 2 and x.dtype == y.dtype and x.stride() == y.stride() and x.stride(1) == 1:
        pitch = x.stride(0)
        (xr, xc), (yr, yc) = divmod(int(x.storage_offset()), pitch), divmod(int(y.storage_offset()), pitch)
        if xc + x.shape[1] <= pitch and yc + y.shape[1] <= pitch:
            rows = xr < yr + y.shape[0] and yr < xr + x.shape[0]
            return rows and xc < yc + y.shape[1] and yc < xc + x.shape[1]
    return True


def _byte_range(x: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    start = int(x.storage_offset()) * x.element_size()
    return start, start + (last + 1) * x.element_size()
