"""Switcher: put a gated mixture of a bank's adapters into a model's weights, and take it out again."""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fusedmerge.backend import DeviceSwitch, Engine, Segment, check_finite, choose, make_engine
from fusedmerge.bank import AdapterBank
from fusedmerge.errors import (
    BackendError,
    DeviceError,
    DtypeError,
    FusedMergeError,
    InvalidTypeError,
    InvalidValueError,
    ShapeError,
    StateError,
)
from fusedmerge.memory import require_memory
from fusedmerge.placement import Placement
from fusedmerge.pristine import Base, given_bases
from fusedmerge.selection import Mixture, Named, parse, selection_on
from fusedmerge.weights import Weight, Weights, check_writable, collect, overlap

if TYPE_CHECKING:
    import torch

    from fusedmerge.staging import BankTarget

__all__ = ["Switcher"]

_switchers: weakref.WeakSet[Switcher] = weakref.WeakSet()  # to refuse a switch on weights that another one has merged


class Switcher:
    """Sets which mixture of `bank`'s adapters is merged into `weights` (a model, or its tensors by name).

    mode "exact": live = round(base + sum gate * scaling * B A) from a pristine copy of every adapted weight, so that no switch leaves a
    trace and `restore()` gives the original bits. "inplace": no copy; the last mixture is subtracted as the new one is added, which
    rounds at every switch and drifts; an overflow in a 16-bit weight is then for good.

    Every target of the bank must be there: once, unquantised, in the bank's dtype (or with a float32 bank), on its device. Storage never
    moves. Writes are made under no_grad and bump version counters, so that a stale backward raises. Not thread-safe. A Switcher that is
    dropped without `restore` or `close` leaves its mixture in the weights.

    base (exact mode): {weight name: tensor} that hold the pristine values already, in place of a copy: in the weights' dtype; on a GPU also
    in float32, or as (float8_e4m3fn, float32 scale: one, one per row, or one per 128 x 128 block). Every value must round to the weight's
    own bits. They must stay as they are while the Switcher lives.

    check_finite: `check` also tells whether a weight holds NaN or infinity after a switch (on a GPU the kernel notes it as it writes).
    """

    def __init__(
        self,
        weights: Weights,
        bank: AdapterBank,
        mode: str = "exact",
        *,
        base: Mapping[str, Any] | None = None,
        check_finite: bool = False,
    ) -> None:
        import torch

        operation = "Switcher"
        if not isinstance(bank, AdapterBank):
            raise InvalidTypeError(operation, "bank", "an AdapterBank", type(bank).__name__)
        if mode not in ("exact", "inplace"):
            raise InvalidValueError(operation, "mode", '"exact" or "inplace"', repr(mode))
        if base is not None and mode != "exact":
            raise InvalidValueError(operation, "base", 'None in mode "inplace", which has none', type(base).__name__)
        found = collect(weights, operation)
        _warn_of_live_adapters(weights)
        live = check_writable({name: bank.target(name).spec.shape for name in bank.targets}, found, operation)
        _check_factors(bank, live, found, operation)
        device = next(iter(live.values())).device
        backend = choose(device, operation)
        self.mode = mode
        self.bank = bank
        self._check_finite = check_finite
        self._live = live
        self._placement = Placement(weights, {name: found[name] for name in live})
        self._check_unshared(operation)
        self._owns_base = base is None and mode == "exact"
        bases = given_bases(base, live, operation) if base is not None else {}
        if self._owns_base:
            require_memory(sum(t.nbytes for t in live.values()), device, operation, "the pristine copy of the adapted weights")
        with torch.inference_mode(False):  # inference tensors could not be written later
            if self._owns_base:
                bases = {name: Base(weight.clone()) for name, weight in live.items()}
            self._segments = [_segment(weight, bases.get(name), bank.target(name)) for name, weight in live.items()]
            self._engine: Engine | None = make_engine(backend, self._segments, check_finite)
        self._forced = False  # by `invalidate`: the next switch writes
        self._labels: dict[Mixture, Named] = {(): ()}
        _switchers.add(self)

    def switch(self, adapters: Any, gates: Any = None) -> None:
        """Set the mixture: {name: gate}, a name, names, or slot ids, with gates (1.0 each if None). Empty: the base.

        A repeated mixture changes nothing. Duplicates add; slot -1 is empty. Raises before anything is changed: UnknownNameError,
        InvalidTypeError, InvalidValueError, ShapeError, DtypeError, DeviceError, StateError. An interruption (KeyboardInterrupt) leaves
        a mixed state that `active` reports, and that the next `switch` or `restore` repairs.

        Ids (int32) and gates (float32), both on the weights' GPU, are read there, without a synchronisation: the call may be captured in a
        CUDA graph, whose replays read what the two tensors then hold (and bump no version counters). An id outside [-1, slots) or a gate
        that is not finite then leaves the weights as they are; `check` and `active` tell. No adapter can be removed from the bank until
        the next switch from the host, and none ever once a graph was captured.
        """
        selection = selection_on(next(iter(self._live.values())).device, adapters, gates, "switch")
        if selection is None:
            self._set(*parse(self.bank, adapters, gates, "switch"), "switch")
        else:
            self._set_on_device(*selection, "switch")

    def restore(self) -> None:
        """Take the mixture out. In exact mode: the original bits."""
        self._set((), (), "restore")

    @contextmanager
    def switched(self, adapters: Any, gates: Any = None) -> Iterator[Switcher]:
        """`switch` for the length of a with block; then the previous mixture again, also after an exception.

        Adapters of the previous mixture cannot be removed from the bank meanwhile.
        """
        before = self.active
        mixture = parse(self.bank, dict(before), None, "switched")[0]
        hold = _Hold()
        self.bank.pin(hold, frozenset(slot for slot, _ in mixture))
        try:
            self.switch(adapters, gates)
            yield self
        finally:
            if self._engine is not None:
                self._set(mixture, before, "switched")

    @property
    def active(self) -> Named:
        """The mixture that is merged: (("math", 0.7), ...), or (). Raises StateError after an interrupted switch, and what `check` would
        tell of a selection that was read on the device."""
        engine = self._open("active")
        if isinstance(engine, DeviceSwitch) and engine.unchecked:
            engine.check()
        if engine.mixture is None:
            raise StateError("active", "weights", "one mixture", "a switch that was interrupted; call switch() or restore() to repair it")
        return self._label(engine.mixture)

    def check(self) -> None:
        """Raise whatever is wrong with the present state: an interrupted switch, weights that were moved, a closed Switcher; and, once,
        what the device found: InvalidValueError for ids, gates or (with check_finite) weights. Waits for the device."""
        engine = self._open("check")
        self._placement.check("check")
        if isinstance(engine, DeviceSwitch):
            engine.check()
        elif self._check_finite:
            check_finite(self._segments)
        _ = self.active

    def invalidate(self) -> None:
        """Make the next `switch` write every weight even if its mixture is the present one (after outside edits that it shall undo).

        In inplace mode there is no copy to write from, and this changes nothing.
        """
        self._open("invalidate").invalidate()
        self._forced = self.mode == "exact"

    def refresh(self) -> None:
        """Take the weights as they are now, with whatever was edited from outside, as the new base. Only while nothing is merged, and not
        with a base that was given."""
        if self.mode == "exact" and not self._owns_base:
            raise StateError("refresh", "base", "the Switcher's own copy", "one that was given; build a new Switcher")
        if self.active:
            raise StateError("refresh", "mixture", "none (restore() first; then edit, then refresh())", self.active)
        self._placement.check("refresh")
        self._check_unshared("refresh")
        for segment in self._segments:
            if segment.base is not None:
                segment.base.copy_(segment.live)

    def close(self) -> None:
        """Restore, and free the pristine copy. Further calls raise StateError; a second `close` does nothing.

        If the weights were moved, there is nothing to restore: everything is freed all the same, and StateError raised, once.
        """
        if self._engine is None:
            return
        try:
            self._placement.check("close")
        except StateError:
            self._free()
            raise
        self.restore()
        self._free()

    def _free(self) -> None:
        self._engine = None
        self._segments = []
        self.bank.pin(self, frozenset())
        _switchers.discard(self)

    @property
    def nbytes(self) -> int:
        """Bytes held beside the model and the bank: the pristine copy."""
        return sum(s.base.nbytes for s in self._segments if s.base is not None) if self._owns_base else 0

    def __repr__(self) -> str:
        held = () if self._engine is None else self._engine.mixture
        state = "closed" if self._engine is None else "interrupted" if held is None else f"active={self._label(held)}"
        return f"Switcher({len(self._live)} targets, mode={self.mode!r}, {state})"

    # ------------------------------------------------------------------ steps

    def _set(self, mixture: Mixture, named: Named, operation: str) -> None:
        """check -> label -> apply."""
        engine = self._open(operation)
        self._placement.check(operation)
        held = engine.mixture
        if operation == "switch" or mixture != held or self._forced:
            self._check_unshared(operation)
        kept = {} if held is None else {held: self._label(held)}
        self._labels = {(): (), **kept, mixture: named}
        pinned = self.bank.pinned(self)
        self.bank.pin(self, pinned | {slot for slot, _ in mixture})
        try:
            engine.apply(mixture)
        except FusedMergeError:
            if engine.mixture == held:  # refused before anything was changed
                self.bank.pin(self, pinned)
            raise
        self._forced = False
        if not (isinstance(engine, DeviceSwitch) and engine.is_captured):
            self.bank.pin(self, frozenset(slot for slot, _ in mixture))

    def _set_on_device(self, ids: torch.Tensor, gates: torch.Tensor, operation: str) -> None:
        """check -> apply, without knowing what the tensors hold."""
        engine = self._open(operation)
        if not isinstance(engine, DeviceSwitch):
            raise BackendError(operation, "backend", "one that reads ids and gates on the device", type(engine).__name__)
        self._placement.check(operation)
        self._check_unshared(operation)
        self.bank.pin(self, frozenset(slot for slot, name in enumerate(self.bank.slots) if name is not None))
        engine.apply_selection(ids, gates)
        self._forced = False

    def _label(self, mixture: Mixture) -> Named:
        """The mixture as it was given; one that came from the device, by its slots."""
        return self._labels.get(mixture) or tuple((str(self.bank.slots[slot]), gate) for slot, gate in mixture)

    def _open(self, operation: str) -> Engine:
        if self._engine is None:
            raise StateError(operation, "Switcher", "an open one", "a closed one")
        return self._engine

    def _check_unshared(self, operation: str) -> None:
        for other in list(_switchers):
            engine = other._engine
            waits = isinstance(engine, DeviceSwitch) and engine.is_pending  # to be asked last: a capture, or a call that is not to wait
            if other is self or engine is None or (not waits and engine.mixture == ()):
                continue
            theirs = defaultdict(list)
            for tensor in other._live.values():
                theirs[tensor.untyped_storage().data_ptr()].append(tensor)
            for name, live in self._live.items():
                shared = any(overlap(live, tensor) for tensor in theirs[live.untyped_storage().data_ptr()])
                if shared and engine.mixture != ():
                    raise StateError(operation, name, "weights that no other Switcher has merged", f"weights shared with {other!r}")


