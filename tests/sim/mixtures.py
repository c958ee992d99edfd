"""Batches whose tokens each have their own mixture of adapters, their float64 truth, and what grouping must make of them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fusedmerge import reference
from fusedmerge.backend import sgmv
from fusedmerge.backend.compiler import Kernel
from fusedmerge.backend.kernels import Launcher, SimLauncher
from fusedmerge.backend.params import SimOptions
from fusedmerge.backend.sgmv_params import SHRINK_PAIRS

POPULARITIES = ("distinct", "uniform", "zipf", "skewed", "identical")
CORRECT_SHARE = {torch.bfloat16: 0.996, torch.float16: 0.99}  # a second rounding would cost some percent


def choose_ids(rng: np.random.Generator, popularity: str, tokens: int, slots: int, adapters: int) -> torch.Tensor:
    """int32 [T, k], as Punica names the mixes: distinct goes round all adapters, skewed gives one of them nine tokens in ten."""
    if popularity == "identical":
        ids = np.broadcast_to(np.arange(slots) * 7 % adapters, (tokens, slots)).copy()
    elif popularity == "distinct":
        ids = np.arange(tokens * slots).reshape(tokens, slots) % adapters
    else:
        weight = {"uniform": np.ones(adapters), "zipf": 1 / np.arange(1, adapters + 1) ** 1.5, "skewed": np.full(adapters, 0.1 / adapters)}
        share = weight[popularity]
        share[adapters // 2] += 0.9 if popularity == "skewed" else 0
        ids = rng.choice(adapters, (tokens, slots), p=share / share.sum())
    return torch.from_numpy(ids.astype(np.int32))


def switched_off(batch: Batch, how: str) -> tuple[Batch, Batch]:
    """(The batch whose adapter 2 has NaN factors, and gates or a scaling of zero: `how`; the batch that does not name it.)"""
    without = replace(batch, ids=torch.where(batch.ids == 2, -1, batch.ids))
    spoilt = replace(batch, a=batch.a.clone(), b=batch.b.clone(), gates=batch.gates.clone(), scaling=batch.scaling.clone())
    spoilt.a[2], spoilt.b[2] = torch.nan, torch.nan
    if how == "gates":
        spoilt.gates[batch.ids == 2] = 0.0
    else:
        spoilt.scaling[2] = 0.0
    return spoilt, without


def strided(values: torch.Tensor, gap: int = 0, shift: int = 0) -> torch.Tensor:
    """The same values with rows `gap` elements further apart, `shift` elements after a 128-byte boundary; NaN between them."""
    rows, cols = values[..., 0].numel(), values.shape[-1]
    raw = torch.full((rows * (cols + gap) + shift + 64,), torch.nan, dtype=values.dtype)
    start = -raw.data_ptr() % 128 // values.element_size() + shift
    area = raw[start : start + rows * (cols + gap)].reshape(*values.shape[:-1], cols + gap)[..., :cols]
    return area.copy_(values)


@dataclass
class Batch:
    """What `add_adapters` is given."""

    y: torch.Tensor  # [T, out]
    x: torch.Tensor  # [T, in]
    a: torch.Tensor  # [N, r, in]
    b: torch.Tensor  # [N, out, r]
    ids: torch.Tensor  # int32 [T, k]
    gates: torch.Tensor  # float32 [T, k]
    scaling: torch.Tensor | None  # float32 [N]
    ranks: torch.Tensor | None = None  # int32 [N]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(**{field: None if value is None else value.to(device) for field, value in vars(self).items()})

    def run(self, backend: str | Launcher = "sim", groups: sgmv.Groups | None = None) -> torch.Tensor:
        """y after `add_to_targets` on a copy of it with the same strides."""
        whole = self.y if self.y._base is None else self.y._base
        y = whole.clone().as_strided(self.y.shape, self.y.stride(), self.y.storage_offset() - whole.storage_offset())
        groups = groups or sgmv.group_tokens(backend, self.ids, self.gates, len(self.a))
        sgmv.add_to_targets(backend, self.x, [sgmv.Target(y, self.a, self.b, self.scaling, self.ranks)], groups)
        return y


class Device(SimLauncher):
    """A simulated device of another size, which may run its blocks' walks on another grid."""

    def __init__(
        self,
        order: int = 0,
        core: int = 1,
        blocks: int = 2,
        seed: int = 1,
        grid: int | None = None,
        multiprocessors: int = 4,
        shared: int = 99 << 10,
    ) -> None:
        super().__init__(SimOptions(order, core, 0, blocks, seed))
        self.grid, self.num_multiprocessors, self.shared_bytes_limit = grid, multiprocessors, shared
        self.launches: list[str] = []
        self.edges: list[bool] = []

    def launch(self, kernel: Kernel, params: ctypes.Structure, grid: int, shared_bytes: int, programmatic: bool = False) -> None:
        self.launches.append(kernel.name)
        self.edges.append(programmatic)
        if self.grid is not None and kernel.name.startswith("sgmv"):
            grid = self.grid
        super().launch(kernel, params, grid, shared_bytes, programmatic)


