"""The switch by the CUDA kernel: everything but how a launch is planned and made (subclasses: jit, aot, and the simulator).

Targets are grouped by the dtypes of weight, base and factors; a group is one table of segments, one plan and one launch. Table, ranks and
state are torch tensors on the weights' device; ids and gates go there at each switch, or are there already (`apply_selection`).

State. A group's last selection lives on the device: the kernel writes it after its last store to a weight. So after an interruption
anywhere (KeyboardInterrupt between two launches, or before the host noted what it had launched), and after a selection that only the
device has seen, the device tells what the weights hold; a launch that finds its mixture there already returns at once. Version counters
are bumped before the launch: no write goes without.
"""

from __future__ import annotations

import ctypes
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fusedmerge.backend.cpu import Segment, check_finite
from fusedmerge.backend.params import (
    BAD_GATE,
    BAD_ID,
    BF16,
    FLOAT32,
    FP8,
    FP16,
    MAX_SLOTS,
    NON_FINITE,
    PlanRequest,
    PlanResult,
    SwitchParams,
    SwitchSegment,
    SwitchState,
)
from fusedmerge.errors import BackendError, FusedMergeError, InvalidValueError, StateError
from fusedmerge.selection import Mixture

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceSwitch", "Group", "Numbers"]

Numbers = tuple[int, int, int]  # the dtypes of weight, base and factors
_SINGLE_SCALE = 31  # log2 of rows (or columns) per scale: one for all
_FLAGS = {
    BAD_ID: ("ids", "-1 (empty) or a slot of the bank", "another id, found on the device"),
    BAD_GATE: ("gates", "finite values", "another value or sum, found on the device"),
}


def _number(dtype: torch.dtype) -> int:
    return {"torch.bfloat16": BF16, "torch.float16": FP16, "torch.float32": FLOAT32, "torch.float8_e4m3fn": FP8}[str(dtype)]


def _numbers(segment: Segment) -> Numbers:
    source = segment.live if segment.base is None else segment.base
    return _number(segment.live.dtype), _number(source.dtype), _number(segment.factors.a.dtype)


class Group:
    """Segments of the same dtypes: what one launch switches, and what it leaves on the device."""

    def __init__(self, numbers: Numbers, segments: Sequence[Segment], report_non_finite: bool) -> None:
        import torch

        device = segments[0].live.device
        self.numbers = numbers
        self.segments = list(segments)
        self.live = [segment.live for segment in segments]
        self.num_adapters = len(segments[0].factors.ranks)
        self.inplace = segments[0].base is None
        self.report_non_finite = report_non_finite
        self.plan = PlanResult()
        self.lost = False  # a launch failed: what the weights hold is not known
        self._state = torch.zeros(ctypes.sizeof(SwitchState), dtype=torch.uint8, device=device)
        self._table: torch.Tensor | None = None  # bytes of SwitchSegment [S], after `place`

    def describe(self) -> ctypes.Array[SwitchSegment]:
        """The segments' table, for the planner to complete."""
        return (SwitchSegment * len(self.segments))(*map(_describe, self.segments))

    def place(self, table: ctypes.Array[SwitchSegment]) -> None:
        """Put the planned table on the device."""
        import torch

        self._table = torch.frombuffer(bytearray(table), dtype=torch.uint8).to(self._state.device, copy=True)

    def params(self, ids: torch.Tensor, gates: torch.Tensor) -> SwitchParams:
        """The argument of a launch. ids int32 [k] and gates float32 [k] on the device must outlive it."""
        assert self._table is not None
        return SwitchParams(
            segments=self._table.data_ptr(),
            state=self._state.data_ptr(),
            ids=ids.data_ptr(),
            gates=gates.data_ptr(),
            num_units=self.plan.num_units,
            num_segments=len(self.segments),
            num_slots=len(ids),
            num_adapters=self.num_adapters,
            inplace=self.inplace,
            check_finite=self.report_non_finite,
            resident_chunks=self.plan.resident_chunks,
        )

    def state(self) -> SwitchState:
        """A copy of the device's state; waits for it."""
        return SwitchState.from_buffer_copy(self._state.cpu().numpy().tobytes())

    def mixture(self) -> Mixture | None:
        """What the device says the weights hold; None after a launch that failed."""
        state = self.state()
        return None if self.lost else tuple((state.last_ids[i], state.last_gates[i]) for i in range(state.num_last))

    def force(self) -> None:
        """Make the next launch write, whatever the last one did."""
        self._clear("valid")

    def take_status(self) -> int:
        """The flags that the device has set; clears them."""
        status = int(self.state().status)
        if status:
            self._clear("status")
        return status

    def lose(self) -> None:
        """After a launch that failed: forget the last selection, so that the next one writes everything."""
        self.lost = True
        self._state.zero_()

    def _clear(self, field: str) -> None:
        where = getattr(SwitchState, field)
        self._state[where.offset : where.offset + where.size] = 0


