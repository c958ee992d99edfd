"""`fusedmerge inspect`: what an adapter holds, how large it is beside a base, and what 16-bit rounding would take from it.

Lost to rounding: the share of a base's adapted elements where the adapter wants a change (delta != 0) and the merged weight, rounded
once to the base's 16-bit dtype, still has the base's own bits. (A float32 base loses nothing to speak of as it is; it is judged as if both it
and the merged weight were stored in bfloat16.)
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from fusedmerge.errors import FormatError, MissingFileError, UnknownNameError
from fusedmerge.tables import percent, text_table
from fusedmerge.weights import canonical_name

if TYPE_CHECKING:
    import torch

    from fusedmerge.formats.lora import Adapter, Factors

__all__ = ["Group", "Inspection", "inspect_adapter", "render"]

PathLike = Union[str, "os.PathLike[str]"]


@dataclass
class Group:
    """All targets that share their last name part, as q_proj in every layer. Norms are Frobenius norms over the whole group."""

    name: str
    num_targets: int = 0
    ranks: list[int] = field(default_factory=list)  # distinct, ascending
    scalings: list[float] = field(default_factory=list)  # distinct, ascending
    num_parameters: int = 0  # of the factors
    delta_norm: float = 0.0  # ||scaling B A||
    base_norm: float | None = None  # ||W||
    num_elements: int = 0  # of the base
    num_lost: int | None = None  # elements with delta != 0 whose bits the merge leaves as they were

    @property
    def ratio(self) -> float | None:
        """|delta| / |W|."""
        return self.delta_norm / self.base_norm if self.base_norm else None

    @property
    def lost(self) -> float | None:
        """The share of elements lost to rounding."""
        return self.num_lost / self.num_elements if self.num_lost is not None and self.num_elements else None


@dataclass
class Inspection:
    """One adapter, judged."""

    name: str
    directory: str
    nbytes: int  # of the factors as stored on disk
    dtypes: list[str]
    config: dict[str, Any]
    groups: list[Group]
    base: str | None = None
    rounding: str | None = None  # the dtype that rounding was judged in

    @property
    def total(self) -> Group:
        """All groups as one."""
        whole = Group("all", sum(g.num_targets for g in self.groups))
        whole.ranks = sorted({r for g in self.groups for r in g.ranks})
        whole.scalings = sorted({s for g in self.groups for s in g.scalings})
        whole.num_parameters = sum(g.num_parameters for g in self.groups)
        whole.num_elements = sum(g.num_elements for g in self.groups)
        whole.delta_norm = math.hypot(*(g.delta_norm for g in self.groups))
        if self.base is not None:
            whole.base_norm = math.hypot(*(g.base_norm or 0.0 for g in self.groups))
            whole.num_lost = sum(g.num_lost or 0 for g in self.groups)
        return whole

    def to_json(self) -> dict[str, Any]:
        """Plain data, the derived shares included."""

        def derived(group: Group) -> dict[str, Any]:
            return {**asdict(group), "delta_over_base": group.ratio, "lost_to_rounding": group.lost}

        plain = {name: getattr(self, name) for name in ("name", "directory", "nbytes", "dtypes", "config", "base", "rounding")}
        return {**plain, "groups": [derived(g) for g in self.groups], "total": derived(self.total)}


def inspect_adapter(directory: PathLike, base: PathLike | None = None) -> Inspection:
    """Judge a PEFT adapter directory, against a base checkpoint directory (safetensors, read one tensor at a time) if one is given.

    Raises FormatError with the reason for an adapter that would merge silently wrong, MissingFileError, and UnknownNameError for targets
    that the base lacks.
    """
    from fusedmerge.formats.peft import read_peft

    adapter = read_peft(directory)
    groups = _groups(adapter)
    rounding = _judge(adapter, Path(base), groups) if base is not None else None
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for f in adapter.targets.values() for t in (f.a, f.b)})
    config = {key: _plain(value) for key, value in adapter.config.items()}
    return Inspection(
        adapter.name, str(directory), adapter.nbytes, dtypes, config, list(groups.values()), None if base is None else str(base), rounding
    )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def _group_name(target: str) -> str:
    parts = target.removesuffix(".weight").split(".")
    named = [part for part in parts if not part.isdigit()]
    return named[-1] if named else target


def _groups(adapter: Adapter) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    squares: dict[str, float] = defaultdict(float)
    for target, factors in adapter.targets.items():
        name = _group_name(target)
        group = groups.setdefault(name, Group(name))
        group.num_targets += 1
        group.ranks = sorted({*group.ranks, factors.rank})
        group.scalings = sorted({*group.scalings, factors.scaling})
        group.num_parameters += factors.a.numel() + factors.b.numel()
        squares[name] += _delta_square(factors)
    for name, group in groups.items():
        group.delta_norm = math.sqrt(squares[name])
    return groups


def _delta_square(factors: Factors) -> float:
    """||scaling B A||^2 = scaling^2 <B^T B, A A^T>, without making B A."""
    a, b = factors.a.double(), factors.b.double()
    return max(0.0, float(((b.t() @ b) * (a @ a.t())).sum()) * factors.scaling**2)


# ---------------------------------------------------------------------- against a base


def _judge(adapter: Adapter, base: Path, groups: Mapping[str, Group]) -> str:
    """Fill in the groups' norms and losses, and return the dtype(s) that were rounded to."""
    squares: dict[str, float] = defaultdict(float)
    roundings = set()
    for target, weight in _base_tensors(base, adapter):
        group = groups[_group_name(target)]
        square, lost, dtype = _judge_target(weight, adapter.targets[target], target)
        squares[group.name] += square
        group.num_elements += weight.numel()
        group.num_lost = (group.num_lost or 0) + lost
        group.base_norm = math.sqrt(squares[group.name])
        roundings.add(dtype)
    return ", ".join(sorted(roundings))


