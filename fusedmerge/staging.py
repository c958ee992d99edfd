"""From adapters as they were read to factors as a bank stores them: checked, oriented, cast. Nothing here writes into a bank."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fusedmerge.checks import as_tensor, shorten, to_float32, usable_device
from fusedmerge.errors import DeviceError, DtypeError, FormatError, InvalidTypeError, InvalidValueError, ShapeError, UnknownNameError
from fusedmerge.formats.lora import Adapter, Factors
from fusedmerge.weights import Weight, canonical_name

if TYPE_CHECKING:
    import torch

__all__ = [
    "RANK_MULTIPLE",
    "BankTarget",
    "TargetSpec",
    "adapters_from_stacks",
    "check_carried",
    "check_complete",
    "orient",
    "orient_specs",
    "specs_from_weights",
]

RANK_MULTIPLE = 16  # one k16 step of mma.sync
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetSpec:
    """One adapted weight, as a bank sees it."""

    name: str
    shape: tuple[int, int]  # [rows, cols] as stored
    dtype: torch.dtype  # of the factors
    device: torch.device
    transposed: bool | None = None  # the weight is stored as [in, out]; None: not known

    def nbytes(self, padded_rank: int, capacity: int) -> int:
        """Bytes of one target's stacked factors, scalings and ranks."""
        return capacity * (padded_rank * sum(self.shape) * self.dtype.itemsize + 8)


@dataclass
class BankTarget:
    """All adapters' factors on one target, oriented as the weight is stored: delta[rows, cols] = scaling[n] * b[n] @ a[n]."""

    spec: TargetSpec
    a: torch.Tensor  # [capacity, R, cols]
    b: torch.Tensor  # [capacity, rows, R]
    scaling: torch.Tensor  # [capacity] float32
    ranks: list[int]  # [capacity], on the host; 0: the adapter in this slot (if any) does not adapt this target
    scalings: list[float]  # [capacity], on the host: what `scaling` holds
    device_ranks: torch.Tensor = field(init=False)  # [capacity] int32: what `ranks` holds, for kernels

    def __post_init__(self) -> None:
        import torch

        self.device_ranks = torch.tensor(self.ranks, dtype=torch.int32, device=self.a.device)

    def note(self, slot: int, rank: int, scaling: float) -> None:
        """Set one slot's rank and scaling, on the host and on the device."""
        self.scaling[slot] = scaling
        self.device_ranks[slot] = rank
        self.scalings[slot] = float(self.scaling[slot])
        self.ranks[slot] = rank

    @property
    def nbytes(self) -> int:
        return int(self.a.nbytes + self.b.nbytes + self.scaling.nbytes + self.device_ranks.nbytes)


def specs_from_weights(
    adapters: Sequence[Adapter], found: Mapping[str, Weight], device: torch.device | str | None, dtype: torch.dtype | None, operation: str
) -> dict[str, TargetSpec]:
    """The targets of all adapters, in the model's order. Raises UnknownNameError, listing targets that the model lacks."""
    import torch

    if dtype not in (None, torch.bfloat16, torch.float16, torch.float32):
        raise DtypeError(operation, "dtype", "bfloat16, float16, float32 or None", dtype)
    adapted = {target for adapter in adapters for target in adapter.targets}
    missing = adapted - found.keys()
    if missing:
        raise UnknownNameError(operation, "targets", "weights that the model has", f"no {shorten(missing)}")
    specs = {}
    for name, weight in found.items():
        if name not in adapted:
            continue
        tensor = weight.tensor
        if weight.quantised or tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            kind = weight.quantised or str(tensor.dtype)
            raise DtypeError(operation, name, "a bfloat16, float16 or float32 weight (merge into the unquantised base)", kind)
        if tensor.device.type == "meta" and device is None:
            raise DeviceError(operation, name, "a weight with storage (load or materialise the model first)", "device meta")
        if tensor.dim() != 2:
            raise ShapeError(operation, name, "a matrix", f"shape {list(tensor.shape)}")
        where = tensor.device if device is None else usable_device(device, operation)
        specs[name] = TargetSpec(name, (tensor.shape[0], tensor.shape[1]), dtype or tensor.dtype, where, weight.transposed)
    return specs


