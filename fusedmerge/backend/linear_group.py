"""Linears that share x, as prologue and GEMV take them: described once, run with one x after another (docs/kernels/lora_linear.md)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fusedmerge.backend import linear_params as lp
from fusedmerge.backend.compiler import Kernel
from fusedmerge.backend.kernels import Launcher, aligned
from fusedmerge.backend.linear_params import LinearParams, LinearTarget
from fusedmerge.backend.params import MAX_SLOTS
from fusedmerge.errors import InvalidValueError

if TYPE_CHECKING:
    import torch

__all__ = [
    "KNOWN",
    "Applied",
    "Group",
    "Known",
    "Norm",
    "Router",
    "Silu",
    "Target",
    "check_count",
    "describe",
    "dtype_names",
    "flags_of",
    "router_flags",
]

_PROLOGUE_BYTES = {1: 72032, 2: 78528}  # kPrologueSharedBytes, by tiles of eight tokens
_GEMV_BYTES = {1: 95040, 2: 99200}  # kGemvSharedBytes
_GEMV_BLOCKS = 2  # kBlocksPerMultiprocessor
KNOWN: Literal["known"] = "known"
ONE_CHOICE = "routers of one N, k, normalize and dtype, or one choice"


@dataclass(frozen=True)
class Target:
    """A matrix and its adapters: y = W x + bias + residual + sum over slots of gate * scaling * B (A x), rounded once."""

    weight: torch.Tensor  # [out, in]
    a: torch.Tensor | None = None  # [N, r, in]; None: no adapter touches this matrix
    b: torch.Tensor | None = None  # [N, out, r]
    scaling: torch.Tensor | None = None  # float32 [N]; None: 1 each
    bias: torch.Tensor | None = None  # [out]
    residual: torch.Tensor | None = None  # [T, out]

    @property
    def rank(self) -> int:
        """r; 0 where there is no adapter."""
        return 0 if self.a is None or not self.a.shape[0] else self.a.shape[1]


@dataclass(frozen=True)
class Norm:
    """x = RMSNorm(input + second): each step rounded, as a 16-bit model that stores it does."""

    weight: torch.Tensor  # [in]
    epsilon: float
    second: torch.Tensor | None = None  # [T, in], added to the input first; the sum is returned


@dataclass(frozen=True)
class Silu:
    """x = SiLU(input) * up, SiLU's value rounded."""

    up: torch.Tensor  # [T, in]


@dataclass(frozen=True)
class Known:
    """Each token's slots: -1, or any id outside [0, N), is an empty one."""

    ids: torch.Tensor  # int32 [T, k], k up to 32
    gates: torch.Tensor  # float32 [T, k]


@dataclass(frozen=True)
class Router:
    """A router of the group's own: each token's slots are chosen from x, on the device (`ops.route_topk` tells the meaning)."""

    weight: torch.Tensor  # [N, in], of x's dtype or float32
    k: int
    normalize: bool = True

    @property
    def kind(self) -> tuple[int, int, bool, str]:
        """(N, k, normalize, dtype): routers that agree in these may share a launch."""
        return self.weight.shape[0], self.k, self.normalize, str(self.weight.dtype)


@dataclass(frozen=True)
class Applied:
    """What a group of linears leaves."""

    ys: list[torch.Tensor]  # [T, out] of each target
    x: torch.Tensor  # [T, in]: what the weights were multiplied with
    routings: list[Known | None]  # what each target's tokens took; None: it had no routing
    sum: torch.Tensor | None = field(default=None)  # [T, in]: of Norm's input and second