def _judge_target(weight: torch.Tensor, factors: Factors, target: str) -> tuple[float, int, str]:
    """||W||^2, the number of elements lost to rounding, and the dtype rounded to. Works on a block of rows at a time."""
    import torch

    from fusedmerge.backend.cpu import row_blocks

    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32) or weight.dim() != 2:
        raise FormatError("inspect", target, "a matrix in bfloat16, float16 or float32", f"{weight.dtype} {list(weight.shape)}")
    rounding = torch.bfloat16 if weight.dtype == torch.float32 else weight.dtype
    pair = factors.oriented((weight.shape[0], weight.shape[1]), None, "inspect", target)
    a, b = pair.a.float(), pair.b.float() * pair.scaling
    square, lost = 0.0, 0
    for rows in row_blocks(weight.shape[0], weight.shape[1]):
        wide = weight[rows].float()
        delta = b[rows] @ a
        stays = (wide + delta).to(rounding) == wide.to(rounding)
        lost += int((stays & (delta != 0)).sum())
        square += float(wide.double().square().sum())
    return square, lost, str(rounding).removeprefix("torch.")


def _base_tensors(base: Path, adapter: Adapter) -> Iterator[tuple[str, torch.Tensor]]:
    """The adapter's targets in a checkpoint, one at a time. Raises UnknownNameError, listing the targets that are not there."""
    from safetensors import SafetensorError, safe_open

    files = {canonical_name(key): (file, key) for file, keys in _checkpoint_files(base) for key in keys}
    files = {**_without_prefix(files), **files}
    missing = [target for target in adapter.targets if target not in files]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UnknownNameError("inspect", f'targets of adapter "{adapter.name}"', f"weights that {base} has", f"no {shown}")
    by_file: dict[Path, list[str]] = defaultdict(list)
    for target in adapter.targets:
        by_file[files[target][0]].append(target)
    for file, targets in by_file.items():
        try:
            with safe_open(file, framework="pt") as tensors:
                for target in targets:
                    yield target, tensors.get_tensor(files[target][1])
        except SafetensorError as error:
            raise FormatError("inspect", str(file), "a whole safetensors file", error) from error


def _without_prefix(files: Mapping[str, tuple[Path, str]]) -> dict[str, tuple[Path, str]]:
    """Checkpoints of the bare backbone lack the head model's prefix: layers.0... for model.layers.0..., h.0... for transformer.h.0..."""
    return {f"{prefix}.{name}": where for name, where in files.items() for prefix in ("model", "transformer")}


def _checkpoint_files(base: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each safetensors file of a checkpoint directory, with its tensors' names."""
    from safetensors import SafetensorError, safe_open

    if not base.is_dir():
        raise MissingFileError("inspect", "--base", "a checkpoint directory", str(base))
    index = base / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise FormatError("inspect", str(index), "an index with a weight_map", error) from error
        paths = [base / name for name in names]
    else:
        paths = sorted(base.glob("*.safetensors"))
    if not paths:
        raise MissingFileError("inspect", "--base", "a directory with safetensors files", str(base))
    for path in paths:
        if not path.is_file():
            raise MissingFileError("inspect", "--base", "every file that the index names", f"no {path}")
        try:
            with safe_open(path, framework="pt") as tensors:
                yield path, list(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise FormatError("inspect", str(path), "a whole safetensors file", error) from error


# ---------------------------------------------------------------------- text


def render(found: Inspection) -> str:
    """The inspection as text."""
    config = found.config
    scaling = "alpha / sqrt(r)" if config.get("use_rslora") else "alpha / r"
    head = [
        f'adapter "{found.name}"  ({found.directory})',
        f"  {found.total.num_targets} targets, {found.total.num_parameters:,} parameters, {found.nbytes / 2**20:.2f} MiB {'/'.join(found.dtypes)}",
        f"  r {config.get('r', '?')}, lora_alpha {config.get('lora_alpha', '?')}, scaling = {scaling}",
    ]
    if config.get("base_model_name_or_path"):
        head.append(f"  trained on {config['base_model_name_or_path']}")
    judged = found.base is not None
    columns = ["group", "targets", "rank", "scaling", "parameters", "|delta|", *(["|delta|/|W|", "lost to rounding"] if judged else [])]
    table = text_table(columns, [_row(group, judged) for group in [*found.groups, found.total]])
    tail = []
    if judged:
        tail = [f"lost to rounding: elements with delta != 0 that keep the base's own bits once rounded to {found.rounding} (base: {found.base})"]
    return "\n".join([*head, "", table, *([""] if tail else []), *tail])


def _row(group: Group, judged: bool) -> list[str]:
    row = [group.name, str(group.num_targets), _span(group.ranks, "d"), _span(group.scalings, ".4g"), f"{group.num_parameters:,}"]
    row.append(f"{group.delta_norm:.4g}")
    if judged:
        row += [f"{group.ratio:.4f}" if group.ratio is not None else "-", percent(group.lost) if group.lost is not None else "-"]
    return row


def _span(values: list[Any], form: str) -> str:
    return f"{values[0]:{form}}" if len(values) == 1 else f"{values[0]:{form}}-{values[-1]:{form}}"