def orient_specs(specs: Mapping[str, TargetSpec], found: Mapping[str, Weight], operation: str) -> dict[str, TargetSpec]:
    """Specs with the shapes and layouts of a model's own weights. Raises UnknownNameError for targets that the model lacks."""
    missing = specs.keys() - found.keys()
    if missing:
        raise UnknownNameError(operation, "targets", "weights that the model has", f"no {shorten(missing)}")
    for name in specs:
        if found[name].tensor.dim() != 2:
            raise ShapeError(operation, name, "a matrix", f"shape {list(found[name].tensor.shape)}")
    return {
        name: replace(spec, shape=(found[name].tensor.shape[0], found[name].tensor.shape[1]), transposed=found[name].transposed)
        for name, spec in specs.items()
    }


def check_complete(adapter: Adapter, found: Iterable[str], operation: str) -> None:
    """A target module that the adapter's configuration lists and the model has, but that no tensor adapts, means a file with parts missing.

    `found` are the model's weights by name. Entries that the model has no module for are no fault: PEFT ignores them.
    """
    found = list(found)
    listed = adapter.config.get("target_modules")
    if (
        not isinstance(listed, (list, tuple, set))
        or adapter.config.get("exclude_modules")
        or adapter.config.get("layers_to_transform") is not None
    ):
        return  # a regular expression, or a list whose entries may rightly match nothing
    for entry in listed:
        ending = f".{entry}.weight"
        if any(f".{name}".endswith(ending) for name in found) and not any(f".{name}".endswith(ending) for name in adapter.targets):
            raise FormatError(operation, f'adapter "{adapter.name}": target_modules', f"factors for the entry {entry!r}", "none")


def check_carried(adapter: Adapter, found: Mapping[str, Weight], operation: str) -> None:
    """Base weights that an adapter's file carries must equal the model's, bit for bit: they would be lost otherwise."""
    import torch

    for name, carried in adapter.base_weights.items():
        field = f'adapter "{adapter.name}": {name}'
        if name not in found:
            raise FormatError(operation, field, "a base weight that the model has", "none of that name")
        base = found[name].tensor.detach()
        if base.dtype != carried.dtype or base.shape != carried.shape or not torch.equal(_bits(base.cpu()), _bits(carried.cpu())):
            raise FormatError(operation, field, "the bits of the model's own weight", "another (the adapter's file changes the base)")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.reshape(-1).contiguous().view(torch.uint8)


def orient(adapter: Adapter, specs: Mapping[str, TargetSpec], operation: str) -> tuple[dict[str, Factors], float]:
    """The adapter's factors as the bank stores them, and how much casting changed them.

    That is sqrt(e_a^2 + e_b^2) with e = ||cast - given|| / ||given|| over all A and over all B: about how much it changed the deltas.

    Raises UnknownNameError, ShapeError, and FormatError for factors that are not finite, or not after the cast.
    """
    import torch

    staged = {}
    lost, total = {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}
    for target, given in adapter.targets.items():
        field = f'adapter "{adapter.name}" on {target}'
        if target not in specs:
            raise UnknownNameError(operation, field, f"one of the bank's {len(specs)} targets", "another")
        spec = specs[target]
        factors = given.oriented(spec.shape, spec.transposed, operation, field)
        if not math.isfinite(to_float32(factors.scaling)):
            raise FormatError(operation, f"{field}: scaling", "a finite float32", factors.scaling)
        cast = []
        for label, tensor in (("a", factors.a), ("b", factors.b)):
            narrow = tensor.detach().to(device=spec.device, dtype=spec.dtype)
            if not bool(torch.isfinite(narrow).all()):
                raise FormatError(operation, f"{field}: {label}", f"factors that are finite in {spec.dtype}", "inf or NaN")
            if narrow.dtype != tensor.dtype:
                wide = tensor.detach().to(device=spec.device, dtype=torch.float64)
                lost[label] += float((narrow.double() - wide).square().sum())
                total[label] += float(wide.square().sum())
            cast.append(narrow)
        staged[target] = Factors(cast[0], cast[1], factors.scaling)
    error = math.sqrt(sum(lost[label] / total[label] for label in lost if total[label]))
    if error:
        logger.info("%s: adapter %s: narrowing its factors changed its deltas by about %.1e", operation, adapter.name, error)
    return staged, error