def make_batch(
    rng: np.random.Generator,
    tokens: int,
    cols: int,
    out: int,
    rank: int,
    *,
    slots: int = 2,
    adapters: int = 5,
    dtype: torch.dtype = torch.bfloat16,
    popularity: str = "uniform",
    none: float = 0.1,
) -> Batch:
    """Signed normal data: what the adapters add is about a tenth of y. `none`: the share of slots without an adapter."""

    def normal(*shape: int, size: float) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape) * size).to(dtype)

    ids = choose_ids(rng, popularity, tokens, slots, adapters)
    ids[torch.from_numpy(rng.random(ids.shape) < none)] = -1
    a, b = normal(adapters, rank, cols, size=cols**-0.5), normal(adapters, out, rank, size=0.1 * rank**-0.5)
    gates = torch.from_numpy(rng.standard_normal(ids.shape)).float()
    scaling = torch.from_numpy(rng.uniform(0.5, 2.0, adapters)).float()
    return Batch(normal(tokens, out, size=1.0), normal(tokens, cols, size=1.0), a, b, ids, gates, scaling)


def coefficients(batch: Batch) -> np.ndarray:
    """gate * scaling, float64 [T, N]."""
    total = np.zeros((len(batch.x), len(batch.a)))
    ids, gates = batch.ids.cpu().numpy(), batch.gates.cpu().numpy().astype(np.float64)
    for t, j in zip(*np.nonzero((ids >= 0) & (ids < len(batch.a))), strict=True):
        total[t, ids[t, j]] += gates[t, j]
    return total if batch.scaling is None else total * batch.scaling.cpu().numpy().astype(np.float64)


