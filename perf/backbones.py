"""The shapes that the suites run on: the models of the paper and their kin, and small ones of the same proportions."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["LLAMA_2_7B", "LLAMA_3_8B", "LLAMA_70B_LAYER", "MISTRAL_7B", "Backbone", "Shapes"]

Shapes = list[tuple[int, int]]  # [(rows, cols)]


@dataclass(frozen=True)
class Backbone:
    """A Llama-like decoder's sizes."""

    name: str
    hidden: int
    intermediate: int
    kv: int  # rows of k_proj and of v_proj
    layers: int
    vocab: int
    head_dim: int = 128

    def linears(self) -> dict[str, tuple[int, int]]:
        """The adapted weights, {name: (rows, cols)}: seven linears per layer."""
        layer = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.kv, self.hidden),
            "self_attn.v_proj": (self.kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        return {f"model.layers.{i}.{name}.weight": shape for i in range(self.layers) for name, shape in layer.items()}

    @property
    def shapes(self) -> Shapes:
        """The adapted weights' shapes."""
        return list(self.linears().values())

    @property
    def adapted(self) -> int:
        """How many weights are adapted."""
        return sum(rows * cols for rows, cols in self.shapes)

    @property
    def head(self) -> int:
        """Weights of the LM head."""
        return self.vocab * self.hidden

    def scaled(self, hidden: int, layers: int) -> Backbone:
        """A small model of the same proportions, and named so."""

        def part(size: int) -> int:
            return max(16, 16 * round(size * hidden / self.hidden / 16))

        name = f"{self.name} in small ({hidden} wide, {layers} layer{'s' if layers > 1 else ''})"
        sizes = {"intermediate": part(self.intermediate), "kv": part(self.kv), "head_dim": min(64, part(self.kv))}
        return replace(self, name=name, hidden=hidden, layers=layers, vocab=1024, **sizes)


LLAMA_2_7B = Backbone("Llama-2-7B", 4096, 11008, 4096, 32, 32000)
MISTRAL_7B = Backbone("Mistral-7B", 4096, 14336, 1024, 32, 32000)
LLAMA_3_8B = Backbone("Llama-3-8B", 4096, 14336, 1024, 32, 128256)
LLAMA_70B_LAYER = Backbone("one layer of Llama-3-70B", 8192, 28672, 1024, 1, 128256)
