"""What is run in each setting. All of it goes into the key under which finished runs are kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

__all__ = ["BUILD", "SETTINGS", "DataSetting", "Setting", "key_of"]

BUILD = Path(__file__).resolve().parents[2] / "build" / "accuracy"


def key_of(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class DataSetting:
    domains: tuple[str, ...]  # as far as the machine has them
    vocabulary: int  # of the BPE; 257: bytes
    domain_bytes: int  # of training text, at most; validation and test have up to 1/8 and 1/4 of it
    pretraining_bytes: int
    least_domains: int = 6

    @property
    def folder(self) -> Path:
        """Another one when the code that builds it changes."""
        return BUILD / f"data-{key_of(asdict(self), Path(__file__).with_name('data.py').read_text())}"


@dataclass(frozen=True)
class Setting:
    data: DataSetting
    device: str
    # the backbone: a Llama
    hidden: int
    intermediate: int
    layers: int
    heads: int
    context: int  # tokens in a window
    windows: int  # in a batch, one domain after the other
    pretraining_steps: int
    pretraining_lr: float
    # the methods
    steps: int
    r: int  # of lora_switch; the others' follows from the number of parameters
    num_experts: int = 8
    top_k: int = 2
    learning_rates: tuple[float, ...] = (2e-3, 5e-3, 10e-3)
    seeds: int = 5
    judged_windows: int = 24  # of each domain, in validation and in test
    autocast: bool = False
    processes: int = 2
    despite_gate: bool = False  # go on without headroom: no result then

    def text(self, domains: int) -> str:
        return (
            f"Llama of width {self.hidden}, {self.layers} layers, context {self.context}, vocabulary {self.data.vocabulary}, "
            f"pre-trained on English manual pages for {self._tokens(self.pretraining_steps)} tokens; {domains} unseen domains, "
            f"{self._tokens(self.steps)} tokens of training per run; "
            f"N = {self.num_experts}, r = {self.r}, top-{self.top_k}; {self.seeds} seeds"
        )

    def _tokens(self, steps: int) -> str:
        return f"{steps * self.windows * self.context / 1e6:.2g} M"


_DOMAINS = ("de", "fr", "es", "pl", "ru", "python", "c", "javascript")

SETTINGS = {
    # On two cores: pre-training 2 minutes, 56 runs of 24 s in two one-thread processes. N r is below the width, r >= 9 for MoLoRA's size.
    "cpu": Setting(
        DataSetting(_DOMAINS, vocabulary=2048, domain_bytes=2_000_000, pretraining_bytes=6_000_000),
        device="cpu", hidden=80, intermediate=208, layers=4, heads=2, context=128, windows=16,
        pretraining_steps=1000, pretraining_lr=4e-3, steps=130, r=9,
    ),
    # Sized by arithmetic for 25 minutes on an H100; it has not run.
    "gpu": Setting(
        DataSetting(_DOMAINS, vocabulary=4096, domain_bytes=6_000_000, pretraining_bytes=24_000_000),
        device="cuda", hidden=512, intermediate=1536, layers=8, heads=8, context=512, windows=64,
        pretraining_steps=3000, pretraining_lr=1e-3, steps=150, r=16, judged_windows=32, autocast=True, processes=1,
    ),
    # Seconds: shows that everything runs, and nothing else.
    "smoke": Setting(
        DataSetting(("de", "fr", "python", "c"), vocabulary=512, domain_bytes=100_000, pretraining_bytes=200_000, least_domains=2),
        device="cpu", hidden=32, intermediate=64, layers=4, heads=2, context=32, windows=4,
        pretraining_steps=20, pretraining_lr=4e-3, steps=3, r=16, seeds=2, learning_rates=(5e-3, 10e-3), judged_windows=2,
        despite_gate=True,
    ),
}  # fmt: skip
SETTINGS["cpu_bytes"] = replace(SETTINGS["cpu"], data=replace(SETTINGS["cpu"].data, vocabulary=257), context=256, windows=8)