def _describe(segment: Segment) -> SwitchSegment:
    live, factors, scale = segment.live, segment.factors, segment.scale
    source = live if segment.base is None else segment.base
    return SwitchSegment(
        live=live.data_ptr(),
        source=source.data_ptr(),
        a=factors.a.data_ptr(),
        b=factors.b.data_ptr(),
        scaling=factors.scaling.data_ptr(),
        ranks=factors.device_ranks.data_ptr(),
        live_stride=live.stride(0),
        source_stride=source.stride(0),
        a_adapter_stride=factors.a.stride(0),
        a_row_stride=factors.a.stride(1),
        b_adapter_stride=factors.b.stride(0),
        b_row_stride=factors.b.stride(1),
        rows=live.shape[0],
        cols=live.shape[1],
        rank=factors.a.shape[1],
        source_scale=scale.values.data_ptr() if scale else None,
        scale_stride=scale.values.stride(0) if scale else 0,
        scale_row_shift=scale.row_shift if scale else _SINGLE_SCALE,
        scale_col_shift=scale.col_shift if scale else _SINGLE_SCALE,
    )


class DeviceSwitch(ABC):
    """One Switcher's engine. `mixture` is None while groups differ (an interrupted `apply`), and after a launch that failed.

    report_non_finite: `check` tells whether a switch has left NaN or infinity in a weight.

    Raises InvalidValueError for what the planner refuses, and in `apply`, before anything is changed, for more than MAX_SLOTS experts.
    """

    def __init__(self, segments: Sequence[Segment], report_non_finite: bool, num_multiprocessors: int, shared_bytes_limit: int) -> None:
        import torch

        grouped: dict[Numbers, list[Segment]] = {}
        for segment in segments:
            grouped.setdefault(_numbers(segment), []).append(segment)
        self.device = segments[0].live.device if segments else torch.device("cpu")
        self._groups = [Group(numbers, members, report_non_finite) for numbers, members in grouped.items()]
        for group in self._groups:
            table = group.describe()
            sizes = len(group.segments), group.num_adapters, MAX_SLOTS, num_multiprocessors, shared_bytes_limit
            request = PlanRequest(*group.numbers, group.inplace, *sizes)
            if not self.plan(request, table, group.plan):
                raise _refusal(group.plan.error.decode(), group)
            group.place(table)
            self.prepare(group)
        self._staged = torch.zeros(2, MAX_SLOTS, dtype=torch.int32, device="cpu")  # ids; gates, as bits
        self._selection = torch.zeros_like(self._staged, device=self.device)
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # selections whose addresses are in captured graphs
        self._held: Mixture | None = ()
        self._pending = False  # the device alone knows what the weights hold
        self._forced = False
        self._unchecked = False  # the device may have raised a flag

    @abstractmethod
    def plan(self, request: PlanRequest, table: ctypes.Array[SwitchSegment], result: PlanResult) -> bool:
        """Call the planner (cuda/src/plan.h)."""

    def prepare(self, group: Group) -> None:  # noqa: B027 (nothing to do by default)
        """Load what a launch of the group's plan needs."""

    @abstractmethod
    def launch(self, group: Group, params: SwitchParams) -> None:
        """Run the kernel for group.numbers on group.plan's grid, on torch's current stream. Raises BackendError."""

    def is_capturing(self) -> bool:
        """Whether launches are being recorded into a CUDA graph."""
        return False

    @property
    def mixture(self) -> Mixture | None:
        """What the weights hold. Waits for the device after an interruption, and where a selection came from the device."""
        if self._pending:
            self._settle()
        return self._held

    @property
    def is_pending(self) -> bool:
        """Whether `mixture` would wait for the device."""
        return self._pending

    def apply(self, mixture: Mixture) -> None:
        """Set every segment to `mixture`. An interruption leaves a state that the next call repairs."""
        import torch

        if mixture == self.mixture and not self._forced:
            return
        _check_count(len(mixture))
        if self.is_capturing():
            raise StateError("switch", "adapters", "ids and gates on the GPU while a CUDA graph is captured", "values on the host")
        count = len(mixture)
        staged = self._staged.numpy()
        staged[0, :count] = [slot for slot, _ in mixture]
        staged[1].view("float32")[:count] = [gate for _, gate in mixture]
        self._selection.copy_(self._staged, non_blocking=True)  # from pageable memory: read before the call returns
        self._launch_all(self._selection[0, :count], self._selection[1].view(torch.float32)[:count])
        self._held, self._pending, self._forced = mixture, self.is_captured, False

    def apply_selection(self, ids: torch.Tensor, gates: torch.Tensor) -> None:
        """Set every segment to ids int32 [k] (-1: empty) with gates float32 [k], contiguous, on the device; no synchronisation.

        May be captured in a CUDA graph; a replay reads the values that the two tensors then hold. What cannot be is reported by `check`.
        """
        _check_count(len(ids))
        if self.is_capturing():
            self._kept.append((ids, gates))  # a replay may come at any time from now on
        self._unchecked = True
        self._launch_all(ids, gates)
        self._forced = False

    def invalidate(self) -> None:
        """Write everything at the next `apply`. In inplace mode there is nothing to write from, and this does nothing."""
        if not self._groups[0].inplace:
            for group in self._groups:
                group.force()
            self._forced = True

    @property
    def is_captured(self) -> bool:
        """Whether a CUDA graph may switch these weights at any time."""
        return bool(self._kept)

    @property
    def unchecked(self) -> bool:
        """Whether `check` may have something to report."""
        return self._unchecked

    def check(self) -> None:
        """Wait for the device, and raise what it has reported since the last check."""
        status = 0
        for group in self._groups:
            status |= group.take_status()
        self._unchecked = self.is_captured
        if not status:
            return
        if status == NON_FINITE:
            check_finite(segment for group in self._groups for segment in group.segments)
            raise InvalidValueError("switch", "weights", "finite values after every switch", "NaN or infinity, overwritten since")
        self._settle()
        raise InvalidValueError("switch", *_FLAGS[status & -status])

    def _launch_all(self, ids: torch.Tensor, gates: torch.Tensor) -> None:
        lost = [group.segments[0].factors.spec.name for group in self._groups if group.lost and group.inplace]
        if lost:
            raise StateError("switch", lost[0], "weights that hold a known mixture", "a launch that failed in place; load them again")
        self._pending = True
        for group in self._groups:
            self._unchecked |= group.report_non_finite
            self._launch_group(group, ids, gates)

    def _launch_group(self, group: Group, ids: torch.Tensor, gates: torch.Tensor) -> None:
        import torch

        torch.autograd.graph.increment_version(group.live)
        try:
            self.launch(group, group.params(ids, gates))
        except BackendError:
            group.lose()
            raise
        group.lost = False

    def _settle(self) -> None:
        held = {group.mixture() for group in self._groups}
        self._held = held.pop() if len(held) == 1 else None
        self._pending = self.is_captured


def _check_count(num_slots: int) -> None:
    if num_slots > MAX_SLOTS:
        raise InvalidValueError("switch", "adapters", f"at most {MAX_SLOTS} in one mixture (on this backend)", num_slots)


def _refusal(text: str, group: Group) -> FusedMergeError:
    """The planner's "operation: field: expected ..., got ..." as an error, with the segment's name for its number."""
    named = re.sub(r"segment (\d+)", lambda number: group.segments[int(number[1])].factors.spec.name, text)
    parts: Any = re.fullmatch(r"(\w+): (.*?): expected (.*), got (.*)", named)
    return InvalidValueError(*parts.groups()) if parts else BackendError("switch", "plan", "one that the planner accepts", named)