def truth(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """y in float64, and S = sum |gate scaling| |B| |A| |x|."""
    share, x = coefficients(batch), reference.to_float64(batch.x)
    total = reference.to_float64(batch.y).copy()
    size = np.zeros_like(total)
    for e in range(len(batch.a)):
        tokens = np.nonzero(share[:, e])[0]
        rank = batch.a.shape[1] if batch.ranks is None else int(batch.ranks[e])
        a, b = reference.to_float64(batch.a[e, :rank]), reference.to_float64(batch.b[e, :, :rank])
        c = share[tokens, e, None]
        total[tokens] += c * (x[tokens] @ a.T @ b.T)
        size[tokens] += abs(c) * (abs(x[tokens]) @ abs(a).T @ abs(b).T)
    return total, size


def check(batch: Batch, y: torch.Tensor, *, slack: float = 2.0**-18, share: float | None = None) -> None:
    """Half an ulp + slack * S (by default what splitting z costs), and almost everywhere the rounded truth."""
    exact, size = truth(batch)
    name = str(batch.y.dtype).removeprefix("torch.")
    got = reference.to_float64(y)
    assert np.isfinite(got).all(), "not every element was written"
    bound = 0.5 * reference.ulp(np.maximum(abs(exact), abs(got)), name) + slack * size + 2.0**-23 * abs(exact)
    worst = abs(got - exact) - bound
    assert (worst <= 0).all(), f"beyond the bound at {np.unravel_index(worst.argmax(), worst.shape)}: {got.flat[worst.argmax()]}"
    if got.size >= 2000:
        assert (got == reference.round_to(exact, name)).mean() >= (CORRECT_SHARE[batch.y.dtype] if share is None else share)


# ---- grouping --------------------------------------------------------------------------------------------------------


def read(groups: sgmv.Groups, name: str, *shape: int, dtype: type = np.int32) -> np.ndarray:
    """An array that the grouping kernels wrote."""
    offset = (getattr(groups.device, name) - groups.memory.data_ptr()) // 4
    return groups.memory.cpu().numpy()[offset : offset + int(np.prod(shape))].view(dtype).reshape(shape)


def expected_pairs(ids: Sequence[Sequence[int]], gates: np.ndarray, adapters: int) -> list[tuple[int, int, float]]:
    """(expert, token, gate), ascending."""
    found = {}
    for t, row in enumerate(ids):
        for j, e in enumerate(row):
            if 0 <= e < adapters:
                found[e, t] = np.float32(found.get((e, t), np.float32(0)) + gates[t, j])
    return [(e, t, gate) for (e, t), gate in sorted(found.items()) if gate != 0]


def check_groups(groups: sgmv.Groups, ids: torch.Tensor, gates: torch.Tensor) -> None:
    """Every array is what a plain sort gives."""
    pairs = expected_pairs(ids.tolist(), gates.numpy(), groups.num_adapters)
    num_pairs, num_tokens, num_groups = read(groups, "totals", 4)[:3]
    used: dict[int, list[int]] = {}
    for e, t, _ in pairs:
        used.setdefault(t, []).append(e)
    assert (num_pairs, num_tokens) == (len(pairs), len(used))
    table = read(groups, "pairs", num_pairs, 4)
    assert table[:, [0, 2]].tolist() == [[t, e] for e, t, _ in pairs]
    assert np.array_equal(table[:, 1].copy().view(np.float32), np.array([g for *_, g in pairs], np.float32), equal_nan=True)

    bundles, first = [], 0
    while first < len(pairs):
        end = next((i for i in range(first, len(pairs)) if pairs[i][0] != pairs[first][0]), len(pairs))
        bundles += [(pairs[first][0], i, min(SHRINK_PAIRS, end - i), 0) for i in range(first, end, SHRINK_PAIRS)]
        first = end
    assert num_groups == len(bundles) <= groups.max_groups
    assert read(groups, "shrink_groups", num_groups, 4).tolist() == [list(bundle) for bundle in bundles]

    lowest, second = groups.buckets
    share = {t: (e[0] * lowest // groups.num_adapters, e[min(1, len(e) - 1)] * second // groups.num_adapters) for t, e in used.items()}
    order = sorted(used, key=lambda t: (share[t], t))
    assert read(groups, "tile_tokens", num_tokens).tolist() == order
    rows, slots = groups.device.tile_rows, groups.num_slots
    counts = read(groups, "tile_counts", groups.max_tiles)
    tiles = read(groups, "tile_pairs", groups.max_tiles, rows * slots, 4)
    place = {t: i for i, t in enumerate(order)}
    wanted: list[list[list[int]]] = [[] for _ in range(groups.max_tiles)]
    for position, (e, t, _) in enumerate(pairs):
        wanted[place[t] // rows].append([e, place[t] % rows, position])
    for i, (tile, count, members) in enumerate(zip(tiles, counts, wanted, strict=True)):
        members.sort()
        assert count == len(members)
        assert table[[position for *_, position in members], 3].tolist() == [i * rows * slots + n for n in range(count)]
        runs = [sum(other[0] == e for other in members[n:]) for n, (e, *_) in enumerate(members)]
        lowest_of = {row: e for e, row, _ in reversed(members)}
        assert tile[:count].tolist() == [
            [e, run, ~row if lowest_of[row] == e else row, 0] for (e, row, _), run in zip(members, runs, strict=True)
        ]
