"""Fused application at decode: the router, and linears whose tokens each bring their own mixture of adapters (docs/kernels/lora_linear.md).

    x -> prologue: (residual, norm or SiLU * up), router, shrink -> GEMV: W x + B z + bias + residual, several targets at once

Tensors are checked by the caller (fusedmerge/ops): 2-D, columns contiguous, of one 16-bit dtype and one device. Rows may be strided and
begin anywhere; what is not 16-byte aligned is read element by element. Results and workspace come from torch's allocator, in the stream's
order: a call may be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fusedmerge.backend import linear_params as lp
from fusedmerge.backend.compiler import Kernel
from fusedmerge.backend.kernels import Launcher, aligned, launcher
from fusedmerge.backend.linear_params import LinearParams, LinearTarget, RouteParams
from fusedmerge.backend.params import MAX_SLOTS
from fusedmerge.errors import InvalidValueError

if TYPE_CHECKING:
    import torch

__all__ = ["Applied", "Known", "Norm", "Router", "Silu", "Target", "decode_group", "decode_linear", "route"]

_MAX_ROUTED = 4096  # N of the router alone: its logits are in 48 KB of shared memory
_PROLOGUE_BYTES = {1: 72032, 2: 78528}  # kPrologueSharedBytes, by tiles of eight tokens
_GEMV_BYTES = {1: 95040, 2: 99200}  # kGemvSharedBytes
_GEMV_BLOCKS = 2  # kBlocksPerMultiprocessor


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
        return 0 if self.a is None or not len(self.a) else self.a.shape[1]


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
        return len(self.weight), self.k, self.normalize, str(self.weight.dtype)


@dataclass(frozen=True)
class Applied:
    """What a group of linears leaves."""

    ys: list[torch.Tensor]  # [T, out] of each target
    x: torch.Tensor  # [T, in]: what the weights were multiplied with
    routings: list[Known | None]  # what each target's tokens took; None: it had no routing
    sum: torch.Tensor | None = field(default=None)  # [T, in]: of Norm's input and second


def route(
    backend: str | Launcher, x: torch.Tensor, router_weight: torch.Tensor, k: int, normalize: bool = True, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k adapters that score highest for each token, and their gates: one launch (`ops.route_topk` tells the meaning).

    x [T, in], router_weight [N, in] of x's dtype or float32 (N up to 4096, k up to 32), mask int32 [T] (0: padding: ids -1, gates 0)
    -> ids int32 [T, k], gates float32 [T, k]. Raises InvalidValueError for larger N and k.
    """
    _check_count("k", "slots of a token", k, MAX_SLOTS, "route_topk")
    _check_count("router_weight", "adapters", len(router_weight), _MAX_ROUTED, "route_topk")
    ids, gates = _empty_routing(x, len(x), k)
    params = RouteParams(
        x=x.data_ptr(),
        router=router_weight.data_ptr(),
        mask=_address(mask),
        ids=ids.data_ptr(),
        gates=gates.data_ptr(),
        x_stride=x.stride(0),
        router_stride=router_weight.stride(0),
        cols=x.shape[1],
        num_adapters=len(router_weight),
        num_slots=k,
        normalize=normalize,
        flags=_flags((x, lp.X_ALIGNED)) | _router_flags(x, router_weight),
    )
    if len(x):
        name, number = _dtype(x)
        kernel = Kernel("route.cuh", "RouteParams", f"run_route<{number}>", f"route_{name}")
        launcher(backend, x.device).launch(kernel, params, len(x), 4 * len(router_weight))
    return ids, gates