class Group:
    """Up to four linears of one shape of x: what does not change from run to run, their weights, adapters and routers.

    routing: of each target; a router (the same object: one choice), KNOWN: the ids and gates that `run` is given, None: no adapters there.
    All that have a routing have the same N. Raises InvalidValueError for more of anything (slots: of all routers together, 32), for targets
    of different N, and for routers of different N, k, normalize or dtype, or beside known ids.
    """

    def __init__(self, targets: Sequence[Target], routing: Sequence[Router | Literal["known"] | None]) -> None:
        self._routers = _check(targets, routing)
        self._targets, self._routing = list(targets), list(routing)  # the template points to the targets' memory
        cols = targets[0].weight.shape[1]
        params = self._template = LinearParams(cols=cols, num_targets=len(targets), num_splits=-(-cols // lp.SPLIT_COLS))
        for i, router in enumerate(self._routers):
            params.routers[i], params.router_strides[i] = router.weight.data_ptr(), router.weight.stride(0)
            params.num_adapters, params.num_slots, params.normalize = router.weight.shape[0], router.k, router.normalize
        params.num_routings = len(self._routers) or int(KNOWN in routing)
        if self._routers:
            params.flags = router_flags(targets[0].weight, *(router.weight for router in self._routers))
        for target, given, described in zip(targets, routing, params.targets, strict=False):
            describe(described, target, with_adapters=given is not None)
            described.first_tile, described.first_rank_tile = params.num_tiles, params.num_rank_tiles
            params.num_tiles += -(-described.rows // lp.TILE_ROWS)
            params.num_rank_tiles += -(-described.rank // lp.MMA_ROWS)
            if isinstance(given, Router):
                described.routing = next(i for i, router in enumerate(self._routers) if router is given)
            if given is not None and target.a is not None:
                params.num_adapters = target.a.shape[0]
        self._pitches = [described.z_pitch for described in params.targets[: len(targets)]]

    def run(
        self,
        where: Launcher,
        x: torch.Tensor,
        known: Known | None = None,
        source: Norm | Silu | None = None,
        residuals: Sequence[torch.Tensor | None] = (),
    ) -> Applied:
        """x [T, in] -> y [T, out] of each target. known: where a routing is KNOWN; residuals: [T, out] of each, or none.

        Raises InvalidValueError for T > 16, and k > 32.
        """
        params = LinearParams.from_buffer_copy(self._template)
        params.tokens = x.shape[0]
        check_count("x", "tokens", params.tokens, lp.MAX_TOKENS)
        prepared, total = _set_source(params, x, source)
        taken, num_places, work = self._set_routing(params, x, known)
        ys = [x.new_empty(params.tokens, described.rows) for described in params.targets[: params.num_targets]]
        at = work.data_ptr()
        for described, y, pitch in zip(params.targets, ys, self._pitches, strict=False):
            described.y, described.y_stride, described.z = y.data_ptr(), y.stride(0), at
            at += 4 * num_places * pitch
        for described, residual in zip(params.targets, residuals, strict=False):
            if residual is not None:
                described.residual, described.residual_stride = residual.data_ptr(), residual.stride(0)
        if params.tokens:
            _launch(where, x, params)
        pairs = zip(self._routing, params.targets, strict=False)
        return Applied(ys, prepared, [None if given is None else taken[described.routing] for given, described in pairs], total)

    def _set_routing(self, params: LinearParams, x: torch.Tensor, known: Known | None) -> tuple[list[Known], int, torch.Tensor]:
        """(What each routing's tokens take, the places of z's ranks in a target, workspace: z of all targets, and logits.)"""
        import torch

        taken, num_logits = [], 0
        if self._routers:
            shape = (len(self._routers), params.tokens, params.num_slots)
            ids, gates = x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=torch.float32)
            taken = [Known(ids[i], gates[i]) for i in range(len(self._routers))]
            num_logits = len(self._routers) * params.tokens * params.num_adapters
        elif params.num_routings:
            assert known is not None
            ids, gates = known.ids.contiguous(), known.gates.contiguous()
            check_count("ids", "slots of a token", ids.shape[1], MAX_SLOTS)
            params.num_slots = ids.shape[1]
            taken = [Known(ids, gates)]
        if taken:
            params.ids, params.gates = ids.data_ptr(), gates.data_ptr()
        num_places = params.num_splits * params.tokens * (params.num_adapters if self._routers else params.num_slots)
        num_z = num_places * sum(self._pitches)
        work = x.new_empty(num_z + num_logits, dtype=torch.float32)
        if self._routers:
            params.logits = work.data_ptr() + 4 * num_z
        return taken, num_places, work


def _set_source(params: LinearParams, x: torch.Tensor, source: Norm | Silu | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(What the GEMV reads, the residual stream.)"""
    params.input, params.input_stride = x.data_ptr(), x.stride(0)
    flags, prepared, total = flags_of((x, lp.INPUT_ALIGNED)), x, None
    if source is not None:
        prepared = x.new_empty(params.tokens, -(-x.shape[1] // 8) * 8)[:, : x.shape[1]]
        params.source, second = (lp.SILU, source.up) if isinstance(source, Silu) else (lp.NORM, source.second)
        if second is not None:
            params.second, params.second_stride = second.data_ptr(), second.stride(0)
            flags |= flags_of((second, lp.SECOND_ALIGNED))
        if isinstance(source, Norm):
            params.epsilon, params.norm_weight = source.epsilon, source.weight.data_ptr()
            flags |= flags_of((source.weight, lp.NORM_ALIGNED))
            if second is not None:
                total = x.new_empty(x.shape)
                params.sum, params.sum_stride = total.data_ptr(), total.stride(0)
                flags |= flags_of((total, lp.SUM_ALIGNED))
    params.x, params.x_stride = prepared.data_ptr(), prepared.stride(0)
    params.flags |= flags | flags_of((prepared, lp.X_ALIGNED))
    return prepared, total


def _launch(where: Launcher, x: torch.Tensor, params: LinearParams) -> None:
    tiles = -(-params.tokens // 8)
    prologue, gemv = _kernels(str(x.dtype), tiles)
    needs_prologue = params.source != lp.PLAIN or params.logits is not None or params.num_slots * params.num_rank_tiles > 0
    if needs_prologue:
        grid = min(where.num_multiprocessors, _prologue_pieces(params))
        where.launch(prologue, params, grid, _PROLOGUE_BYTES[tiles], programmatic=True)
    blocks = min(_GEMV_BLOCKS, max(1, where.shared_bytes_limit // _GEMV_BYTES[tiles])) * where.num_multiprocessors
    waves = -(-params.num_tiles // blocks)
    if waves:  # equal shares: no block has two tiles more than another
        where.launch(gemv, params, -(-params.num_tiles // waves), _GEMV_BYTES[tiles], needs_prologue)


def _prologue_pieces(params: LinearParams) -> int:
    """Units of the shrink, shares of x or rows of routers, whichever are more."""
    choices = params.num_adapters if params.logits else params.tokens * params.num_slots
    units = choices * params.num_rank_tiles * params.num_splits
    shares = 0 if params.source == lp.PLAIN else -(-params.tokens * params.cols // 2048)
    rows = 0 if params.logits is None else -(-params.num_routings * params.num_adapters // 8)
    return max(1, units, shares, rows)


@functools.cache
def _kernels(dtype: str, tiles: int) -> tuple[Kernel, Kernel]:
    name, number = dtype_names(dtype)
    prologue = Kernel("lora_linear.cuh", "LinearParams", f"run_prologue<{number}, {tiles}>", f"prologue_{name}_{8 * tiles}")
    gemv = Kernel("lora_linear.cuh", "LinearParams", f"run_gemv<{number}, {tiles}>", f"gemv_{name}_{8 * tiles}", blocks=_GEMV_BLOCKS)
    return prologue, gemv


def _check(targets: Sequence[Target], routing: Sequence[Router | Literal["known"] | None]) -> list[Router]:
    """The routers, each object once, in their order."""
    check_count("targets", "matrices", len(targets), lp.MAX_TARGETS)
    if len(routing) != len(targets):
        raise InvalidValueError("lora_linear", "routing", f"one for each of {len(targets)} targets", len(routing))
    routers = list({id(given): given for given in routing if isinstance(given, Router)}.values())
    kinds = {router.kind for router in routers}
    if len(kinds) + (KNOWN in routing) > 1:
        got = [*sorted(kinds), *[KNOWN + " ids"] * (KNOWN in routing)]
        raise InvalidValueError("lora_linear", "routing", ONE_CHOICE, got)
    check_count("ids", "slots of a token", sum(router.k for router in routers), MAX_SLOTS)
    counts = [router.weight.shape[0] for router in routers[:1]]
    counts += [target.a.shape[0] for target, given in zip(targets, routing, strict=True) if target.a is not None and given is not None]
    if len(set(counts)) > 1:
        raise InvalidValueError("lora_linear", "targets", f"{counts[0]} adapters each", counts[1:])
    return routers


def describe(described: LinearTarget, target: Target, with_adapters: bool) -> None:
    """What does not change from run to run: all but y, z and the residual."""
    described.weight, described.weight_stride = target.weight.data_ptr(), target.weight.stride(0)
    described.rows = target.weight.shape[0]
    described.bias, described.scaling = (None if tensor is None else tensor.data_ptr() for tensor in (target.bias, target.scaling))
    described.flags = flags_of((target.weight, lp.WEIGHT_ALIGNED))
    if with_adapters and target.rank and target.a is not None and target.b is not None:
        described.a, (described.a_adapter_stride, described.a_row_stride, _) = target.a.data_ptr(), target.a.stride()
        described.b, (described.b_adapter_stride, described.b_row_stride, _) = target.b.data_ptr(), target.b.stride()
        described.rank, described.z_pitch = target.rank, -(-target.rank // lp.Z_PITCH_STEP) * lp.Z_PITCH_STEP
        described.flags |= flags_of((target.a, lp.A_ALIGNED), (target.b, lp.B_ALIGNED))


def check_count(name: str, things: str, count: int, limit: int, operation: str = "lora_linear") -> None:
    """Raises InvalidValueError where there are too many for a launch."""
    if count > limit:
        raise InvalidValueError(operation, name, f"at most {limit} {things} in a launch", count)


def dtype_names(dtype: str) -> tuple[str, str]:
    """A dtype as kernels' names and templates have it."""
    return {"torch.bfloat16": ("bf16", "Bf16"), "torch.float16": ("fp16", "Fp16")}[dtype]


def flags_of(*pairs: tuple[torch.Tensor, int]) -> int:
    """The flags of the tensors whose every row begins at a multiple of 16 bytes."""
    return sum(flag for tensor, flag in pairs if aligned(tensor))


def router_flags(x: torch.Tensor, *weights: torch.Tensor) -> int:
    """Of routers of one dtype, beside x or what has its dtype."""
    is_aligned = all(aligned(weight) for weight in weights)
    return (lp.ROUTER_ALIGNED if is_aligned else 0) | (0 if weights[0].dtype == x.dtype else lp.ROUTER_WIDE)