def adapters_from_stacks(
    tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], scaling: Any, names: Sequence[str] | None, operation: str = "from_tensors"
) -> tuple[list[Adapter], dict[str, TargetSpec]]:
    """Stacked factors {weight name: (a [N, r, in], b [N, out, r])} as adapters, and the targets they imply."""
    import torch

    if not isinstance(tensors, Mapping):
        raise InvalidTypeError(operation, "tensors", "{weight name: (a, b)}", type(tensors).__name__)
    specs: dict[str, TargetSpec] = {}
    per_adapter: list[dict[str, Factors]] | None = None
    for raw, pair in tensors.items():
        if not isinstance(raw, str):
            raise InvalidTypeError(operation, "tensors", "weight names (str)", repr(raw))
        name = canonical_name(raw)
        if name in specs:
            raise InvalidValueError(operation, raw, "each target once", f'a second "{name}"')
        given = [as_tensor(t) for t in pair] if isinstance(pair, (tuple, list)) else []
        if len(given) != 2 or not all(isinstance(t, torch.Tensor) for t in given):
            raise InvalidTypeError(operation, raw, "a pair of tensors (a, b)", type(pair).__name__)
        a, b = given
        if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0] or a.shape[1] != b.shape[2]:
            raise ShapeError(operation, raw, "a [N, r, in] and b [N, out, r]", f"a {list(a.shape)} and b {list(b.shape)}")
        if a.dtype != b.dtype or a.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise DtypeError(operation, raw, "a and b both bfloat16, float16 or float32", f"{a.dtype} and {b.dtype}")
        if a.layout is not torch.strided or b.layout is not torch.strided:
            raise ShapeError(operation, raw, "dense tensors", f"{a.layout} and {b.layout}")
        if a.device != b.device or a.device.type == "meta":
            raise DeviceError(operation, raw, "a and b on one device, with storage", f"{a.device} and {b.device}")
        if per_adapter is None:
            per_adapter = [{} for _ in range(a.shape[0])]
        if len(per_adapter) != a.shape[0]:
            raise ShapeError(operation, raw, f"{len(per_adapter)} adapters, as the other targets have", int(a.shape[0]))
        specs[name] = TargetSpec(name, (b.shape[1], a.shape[2]), a.dtype, a.device, transposed=False)
        scales = _scalings(scaling, raw, name, int(a.shape[0]), operation)
        for index, factors in enumerate(per_adapter):
            factors[name] = Factors(a[index], b[index], scales[index])
    per_adapter = per_adapter or []
    if names is not None and (isinstance(names, str) or not isinstance(names, Sequence)):
        raise InvalidTypeError(operation, "names", "a sequence of str", repr(names))
    names = [str(index) for index in range(len(per_adapter))] if names is None else list(names)
    if len(names) != len(per_adapter):
        raise InvalidValueError(operation, "names", f"{len(per_adapter)} names", len(names))
    return [Adapter(name, factors) for name, factors in zip(names, per_adapter, strict=True)], specs


def _scalings(scaling: Any, raw: str, name: str, count: int, operation: str) -> list[float]:
    """The `count` scalings of one target, from a number, a sequence or tensor [N], or a mapping of those."""
    if isinstance(scaling, Mapping):
        by_name = {canonical_name(str(key)): value for key, value in scaling.items()}
        if name not in by_name:
            raise UnknownNameError(operation, "scaling", f"an entry for {raw}", "none")
        scaling = by_name[name]
    if getattr(getattr(scaling, "device", None), "type", "") == "meta":
        raise DeviceError(operation, f"scaling of {raw}", "a tensor with storage", "device meta")
    values = scaling.tolist() if hasattr(scaling, "tolist") else scaling
    if isinstance(values, (int, float)) and not isinstance(values, bool):
        return [to_float32(values)] * count
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(isinstance(v, (int, float)) for v in values):
        raise InvalidTypeError(operation, f"scaling of {raw}", "a number, or a number per adapter", repr(scaling))
    if len(values) != count:
        raise ShapeError(operation, f"scaling of {raw}", f"[{count}]", [len(values)])
    return [to_float32(v) for v in values]
