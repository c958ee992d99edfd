"""What a LoRA adapter is, whatever file it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fusedmerge.errors import ShapeError

if TYPE_CHECKING:
    import torch

__all__ = ["Adapter", "Factors"]


@dataclass(frozen=True)
class Factors:
    """One adapter on one target, as trained: delta = scaling * b @ a (transposed where the weight is stored as [in, out])."""

    a: torch.Tensor  # [r, in]
    b: torch.Tensor  # [out, r]
    scaling: float  # alpha / r, or alpha / sqrt(r) with rslora
    transposed: bool = False  # the weight is stored as [in, out]: Conv1D ([in, out]) and embeddings ([vocab, dim])

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def oriented(self, shape: tuple[int, int], transposed: bool | None, operation: str, what: str) -> Factors:
        """The factors of the weight as stored, so that scaling * b @ a has `shape`.

        `transposed` is what the weight's module says (None: unknown). Where the shape allows one reading only, the shape decides,
        since PEFT writes a single `fan_in_fan_out` for models that hold both kinds; a square weight is read as the module says,
        or else as the adapter's own file says.
        """
        plain = (int(self.b.shape[0]), int(self.a.shape[1]))
        flipped = plain[::-1]
        if shape not in (plain, flipped):
            raise ShapeError(operation, what, f"delta B A of shape {list(shape)}", f"{list(plain)} (rank {self.rank})")
        if plain == flipped:
            flip = self.transposed if transposed is None else transposed
        else:
            flip = shape == flipped
            if transposed is not None and flip != transposed:
                raise ShapeError(operation, what, f"delta B A of shape {list(flipped if transposed else plain)}", list(shape))
        if not flip:
            return Factors(self.a, self.b, self.scaling)
        return Factors(self.b.t(), self.a.t(), self.scaling)


@dataclass(frozen=True)
class Adapter:
    """One adapter: its factors by weight name, and the configuration they came with."""

    name: str
    targets: Mapping[str, Factors]  # canonical weight name (see fusedmerge.weights) -> factors
    config: Mapping[str, Any] = field(default_factory=dict)
    base_weights: Mapping[str, torch.Tensor] = field(default_factory=dict)  # base weights the file carries; must equal the base's bits

    @property
    def nbytes(self) -> int:
        return sum(f.a.nbytes + f.b.nbytes for f in self.targets.values())
