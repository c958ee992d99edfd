"""`fusedmerge inspect`: what an adapter holds, how large it is beside a base, and what 16-bit rounding would take from it.

Lost to rounding: the share of a base's adapted elements where the adapter wants a change (delta != 0) and the merged weight, rounded
once to the base's 16-bit dtype, still has the base's own value. (A float32 base loses nothing to speak of as it is; it is judged as if
both it and the merged weight were stored in bfloat16.)
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from fusedmerge.commands.tables import percent, text_table
from fusedmerge.errors import FormatError, FusedMergeError

if TYPE_CHECKING:
    import torch

    from fusedmerge.formats.lora import Adapter, Factors

__all__ = ["Group", "Inspection", "inspect_adapter", "render"]

PathLike = Union[str, "os.PathLike[str]"]
_OP = "inspect"


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
    num_lost: int | None = None  # elements with delta != 0 whose value the merge leaves as it was

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

    Raises FormatError with the reason for an adapter that would merge silently wrong, MissingFileError, and whatever
    `fusedmerge merge` refuses: UnknownNameError for targets that the base lacks, ShapeError, StateError for tied weights.
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
    """Fill in the groups' norms and losses, and return the dtypes that were rounded to."""
    squares: dict[str, float] = defaultdict(float)
    roundings = set()
    for target, weight, transposed in _base_tensors(base, adapter):
        group = groups[_group_name(target)]
        square, lost, dtype = _judge_target(weight, transposed, adapter.targets[target], f'adapter "{adapter.name}" on {target}')
        squares[group.name] += square
        group.num_elements += weight.numel()
        group.num_lost = (group.num_lost or 0) + lost
        group.base_norm = math.sqrt(squares[group.name])
        roundings.add(dtype)
    return ", ".join(sorted(roundings))


def _judge_target(weight: torch.Tensor, transposed: bool | None, factors: Factors, what: str) -> tuple[float, int, str]:
    """||W||^2, the number of elements lost to rounding, and the dtype rounded to. Works on a block of rows at a time."""
    import torch

    from fusedmerge.backend.cpu import row_blocks

    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32) or weight.dim() != 2:
        raise FormatError(_OP, what, "a matrix in bfloat16, float16 or float32", f"{weight.dtype} {list(weight.shape)}")
    rounding = torch.bfloat16 if weight.dtype == torch.float32 else weight.dtype
    pair = factors.oriented((weight.shape[0], weight.shape[1]), transposed, _OP, what)
    a, b = pair.a.float(), pair.b.float() * pair.scaling
    square, lost = 0.0, 0
    for rows in row_blocks(weight.shape[0], weight.shape[1]):
        wide = weight[rows].float()
        delta = b[rows] @ a
        stays = (wide + delta).to(rounding) == wide.to(rounding)
        lost += int((stays & (delta != 0)).sum())
        square += float(wide.double().square().sum())
    return square, lost, str(rounding).removeprefix("torch.")


def _base_tensors(directory: Path, adapter: Adapter) -> Iterator[tuple[str, torch.Tensor, bool | None]]:
    """(target, tensor, whether it is stored as [in, out]), one tensor in memory at a time; matched as `fusedmerge merge` matches them."""
    from safetensors import safe_open

    from fusedmerge.checkpoint.files import open_base
    from fusedmerge.checkpoint.names import NameMap, describe
    from fusedmerge.staging import check_complete

    try:
        base = open_base(directory)
    except FusedMergeError as error:
        error.operation = _OP
        raise
    check_complete(adapter, base.tensors, _OP)
    names = NameMap(base.tensors, base.config, describe(base.directory, base.config, list(base.tensors)))
    matches = names.find(adapter.targets, adapter.name, _OP)
    for shard, header in base.shards.items():
        with safe_open(base.directory / shard, framework="pt") as tensors:
            for target, match in matches.items():
                if match.disk in header.entries:
                    yield target, tensors.get_tensor(match.disk), match.transposed


# ---------------------------------------------------------------------- text


def render(found: Inspection) -> str:
    """The inspection as text."""
    config = found.config
    scaling = "alpha / sqrt(r)" if config.get("use_rslora") else "alpha / r"
    total, size = found.total, f"{found.nbytes / 2**20:.2f} MiB {'/'.join(found.dtypes)}"
    head = [
        f'adapter "{found.name}"  ({found.directory})',
        f"  {total.num_targets} targets, {total.num_parameters:,} parameters, {size}",
        f"  r {config.get('r', '?')}, lora_alpha {config.get('lora_alpha', '?')}, scaling = {scaling}",
    ]
    if config.get("base_model_name_or_path"):
        head.append(f"  trained on {config['base_model_name_or_path']}")
    judged = found.base is not None
    columns = ["group", "targets", "rank", "scaling", "parameters", "|delta|", *(["|delta|/|W|", "lost to rounding"] if judged else [])]
    table = text_table(columns, [_row(group, judged) for group in [*found.groups, total]])
    tail = []
    if judged:
        lost = f"lost to rounding: weights with delta != 0 that keep the base's value once rounded to {found.rounding}"
        tail = [f"base: {found.base}", lost]
    return "\n".join([*head, "", table, *([""] if tail else []), *tail])


def _row(group: Group, judged: bool) -> list[str]:
    row = [group.name, str(group.num_targets), _span(group.ranks, "d"), _span(group.scalings, ".4g"), f"{group.num_parameters:,}"]
    row.append(f"{group.delta_norm:.4g}")
    if judged:
        row += [f"{group.ratio:.4f}" if group.ratio is not None else "-", percent(group.lost) if group.lost is not None else "-"]
    return row


def _span(values: list[Any], form: str) -> str:
    return f"{values[0]:{form}}" if len(values) == 1 else f"{values[0]:{form}}-{values[-1]:{form}}"
