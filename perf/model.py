"""What each way to run a mixture reads, writes, computes and launches, from shapes alone; and the time that follows from measured rates.

    seconds = max(memory, compute, launches)
    memory  = 2 min(read, written) / copy rate + max(read - written, 0) / read rate + max(written - read, 0) / copy rate
    compute = flops / rate of the arithmetic
    launches = launches * gap between two launches

The parts overlap on a GPU, so the largest decides. Nothing is fitted: what a measurement takes beyond the prediction is the
implementation's. Formulas and figures: docs/performance.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from perf.backbones import Backbone, Shapes

__all__ = [
    "Ceilings",
    "Cost",
    "adapters",
    "addmm_bfloat16",
    "addmm_float32",
    "backbone_step",
    "copy",
    "distinct_experts",
    "factor_bytes",
    "fused_step",
    "linear",
    "lora_linear",
    "peft",
    "seconds",
    "switch_exact",
    "switch_inplace",
]

WEIGHT = 2  # bytes of a 16-bit weight
RANK_MULTIPLE = 16  # a bank's ranks are padded to it
BACKBONE_LAUNCHES, FUSED_LAUNCHES = 8, 9  # per layer: 3 prologues, 4 GEMV, attention; fused: one prologue more, before o_proj


@dataclass(frozen=True)
class Cost:
    """What one call must do."""

    read: float  # bytes
    written: float  # bytes
    flops: float = 0.0
    launches: float = 0.0

    @property
    def bytes(self) -> float:
        """Bytes read and written."""
        return self.read + self.written

    def __add__(self, other: Cost) -> Cost:
        parts = self.read + other.read, self.written + other.written, self.flops + other.flops, self.launches + other.launches
        return Cost(*parts)

    def __mul__(self, count: float) -> Cost:
        return Cost(self.read * count, self.written * count, self.flops * count, self.launches * count)


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to do at most (perf/ceilings.py)."""

    copy: float  # bytes per second, read and written, by a plain copy
    read: float  # bytes per second, by a reduction, or by a copy if that reads faster
    flops: float  # per second, by a large 16-bit GEMM
    flops_float32: float  # per second, by a large float32 GEMM
    launch: float = 0.0  # seconds from one launch to the next in a CUDA graph; 0 on a CPU, where a call is no launch


def seconds(cost: Cost, ceilings: Ceilings, float32: bool = False) -> float:
    """The predicted time of a call. float32: its arithmetic is a float32 GEMM's."""
    paired = min(cost.read, cost.written)
    rest = (cost.read - paired) / ceilings.read + (cost.written - paired) / ceilings.copy
    compute = cost.flops / (ceilings.flops_float32 if float32 else ceilings.flops)
    return max(2 * paired / ceilings.copy + rest, compute, cost.launches * ceilings.launch)


def _elements(shapes: Shapes) -> int:
    return sum(rows * cols for rows, cols in shapes)


