"""What an exact switch starts from: a copy of each adapted weight, or a base that the caller holds, perhaps in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusedmerge.checks import as_tensor, shorten
from fusedmerge.errors import DeviceError, DtypeError, InvalidTypeError, InvalidValueError, ShapeError, UnknownNameError
from fusedmerge.weights import canonical_name

if TYPE_CHECKING:
    import torch

__all__ = ["Base", "Scale", "given_bases"]

_BLOCK = 128  # rows and columns of a block scale
_ALL = 31  # a shift that leaves one scale for all rows, or all columns
_CHECKED_ELEMENTS = 1 << 24  # at a time


@dataclass(frozen=True)
class Scale:
    """Scales of an fp8 base: element (i, j) has values[i >> row_shift, j >> col_shift]."""

    values: torch.Tensor  # float32 [scale rows, scale columns], contiguous
    row_shift: int
    col_shift: int


@dataclass(frozen=True)
class Base:
    """The pristine values of one weight: `tensor`, or scale * tensor rounded to float32."""

    tensor: torch.Tensor  # [rows, cols]
    scale: Scale | None = None

    def values(self, rows: slice) -> torch.Tensor:
        """Some rows in float32."""
        import torch

        wide = self.tensor[rows].float()
        if self.scale is None:
            return wide
        i = torch.arange(self.tensor.shape[0], device=wide.device)[rows] >> self.scale.row_shift
        j = torch.arange(self.tensor.shape[1], device=wide.device) >> self.scale.col_shift
        return wide * self.scale.values[i][:, j]


def given_bases(given: Mapping[str, Any], live: Mapping[str, torch.Tensor], operation: str) -> dict[str, Base]:
    """{weight name: tensor or (float8_e4m3fn tensor, scale)}, checked: every target once, and every value rounds to the weight's own bits.

    Raises InvalidTypeError, UnknownNameError, ShapeError, DtypeError, DeviceError, InvalidValueError.
    """
    if not isinstance(given, Mapping):
        raise InvalidTypeError(operation, "base", "{weight name: tensor or (tensor, scale)}", type(given).__name__)
    by_name = {canonical_name(str(name)): value for name, value in given.items()}
    if by_name.keys() != live.keys():
        missing, unknown = live.keys() - by_name.keys(), by_name.keys() - live.keys()
        got = f"none for {shorten(missing)}" if missing else f"also {shorten(unknown)}"
        raise UnknownNameError(operation, "base", "a base for every target of the bank", got)
    bases = {name: _base(name, by_name[name], weight, operation) for name, weight in live.items()}
    for name, weight in live.items():
        _check_rounds_to(name, bases[name], weight, operation)
    return bases


def _base(name: str, value: Any, live: torch.Tensor, operation: str) -> Base:
    import torch

    field = f"base of {name}"
    tensor, scale = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, None)
    tensor = as_tensor(tensor)
    if not isinstance(tensor, torch.Tensor):
        raise InvalidTypeError(operation, field, "a tensor, or a tensor and its scale", type(value).__name__)
    fp8 = tensor.dtype == torch.float8_e4m3fn
    if not fp8 and tensor.dtype not in (live.dtype, torch.float32):
        raise DtypeError(operation, field, f"{live.dtype}, float32 or float8_e4m3fn", tensor.dtype)
    if fp8 != (scale is not None):
        raise InvalidTypeError(operation, field, "a scale with a float8_e4m3fn tensor, and with no other", "none" if fp8 else "one")
    if tensor.shape != live.shape:
        raise ShapeError(operation, field, list(live.shape), list(tensor.shape))
    if (tensor.shape[1] > 1 and tensor.stride(1) != 1) or (tensor.shape[0] > 1 and tensor.stride(0) < tensor.shape[1]):
        raise ShapeError(operation, field, "rows that are contiguous and do not overlap", f"strides {tensor.stride()}")
    if tensor.device != live.device:
        raise DeviceError(operation, field, live.device, tensor.device)
    return Base(tensor.detach(), _scale(field, scale, tensor, operation) if fp8 else None)


def _scale(field: str, scale: Any, tensor: torch.Tensor, operation: str) -> Scale:
    """One scale, one per row ([rows] or [rows, 1]), or one per 128 x 128 block."""
    import torch

    scale = as_tensor(scale)
    if isinstance(scale, (int, float)):
        scale = torch.tensor(float(scale), device=tensor.device)
    if not isinstance(scale, torch.Tensor) or scale.dtype != torch.float32:
        raise DtypeError(operation, f"scale of the {field}", "float32", getattr(scale, "dtype", type(scale).__name__))
    if scale.device != tensor.device:
        raise DeviceError(operation, f"scale of the {field}", tensor.device, scale.device)
    rows, cols = tensor.shape
    blocks = (-(-rows // _BLOCK), -(-cols // _BLOCK))
    shift = _BLOCK.bit_length() - 1
    if scale.numel() == 1:
        return Scale(scale.detach().reshape(1, 1), _ALL, _ALL)
    if tuple(scale.shape) in ((rows,), (rows, 1)):
        return Scale(scale.detach().reshape(rows, 1).contiguous(), 0, _ALL)
    if tuple(scale.shape) == blocks:
        return Scale(scale.detach().contiguous(), shift, shift)
    raise ShapeError(operation, f"scale of the {field}", f"[], [{rows}], [{rows}, 1] or {list(blocks)}", list(scale.shape))


def _check_rounds_to(name: str, base: Base, live: torch.Tensor, operation: str) -> None:
    """`restore` would not give the weight's own bits otherwise."""
    import torch

    step = max(1, _CHECKED_ELEMENTS // max(1, live.shape[1]))
    integer = torch.int16 if live.element_size() == 2 else torch.int32
    for start in range(0, live.shape[0], step):
        rows = slice(start, start + step)
        rounded = base.values(rows).to(live.dtype)
        different = int((rounded.view(integer) != live[rows].view(integer)).sum())
        if different:
            where = f"{different} of {rounded.numel()} in rows {start} to {start + rounded.shape[0]} that do not"
            raise InvalidValueError(operation, f"base of {name}", "values that round to the weight's own bits", where)
