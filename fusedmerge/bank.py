"""AdapterBank: N adapters stacked per target, so that a kernel (or a thread) finds any expert by its slot number.

Per target: a [capacity, R, cols], b [capacity, rows, R], scaling [capacity] float32. R is the largest rank on that target, padded to a
multiple of 16; padding is zero. Scaling is kept apart from the factors: folded into 16-bit factors it would misround many weights.
A slot keeps its number and its storage for life; adapters come and go in it.
"""

from __future__ import annotations

import difflib
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

from fusedmerge.errors import FormatError, InvalidTypeError, InvalidValueError, ShapeError, StateError, UnknownNameError
from fusedmerge.formats.lora import Adapter, Factors
from fusedmerge.memory import require_memory
from fusedmerge.staging import (
    RANK_MULTIPLE,
    BankTarget,
    TargetSpec,
    adapters_from_stacks,
    check_carried,
    check_complete,
    orient,
    orient_specs,
    specs_from_weights,
)
from fusedmerge.weights import Weights, canonical_name, collect

if TYPE_CHECKING:
    import torch

__all__ = ["AdapterBank"]

PathLike = Union[str, "os.PathLike[str]"]


class AdapterBank:
    """Adapters by name and slot. Build one with `from_peft`, `from_model`, `from_tensors`, `random` or `load`."""

    def __init__(self, targets: Mapping[str, BankTarget], slots: Sequence[str | None], cast_error: Mapping[str, float]) -> None:
        self._targets = dict(targets)
        self._slots = list(slots)
        self._pins: weakref.WeakKeyDictionary[object, frozenset[int]] = weakref.WeakKeyDictionary()
        self._largest: dict[int, float] = {}  # slot -> its largest |scaling|, as far as anybody has asked
        self.cast_error = dict(cast_error)  # adapter -> about how much narrowing the factors changed its deltas (relative); 0.0: nothing

    @classmethod
    def from_peft(
        cls,
        adapters: Sequence[PathLike] | Mapping[str, PathLike],
        weights: Weights,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        capacity: int | None = None,
        max_rank: int = 0,
    ) -> AdapterBank:
        """Load PEFT adapter directories.

        adapters: directories, named by their last path part, or {name: directory}. weights: the model (or its tensors by name) that
        they adapt. device, dtype: each target's own by default; dtype may be float32 for 16-bit weights. capacity and max_rank leave
        room for `add`. `cast_error` tells about how much narrowing the factors changed each adapter's deltas.

        Raises MissingFileError; FormatError for a file that is damaged or would merge silently wrong; ShapeError; UnknownNameError for
        targets that the model lacks; BankMemoryError, with the estimate, before anything is allocated.
        """
        from fusedmerge.formats.peft import read_peft

        if isinstance(adapters, (str, os.PathLike)) or not isinstance(adapters, (Mapping, Sequence)):
            raise InvalidTypeError("from_peft", "adapters", "a list of directories or {name: directory}", repr(adapters))
        named = adapters.items() if isinstance(adapters, Mapping) else [(None, path) for path in adapters]
        loaded = [read_peft(path, name) for name, path in named]
        return cls.from_adapters(loaded, weights, device, dtype, capacity=capacity, max_rank=max_rank, operation="from_peft")

    @classmethod
    def from_model(
        cls,
        peft_model: torch.nn.Module,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        capacity: int | None = None,
        max_rank: int = 0,
    ) -> AdapterBank:
        """The adapters that live in a PeftModel, at their present scaling. Factors are copied; the model is not changed."""
        from fusedmerge.formats.peft_model import read_peft_model

        loaded = read_peft_model(peft_model)
        return cls.from_adapters(loaded, peft_model, device, dtype, capacity=capacity, max_rank=max_rank, operation="from_model")

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        scaling: Any,
        names: Sequence[str] | None = None,
        *,
        weights: Weights | None = None,
        capacity: int | None = None,
        max_rank: int = 0,
    ) -> AdapterBank:
        """Build from stacked factors {weight name: (a [N, r, in], b [N, out, r])}, copied in their own dtype.

        scaling: [N] (tensor or numbers), one number, or {weight name: [N]}. names: N adapter names; "0", "1", ... by default. weights: the
        model, needed only for targets that are stored as [in, out] (Conv1D, embeddings); all others have delta = scaling * b @ a.
        """
        adapters, specs = adapters_from_stacks(tensors, scaling, names)
        if weights is not None:
            specs = orient_specs(specs, collect(weights, "from_tensors"), "from_tensors")
        return cls._build(adapters, specs, capacity, max_rank, "from_tensors")

    @classmethod
    def from_adapters(
        cls,
        adapters: Sequence[Adapter],
        weights: Weights,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        capacity: int | None = None,
        max_rank: int = 0,
        operation: str = "from_adapters",
    ) -> AdapterBank:
        """Stack adapters that were read already (see `fusedmerge.formats`). Arguments and errors as for `from_peft`."""
        found = collect(weights, operation)
        specs = specs_from_weights(adapters, found, device, dtype, operation)
        for adapter in adapters:
            check_complete(adapter, found, operation)
            check_carried(adapter, found, operation)
        return cls._build(adapters, specs, capacity, max_rank, operation)

    @classmethod
    def random(
        cls,
        weights: Weights,
        num_adapters: int,
        r: int,
        *,
        targets: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        delta: float = 0.07,
        seed: int = 0,
    ) -> AdapterBank:
        """Random adapters for benchmarks, with |scaling B A| / |W| of about `delta`. targets: all 2-D Linear weights by default."""
        from fusedmerge.bank_io import random_adapters

        adapters = random_adapters(weights, num_adapters, r, targets, delta, seed)
        return cls.from_adapters(adapters, weights, device, dtype, operation="random")

    def save(self, path: PathLike) -> None:
        """Write the bank as one safetensors file (atomically: a reader sees the old file or the whole new one)."""
        from fusedmerge.bank_io import save_bank

        save_bank(self._targets, self._slots, self.cast_error, path)

    @classmethod
    def load(cls, path: PathLike, device: torch.device | str = "cpu") -> AdapterBank:
        """Read a bank that `save` wrote: same names, slots, factors and capacity, bit for bit."""
        from fusedmerge.bank_io import load_bank

        return cls(*load_bank(path, device))

    @classmethod
    def _build(
        cls, adapters: Sequence[Adapter], specs: Mapping[str, TargetSpec], capacity: int | None, max_rank: int, operation: str
    ) -> AdapterBank:
        if not adapters or not specs:
            raise InvalidValueError(operation, "adapters", "at least one adapter with at least one target", "an empty bank")
        names = [adapter.name for adapter in adapters]
        for name in names:
            if not isinstance(name, str) or not name:
                raise InvalidTypeError(operation, "names", "non-empty strings", repr(name))
            if names.count(name) > 1:
                raise InvalidValueError(operation, "names", "each adapter once", f'"{name}" {names.count(name)} times')
        capacity = len(adapters) if capacity is None else capacity
        for field, value, least in (("capacity", capacity, len(adapters)), ("max_rank", max_rank, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidValueError(operation, field, f"a whole number of at least {least}", repr(value))
        staged = [orient(adapter, specs, operation) for adapter in adapters]
        bank = cls(_allocate(specs, staged, capacity, max_rank, operation), [None] * capacity, {})
        for adapter, (factors, error) in zip(adapters, staged, strict=True):
            bank._write(bank._slots.index(None), adapter.name, factors, error)
        return bank

    def add(self, name: str, source: PathLike | Adapter | Mapping[str, tuple[torch.Tensor, torch.Tensor]], scaling: Any = None) -> int:
        """Put one more adapter into a free slot, and return the slot. No tensor of the bank moves.

        source: a PEFT directory, an `Adapter`, or {weight name: (a [r, in], b [out, r])} with `scaling` (a number, or by weight name).
        Raises InvalidValueError for a name that is taken or a bank that is full, UnknownNameError for targets that the bank lacks,
        ShapeError for a rank over the bank's. Targets that the adapter leaves out have rank 0.
        """
        if not isinstance(name, str) or not name or name in self._slots:
            raise InvalidValueError("add", "name", "a new, non-empty name", repr(name))
        if None not in self._slots:
            raise InvalidValueError(
                "add", f'adapter "{name}"', f"a free slot (build the bank with capacity={len(self._slots) + 1} or more)", "a full bank"
            )
        if isinstance(source, Mapping):
            if not source or not all(isinstance(p, (tuple, list)) and len(p) == 2 and hasattr(p[0], "dim") for p in source.values()):
                raise InvalidTypeError("add", f'adapter "{name}"', "{weight name: (a [r, in], b [out, r])}, not empty", repr(source)[:80])
            stacks = {target: (a[None], b[None]) for target, (a, b) in source.items()}
            scalings = {t: [s] for t, s in scaling.items()} if isinstance(scaling, Mapping) else scaling
            adapter = adapters_from_stacks(stacks, scalings, [name], "add")[0][0]
        elif isinstance(source, Adapter):
            adapter = source
        else:
            from fusedmerge.formats.peft import read_peft

            adapter = read_peft(source, name)
        if adapter.base_weights:
            carried = next(iter(adapter.base_weights))
            raise FormatError("add", f'adapter "{name}"', "factors only (base weights can be checked by from_peft)", carried)
        factors, error = orient(adapter, {n: t.spec for n, t in self._targets.items()}, "add")
        for target, pair in factors.items():
            room = int(self._targets[target].a.shape[1])
            if pair.rank > room:
                raise ShapeError("add", f'adapter "{name}" on {target}', f"rank at most {room} (see max_rank)", pair.rank)
        slot = self._slots.index(None)
        self._write(slot, name, factors, error)
        return slot

    def remove(self, name: str) -> None:
        """Free an adapter's slot. Raises StateError while a Switcher has it merged."""
        slot = self.slot(name, "remove")
        if any(slot in pinned for pinned in self._pins.values()):
            raise StateError("remove", f'adapter "{name}"', "an adapter that is not active (restore its Switcher first)", "an active one")
        for target in self._targets.values():
            target.note(slot, 0, 0.0)
            for tensor in (target.a, target.b):
                tensor[slot] = 0
        self._slots[slot] = None
        del self.cast_error[name]

    def _write(self, slot: int, name: str, factors: Mapping[str, Factors], error: float) -> None:
        for target, pair in factors.items():
            into = self._targets[target]
            into.a[slot, : pair.rank].copy_(pair.a)
            into.b[slot, :, : pair.rank].copy_(pair.b)
            into.note(slot, pair.rank, pair.scaling)
        self._slots[slot] = name
        self._largest.pop(slot, None)
        self.cast_error[name] = error

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in slot order."""
        return tuple(name for name in self._slots if name is not None)

    @property
    def slots(self) -> tuple[str | None, ...]:
        """The adapter in each slot; None where a slot is free. A slot number is what `ids` hold."""
        return tuple(self._slots)

    @property
    def targets(self) -> tuple[str, ...]:
        """The adapted weights' names."""
        return tuple(self._targets)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory, free slots and padding included."""
        return sum(target.nbytes for target in self._targets.values())

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"AdapterBank({len(self)} adapters in {len(self._slots)} slots, {len(self._targets)} targets, {self.nbytes / 2**20:.1f} MiB)"

    def target(self, name: str) -> BankTarget:
        """The stacked factors of one target. Raises UnknownNameError."""
        try:
            return self._targets[canonical_name(name)]
        except (KeyError, TypeError):
            raise UnknownNameError("bank", "target", f"one of {len(self._targets)} targets", f'"{name}"') from None

    def largest_scaling(self, slot: int) -> float:
        """The largest |scaling| of one adapter over its targets."""
        if slot not in self._largest:
            self._largest[slot] = max(abs(target.scalings[slot]) for target in self._targets.values())
        return self._largest[slot]

    def slot(self, name: str, operation: str = "bank") -> int:
        """The slot of an adapter. Raises UnknownNameError."""
        if name in self._slots and name is not None:
            return self._slots.index(name)
        close = difflib.get_close_matches(str(name), self.names, n=1)
        hint = f' (did you mean "{close[0]}"?)' if close else ""
        raise UnknownNameError(operation, "adapter", f"one of {', '.join(self.names) or 'none'}", f'"{name}"{hint}')

    def pinned(self, owner: object) -> frozenset[int]:
        """The slots that `owner` has merged."""
        return self._pins.get(owner, frozenset())

    def pin(self, owner: object, slots: frozenset[int]) -> None:
        """Note that `owner` has these slots merged somewhere: `remove` refuses them meanwhile."""
        self._pins[owner] = slots


def _allocate(
    specs: Mapping[str, TargetSpec], staged: Sequence[tuple[Mapping[str, Factors], float]], capacity: int, max_rank: int, operation: str
) -> dict[str, BankTarget]:
    """Zeroed storage for `capacity` adapters, after a check that it fits."""
    import torch

    padded = {}
    for name in specs:
        rank = max([max_rank, *(factors[name].rank for factors, _ in staged if name in factors)])
        padded[name] = -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE
    for device in {spec.device for spec in specs.values()}:
        total = sum(spec.nbytes(padded[spec.name], capacity) for spec in specs.values() if spec.device == device)
        require_memory(total, device, operation, f"bank of {capacity} x {len(specs)} targets")
    with torch.inference_mode(False):  # inference tensors could not be written later
        return {
            name: BankTarget(
                spec,
                torch.zeros(capacity, padded[name], spec.shape[1], dtype=spec.dtype, device=spec.device),
                torch.zeros(capacity, spec.shape[0], padded[name], dtype=spec.dtype, device=spec.device),
                torch.zeros(capacity, dtype=torch.float32, device=spec.device),
                [0] * capacity,
                [0.0] * capacity,
            )
            for name, spec in specs.items()
        }