def _padded(r: int) -> int:
    return -(-r // RANK_MULTIPLE) * RANK_MULTIPLE


def factor_bytes(shapes: Shapes, r: int, itemsize: int = 2) -> int:
    """Bytes of one adapter's A and B in a bank (ranks padded to 16)."""
    return itemsize * _padded(r) * sum(rows + cols for rows, cols in shapes)


# ---------------------------------------------------------------------- ways to merge


def switch_exact(shapes: Shapes, r: int, k: int, base: int = WEIGHT) -> Cost:
    """live = round(base + k experts): base and chosen factors read, live written, one launch. base: bytes of a base weight (fp8: 1)."""
    weights = _elements(shapes)
    return Cost(base * weights + k * factor_bytes(shapes, r), WEIGHT * weights, 2 * weights * k * _padded(r), 1)


def switch_inplace(shapes: Shapes, r: int, k: int, k_old: int | None = None) -> Cost:
    """live = round(live - k_old experts + k experts): the same weights moved, the factors and the depth of both mixtures."""
    return switch_exact(shapes, r, k + (k if k_old is None else k_old))


def copy(nbytes: float) -> Cost:
    """A copy with this traffic: half of it read, half of it written."""
    return Cost(nbytes / 2, nbytes / 2, 0, 1)


def peft(shapes: Shapes, r: int, k: int, factor: int = 4) -> Cost:
    """PEFT's unmerge + merge of k adapters. factor: bytes of a factor's element.

    For each adapter, twice: delta = B A (written), delta * scaling (read, written), W += delta (both read, W written). So 3 matrices
    of the factors' dtype written or rewritten, 2 read, and W read and written; 3 launches.
    """
    weights, times = _elements(shapes), 2 * k
    unpadded = factor * r * sum(rows + cols for rows, cols in shapes)
    read = weights * (2 * factor + WEIGHT) + unpadded
    return Cost(read, weights * (2 * factor + WEIGHT), 2 * weights * r, 3 * len(shapes)) * times


def addmm_float32(shapes: Shapes, r: int, k: int) -> Cost:
    """The loop that is right: widen each matrix to float32, addmm_ each expert, round into place; the experts' factors are widened, too."""
    weights, wide = _elements(shapes), 4
    factors = factor_bytes(shapes, r)
    per_expert = Cost(wide * weights + 3 * factors, wide * weights + 2 * factors, 2 * weights * _padded(r), 3 * len(shapes))
    return Cost(WEIGHT * weights + wide * weights, wide * weights + WEIGHT * weights, 0, 2 * len(shapes)) + per_expert * k


def addmm_bfloat16(shapes: Shapes, r: int, k: int) -> Cost:
    """The loop that is fast: torch.addmm(base, b, a, out=live) copies base into live, and then reads and writes live once more.

    The chosen factors are gathered (read, written) and read by the GEMM; B is scaled on the way (read, written) and laid out anew.
    """
    weights, factors = _elements(shapes), k * factor_bytes(shapes, r)
    return Cost(2 * WEIGHT * weights + 4 * factors, 2 * WEIGHT * weights + 2 * factors, 2 * weights * k * _padded(r), 7 * len(shapes))


# ---------------------------------------------------------------------- ways to decode


def distinct_experts(num_adapters: int, k: int, tokens: int) -> float:
    """How many of N adapters at least one of `tokens` tokens chooses, on average, if each token chooses k of them at random."""
    return num_adapters * (1.0 - (1.0 - k / num_adapters) ** tokens)


def backbone_step(backbone: Backbone, tokens: int = 1, context: int = 0) -> Cost:
    """One decode step of `tokens` sequences: every linear and the LM head read once, and `context` cached keys and values per sequence."""
    weights = backbone.adapted + backbone.head
    cache = 2 * backbone.kv * backbone.layers * WEIGHT * tokens
    attention = 4 * backbone.hidden * backbone.layers * context * tokens
    launches = BACKBONE_LAUNCHES * backbone.layers + 2
    return Cost(WEIGHT * weights + cache * context, cache, 2 * weights * tokens + attention, launches)


def fused_step(backbone: Backbone, r: int, num_adapters: int, k: int, tokens: int = 1, context: int = 0) -> Cost:
    """A decode step with each token's own experts applied beside the weights: their factors are read besides, each expert's once."""
    experts = distinct_experts(num_adapters, k, tokens)
    flops = 2 * tokens * k * r * sum(rows + cols for rows, cols in backbone.shapes)
    launches = (FUSED_LAUNCHES - BACKBONE_LAUNCHES) * backbone.layers
    return backbone_step(backbone, tokens, context) + Cost(experts * factor_bytes(backbone.shapes, r), 0, flops, launches)


def lora_linear(rows: int, cols: int, r: int, num_adapters: int, k: int, tokens: int, experts: float | None = None) -> Cost:
    """y = W x + each token's experts: W, x and the chosen factors read once, y written; a prologue and a GEMV.

    experts: how many different ones the tokens chose; None: as many as random choices make. r as given: what a bank pads is read, too.
    """
    experts = distinct_experts(num_adapters, k, tokens) if experts is None else experts
    read = WEIGHT * (rows * cols + tokens * cols) + experts * WEIGHT * r * (rows + cols)
    return Cost(read, WEIGHT * tokens * rows, 2 * tokens * (rows * cols + k * r * (rows + cols)), 2)


def adapters(rows: int, cols: int, r: int, k: int, tokens: int, experts: float) -> Cost:
    """y += each token's experts, W x being there: x, y and the factors of the `experts` chosen ones read, y written; shrink and expand."""
    read = WEIGHT * tokens * (rows + cols) + experts * WEIGHT * r * (rows + cols)
    return Cost(read, WEIGHT * tokens * rows, 2 * tokens * k * r * (rows + cols), 2)


def linear(rows: int, cols: int, tokens: int) -> Cost:
    """y = W x."""
    return Cost(WEIGHT * (rows * cols + tokens * cols), WEIGHT * tokens * rows, 2 * tokens * rows * cols, 1)
