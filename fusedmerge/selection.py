"""What a caller may pass as a mixture, and the one form it is turned into."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fusedmerge.checks import as_tensor, to_float32
from fusedmerge.errors import DeviceError, DtypeError, InvalidTypeError, InvalidValueError, ShapeError

if TYPE_CHECKING:
    import torch

    from fusedmerge.bank import AdapterBank

__all__ = ["Mixture", "Named", "parse", "selection_on"]

Mixture = tuple[tuple[int, float], ...]  # (slot, gate as a float32 value), gates other than 0, ascending slots: equal means equal
Named = tuple[tuple[str, float], ...]  # (adapter, gate as given), in the order given


def parse(bank: AdapterBank, adapters: Any, gates: Any, operation: str = "switch") -> tuple[Mixture, Named]:
    """Read a mixture: {name: gate}, a name, names, or slot ids (numbers, array or 1-D tensor; -1 = empty) with gates (1.0 each if None).

    Duplicates add; gates of 0 drop out. Raises UnknownNameError, InvalidTypeError, InvalidValueError, ShapeError, DtypeError, DeviceError.
    """
    if isinstance(adapters, Mapping):
        if gates is not None:
            raise InvalidTypeError(operation, "gates", "None with a mapping of name to gate", type(gates).__name__)
        members, values = list(adapters), [_number(gate, operation, f"gate of {name!r}") for name, gate in adapters.items()]
    else:
        members = _members(adapters, operation)
        values = [1.0] * len(members) if gates is None else _gates(gates, operation)
        if len(values) != len(members):
            raise InvalidValueError(operation, "gates", f"{len(members)} values (one per adapter)", len(values))
    named: dict[str, float] = {}
    for member, gate in zip(members, values, strict=True):
        _check_finite(gate, operation, member)
        name = _name(bank, member, operation)
        if name is not None:
            named[name] = named[name] + gate if name in named else gate
    for name, gate in named.items():
        _check_finite(gate, operation, name)
    kept = tuple((name, gate) for name, gate in named.items() if to_float32(gate) != 0)
    mixture = tuple(sorted((bank.slot(name), to_float32(gate)) for name, gate in kept))
    for slot, gate in mixture:
        if not math.isfinite(to_float32(gate * bank.largest_scaling(slot))):
            raise InvalidValueError(operation, f"gate of {bank.slots[slot]!r} times its scaling", "a finite float32", gate)
    return mixture, kept


def selection_on(device: torch.device, adapters: Any, gates: Any, operation: str = "switch") -> tuple[torch.Tensor, torch.Tensor] | None:
    """Ids int32 [k] and gates float32 [k] that are on `device` (a GPU) already: torch tensors, CuPy arrays, or whatever has DLPack.

    None where the ids are no array on a GPU: `parse` reads those. Nothing synchronises; the values are not looked at.
    Raises DeviceError, DtypeError, ShapeError, InvalidValueError.
    """
    import torch

    if device.type == "cpu" or not _is_on_gpu(adapters):
        return None
    ids = as_tensor(adapters)
    if gates is None:
        gates = torch.ones(ids.shape, dtype=torch.float32, device=device)
    elif not _is_on_gpu(gates):
        raise DeviceError(operation, "gates", f"an array on {device}, where the ids are", "values on the host")
    gates = as_tensor(gates)
    for field, tensor, integral in (("ids", ids, True), ("gates", gates, False)):
        if tensor.device != device:
            raise DeviceError(operation, field, f"an array on the weights' device ({device})", tensor.device)
        if tensor.dim() != 1:
            raise ShapeError(operation, field, "one dimension", list(tensor.shape))
        if tensor.dtype == torch.bool or tensor.is_complex() or tensor.is_floating_point() == integral:
            raise DtypeError(operation, field, "integers" if integral else "floats", tensor.dtype)
    if len(ids) != len(gates):
        raise InvalidValueError(operation, "gates", f"{len(ids)} values (one per id)", len(gates))
    return ids.to(torch.int32).contiguous(), gates.detach().to(torch.float32).contiguous()


def _is_on_gpu(array: Any) -> bool:
    import torch

    return array.device.type != "cpu" if isinstance(array, torch.Tensor) else hasattr(array, "__cuda_array_interface__")


def _members(adapters: Any, operation: str) -> list[Any]:
    if isinstance(adapters, (str, int)):
        return [adapters]
    if hasattr(adapters, "tolist"):
        return _array(adapters, operation, "adapters", "integers", lambda kind: "int" in kind)
    if isinstance(adapters, Iterable) and not isinstance(adapters, (bytes, set, frozenset)):
        return list(adapters)
    raise InvalidTypeError(operation, "adapters", "a name, {name: gate}, or a list of names or ids", type(adapters).__name__)


def _gates(gates: Any, operation: str) -> list[float]:
    if hasattr(gates, "tolist"):
        values = _array(gates, operation, "gates", "floats", lambda kind: "float" in kind or "int" in kind)
    elif isinstance(gates, Iterable) and not isinstance(gates, (str, bytes, Mapping, set, frozenset)):
        values = list(gates)
    else:
        values = [gates]
    return [_number(value, operation, f"gates[{index}]") for index, value in enumerate(values)]


def _array(array: Any, operation: str, field: str, expected: str, fits: Any) -> list[Any]:
    """The values of an array or tensor, read on the host."""
    device = getattr(array, "device", None)
    if getattr(device, "type", device) not in ("cpu", None):
        raise DeviceError(operation, field, "the host (or ids and gates both on the weights' GPU)", device)
    if not fits(str(array.dtype)):
        raise DtypeError(operation, field, expected, array.dtype)
    if len(array.shape) > 1:
        raise ShapeError(operation, field, "one dimension", list(array.shape))
    values = array.tolist()
    return values if isinstance(values, list) else [values]


def _name(bank: AdapterBank, member: Any, operation: str) -> str | None:
    """The adapter that a name or a slot number stands for; None for the empty slot -1."""
    if isinstance(member, str):
        return bank.slots[bank.slot(member, operation)]
    if isinstance(member, bool) or not hasattr(member, "__index__"):
        raise InvalidTypeError(operation, "adapters", "names (str) or slot ids (int)", f"{member!r} ({type(member).__name__})")
    try:
        slot = operator.index(member)
    except TypeError as error:
        raise InvalidTypeError(operation, "adapters", "names (str) or slot ids (int)", repr(member)) from error
    if slot == -1:
        return None
    if not 0 <= slot < len(bank.slots):
        raise InvalidValueError(operation, "ids", f"-1 (empty) or 0 to {len(bank.slots) - 1}", slot)
    if bank.slots[slot] is None:
        raise InvalidValueError(operation, "ids", "a slot that holds an adapter", f"{slot}, which is free")
    return bank.slots[slot]


def _number(value: Any, operation: str, field: str) -> float:
    if hasattr(value, "item"):
        values = _array(value, operation, field, "a number", lambda kind: "float" in kind or "int" in kind)
        value = values[0] if len(values) == 1 else values
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidTypeError(operation, field, "a number", type(value).__name__)
    return math.inf if abs(value) >= 1e300 else float(value)  # no such float32 anyway; an int may be too large even for a float


def _check_finite(gate: float, operation: str, member: object) -> None:
    if not math.isfinite(to_float32(gate)):
        raise InvalidValueError(operation, f"gate of {member!r}", "a finite float32", gate)