def _segment(live: torch.Tensor, base: Base | None, factors: BankTarget) -> Segment:
    return Segment(live, None, factors) if base is None else Segment(live, base.tensor, factors, base.scale)


def _warn_of_live_adapters(weights: Weights) -> None:
    """PEFT layers that are switched on add their own active adapters to whatever is merged into their base weights."""
    modules = weights.modules() if hasattr(weights, "modules") else ()
    if any(hasattr(m, "lora_A") and not getattr(m, "disable_adapters", True) and getattr(m, "active_adapters", ()) for m in modules):
        warnings.warn(
            "Switcher: the model's own PEFT adapters are active and add to the mixture; disable_adapter_layers() first", stacklevel=3
        )


class _Hold:
    """Owner of a `switched` block's pins, which go with it when the block's frame does."""


def _check_factors(bank: AdapterBank, live: dict[str, torch.Tensor], found: dict[str, Weight], operation: str) -> None:
    """Factors have the weight's dtype, or float32, its device, and its orientation."""
    import torch

    for name, tensor in live.items():
        spec = bank.target(name).spec
        if spec.device != tensor.device:
            raise DeviceError(operation, name, f"a weight on the bank's device ({spec.device})", tensor.device)
        if None not in (found[name].transposed, spec.transposed) and found[name].transposed != spec.transposed:
            expected = "factors oriented for a weight stored as [in, out]" if found[name].transposed else "factors for [out, in]"
            raise ShapeError(operation, name, f"{expected} (build the bank with this model as `weights`)", "the other orientation")
        if spec.dtype not in (tensor.dtype, torch.float32):
            raise DtypeError(operation, name, f"a bank in the weight's dtype ({tensor.dtype}) or in float32", spec.dtype)
        if tensor.device != next(iter(live.values())).device:
            raise DeviceError(operation, name, "all targets on one device", f"{tensor.device} beside {next(iter(live.values())).device}")
        if tensor.is_inference():
            raise StateError(operation, name, "a tensor with a version counter", "one made under torch.inference_mode()")