def decode_linear(
    backend: str | Launcher,
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ids: torch.Tensor,
    gates: torch.Tensor,
    scaling: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [T, out] of one matrix, T up to 16: `ops.lora_linear` tells the meaning and the shapes."""
    return decode_group(backend, x, [Target(weight, a, b, scaling, bias)], Known(ids, gates)).ys[0]


def decode_group(
    backend: str | Launcher,
    x: torch.Tensor,
    targets: Sequence[Target],
    routing: Known | Router | Sequence[Router | None] | None = None,
    source: Norm | Silu | None = None,
) -> Applied:
    """Up to four linears that share x [T, in], T up to 16: two launches; one where there is neither adapter nor source.

    routing: of all targets, or a router for each (the same object: one choice); None applies no adapter. source: how x is made, from the
    given input; None: it is the input. All targets have the same N, that of the routers. Raises InvalidValueError for more of anything
    (slots: of all routers together, 32), for targets of different N, and for routers of different N, k, normalize or dtype.
    """
    where = launcher(backend, x.device)
    _check_count("x", "tokens", len(x), lp.MAX_TOKENS)
    _check_count("targets", "matrices", len(targets), lp.MAX_TARGETS)
    each = list(routing) if isinstance(routing, Sequence) else [routing] * len(targets)
    _check_routings(targets, each)
    group = _Group(x, targets, each, source)
    if not len(x):
        return group.applied
    name, number = _dtype(x)
    tiles = -(-len(x) // 8)
    if group.needs_prologue:
        kernel = Kernel("lora_linear.cuh", "LinearParams", f"run_prologue<{number}, {tiles}>", f"prologue_{name}_{8 * tiles}")
        where.launch(kernel, group.params, group.prologue_grid(where.num_multiprocessors), _PROLOGUE_BYTES[tiles], programmatic=True)
    blocks = min(_GEMV_BLOCKS, max(1, where.shared_bytes_limit // _GEMV_BYTES[tiles])) * where.num_multiprocessors
    waves = -(-group.params.num_tiles // blocks)
    kernel = Kernel("lora_linear.cuh", "LinearParams", f"run_gemv<{number}, {tiles}>", f"gemv_{name}_{8 * tiles}", blocks=_GEMV_BLOCKS)
    if waves:  # equal shares: no block has two tiles more than another
        where.launch(kernel, group.params, -(-group.params.num_tiles // waves), _GEMV_BYTES[tiles], group.needs_prologue)
    return group.applied


class _Group:
    """The argument of both launches, and the tensors that it points to."""

    def __init__(
        self, x: torch.Tensor, targets: Sequence[Target], routings: Sequence[Known | Router | None], source: Norm | Silu | None
    ) -> None:
        num_tokens, cols = x.shape
        self.params = LinearParams(tokens=num_tokens, cols=cols, num_targets=len(targets), num_splits=-(-cols // lp.SPLIT_COLS))
        flags, prepared, total = self._set_source(x, source)
        flags |= self._set_routings(x, routings)
        self.params.x, self.params.x_stride = prepared.data_ptr(), prepared.stride(0)
        self.params.flags = flags | _flags((prepared, lp.X_ALIGNED))
        ys = [_empty(num_tokens, len(t.weight), like=x) for t in targets]
        self._set_targets(targets, routings, ys)
        self.applied = Applied(ys, prepared, [None if given is None else self._taken[id(given)][1] for given in routings], total)

    @property
    def needs_prologue(self) -> bool:
        params = self.params
        return params.source != lp.PLAIN or params.logits is not None or params.num_slots * params.num_rank_tiles > 0

    def prologue_grid(self, num_multiprocessors: int) -> int:
        """A block for each unit of the shrink, share of x and rows of routers, up to one a multiprocessor."""
        params = self.params
        units = self._num_choices * params.num_rank_tiles * params.num_splits
        pieces = 0 if params.source == lp.PLAIN else -(-params.tokens * params.cols // 2048)
        rows = 0 if params.logits is None else -(-params.num_routings * params.num_adapters // 8)
        return min(num_multiprocessors, max(1, units, pieces, rows))

    def _set_source(self, x: torch.Tensor, source: Norm | Silu | None) -> tuple[int, torch.Tensor, torch.Tensor | None]:
        """(flags, what the GEMV reads, the residual stream)."""
        params = self.params
        params.input, params.input_stride = x.data_ptr(), x.stride(0)
        flags, total = _flags((x, lp.INPUT_ALIGNED)), None
        if source is None:
            return flags, x, None
        prepared = _empty(x.shape[0], -(-x.shape[1] // 8) * 8, like=x)[:, : x.shape[1]]
        second = source.up if isinstance(source, Silu) else source.second
        if second is not None:
            params.second, params.second_stride = second.data_ptr(), second.stride(0)
            flags |= _flags((second, lp.SECOND_ALIGNED))
        params.source = lp.SILU
        if isinstance(source, Norm):
            params.source, params.epsilon, params.norm_weight = lp.NORM, source.epsilon, source.weight.data_ptr()
            flags |= _flags((source.weight, lp.NORM_ALIGNED))
            if second is not None:
                total = _empty(*x.shape, like=x)
                params.sum, params.sum_stride = total.data_ptr(), total.stride(0)
                flags |= _flags((total, lp.SUM_ALIGNED))
        return flags, prepared, total

    def _set_routings(self, x: torch.Tensor, routings: Sequence[Known | Router | None]) -> int:
        """Known ids and gates, or the routers: each once, whatever number of targets has it. Returns flags."""
        import torch

        params = self.params
        different = _different(routings)
        self._taken: dict[int, tuple[int, Known]] = {}  # by id(given): its index, and what tokens take
        self._num_choices = 0
        if not different:
            return 0
        routers = [given for given in different if isinstance(given, Router)]
        if routers:
            params.num_adapters, params.normalize = len(routers[0].weight), routers[0].normalize
            ids, gates = _empty_routing(x, len(routers), len(x), routers[0].k)
            self._logits = _empty(len(routers), len(x), params.num_adapters, like=x, dtype=torch.float32)
            params.logits = self._logits.data_ptr()
            self._num_choices = params.num_adapters
            for i, router in enumerate(routers):
                params.routers[i], params.router_strides[i] = router.weight.data_ptr(), router.weight.stride(0)
                self._taken[id(router)] = i, Known(ids[i], gates[i])
        else:
            known = next(given for given in different if isinstance(given, Known))
            ids, gates = known.ids.contiguous(), known.gates.contiguous()
            self._num_choices = ids.numel()
            self._taken[id(known)] = 0, Known(ids, gates)
        params.num_routings, params.num_slots = len(different), ids.shape[-1]
        params.ids, params.gates = ids.data_ptr(), gates.data_ptr()
        return _router_flags(x, *(router.weight for router in routers)) if routers else 0

    def _set_targets(self, targets: Sequence[Target], routings: Sequence[Known | Router | None], ys: Sequence[torch.Tensor]) -> None:
        import torch

        params = self.params
        targets = [t if given is not None else replace(t, a=None, b=None) for t, given in zip(targets, routings, strict=True)]
        num_places = params.num_splits * params.tokens * (params.num_adapters if params.logits else params.num_slots)
        pitches = [-(-t.rank // lp.Z_PITCH_STEP) * lp.Z_PITCH_STEP for t in targets]
        self._z = _empty(num_places * sum(pitches), like=ys[0], dtype=torch.float32)
        offset = 0
        for target, given, y, pitch, described in zip(targets, routings, ys, pitches, params.targets, strict=False):
            _describe(described, target, y)
            described.z, described.z_pitch = self._z[offset:].data_ptr(), pitch
            described.first_tile, described.first_rank_tile = params.num_tiles, params.num_rank_tiles
            params.num_tiles += -(-len(target.weight) // lp.TILE_ROWS)
            params.num_rank_tiles += -(-target.rank // lp.MMA_ROWS)
            if given is not None:
                described.routing = self._taken[id(given)][0]
            if target.a is not None:
                params.num_adapters = len(target.a)
            offset += num_places * pitch


def _check_routings(targets: Sequence[Target], routings: Sequence[Known | Router | None]) -> None:
    """One for each target; different ones are routers that differ in nothing but their weights; every target has a router's N."""
    if len(routings) != len(targets):
        raise InvalidValueError("lora_linear", "routing", f"one for each of {len(targets)} targets", len(routings))
    different = _different(routings)
    routers = [given for given in different if isinstance(given, Router)]
    kinds = {router.kind for router in routers}
    if len(different) > 1 and (len(kinds) > 1 or len(routers) < len(different)):
        got = [*sorted(kinds), *["known ids"] * (len(different) - len(routers))]
        raise InvalidValueError("lora_linear", "routing", "routers of one N, k, normalize and dtype, or one choice", got)
    num_slots = sum(given.k if isinstance(given, Router) else given.ids.shape[1] for given in different)
    _check_count("ids", "slots of a token", num_slots, MAX_SLOTS)
    counts = [len(router.weight) for router in routers[:1]]
    counts += [len(target.a) for target, given in zip(targets, routings, strict=True) if target.a is not None and given is not None]
    if len(set(counts)) > 1:
        raise InvalidValueError("lora_linear", "targets", f"{counts[0]} adapters each", counts[1:])


def _different(routings: Sequence[Known | Router | None]) -> list[Known | Router]:
    """Each object once, in their order."""
    return list({id(given): given for given in routings if given is not None}.values())


def _describe(described: LinearTarget, target: Target, y: torch.Tensor) -> None:
    described.weight, described.weight_stride = target.weight.data_ptr(), target.weight.stride(0)
    described.rows = len(target.weight)
    described.y, described.y_stride = y.data_ptr(), y.stride(0)
    described.bias, described.scaling = _address(target.bias), _address(target.scaling)
    described.flags = _flags((target.weight, lp.WEIGHT_ALIGNED))
    if target.residual is not None:
        described.residual, described.residual_stride = target.residual.data_ptr(), target.residual.stride(0)
    if target.rank and target.a is not None and target.b is not None:
        described.a, (described.a_adapter_stride, described.a_row_stride, _) = target.a.data_ptr(), target.a.stride()
        described.b, (described.b_adapter_stride, described.b_row_stride, _) = target.b.data_ptr(), target.b.stride()
        described.rank = target.rank
        described.flags |= _flags((target.a, lp.A_ALIGNED), (target.b, lp.B_ALIGNED))


def _check_count(name: str, things: str, count: int, limit: int, operation: str = "lora_linear") -> None:
    if count > limit:
        raise InvalidValueError(operation, name, f"at most {limit} {things} in a launch", count)


def _dtype(x: torch.Tensor) -> tuple[str, str]:
    """x's dtype as kernels' names and templates have it."""
    return {"torch.bfloat16": ("bf16", "Bf16"), "torch.float16": ("fp16", "Fp16")}[str(x.dtype)]


def _empty(*shape: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    import torch

    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _empty_routing(x: torch.Tensor, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and gates."""
    import torch

    return _empty(*shape, like=x, dtype=torch.int32), _empty(*shape, like=x, dtype=torch.float32)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _flags(*pairs: tuple[torch.Tensor, int]) -> int:
    """The flags of the tensors whose every row begins at a multiple of 16 bytes."""
    return sum(flag for tensor, flag in pairs if aligned(tensor))


def _router_flags(x: torch.Tensor, *weights: torch.Tensor) -> int:
    """Of routers of one dtype."""
    is_aligned = all(aligned(weight) for weight in weights)
    return (lp.ROUTER_ALIGNED if is_aligned else 0) | (0 if weights[0].dtype == x.dtype else lp.ROUTER_WIDE)
