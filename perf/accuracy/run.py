"""One run after the other: pre-training, a method with one seed and learning rate, and its evaluation. Each is kept in a file when done."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fusedmerge as fm
from fusedmerge.errors import StateError
from fusedmerge.moe.routing import Record
from perf.accuracy import methods
from perf.accuracy.data import PRETRAINING, Data
from perf.accuracy.methods import Adapted, Method
from perf.accuracy.settings import Setting

# What a seed's generators are for: two of them never draw the same numbers.
TRAINING, VALIDATION, TEST = range(3)


@dataclass(frozen=True)
class Job:
    """One run. It depends on nothing else than what is here and on the data."""

    setting: Setting
    folder: str  # where finished runs are kept
    name: str
    method: Method
    r: int
    lr: float
    seed: int

    @property
    def path(self) -> Path:
        return Path(self.folder) / f"{self.name}-lr{self.lr:g}-seed{self.seed}.json"


def one_thread() -> None:
    """A process's beginning: several of them share the cores."""
    torch.set_num_threads(1)


def run(job: Job) -> dict[str, Any]:
    """Train and judge a method; read instead, if it was done before. A loss that is not finite: validation None."""
    if job.path.is_file():
        return dict(json.loads(job.path.read_text()))
    setting, data = job.setting, Data(job.setting.data.folder)
    state = torch.load(Path(job.folder) / "backbone.pt", weights_only=True)
    model = methods.build(setting, job.method, job.r, state, len(data.domains), job.seed)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        losses = fm.moe.train(
            model, Batches(setting, data, job.seed), setting.steps, lr=job.lr, warmup_steps=setting.steps // 8, final_lr=0.1,
            betas=(0.9, 0.95), seed=job.seed, autocast=torch.bfloat16 if setting.autocast else None, progress=False,
        )  # fmt: skip
    except StateError as error:
        found = {"validation": None, "diverged": str(error)}
        keep(job.path, found)
        return found
    found = {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "params": methods.trainable(model),
        "last_loss": losses[-1],
        "validation": evaluate(setting, data, model, job.seed, VALIDATION)["bits_per_byte"],
        **evaluate(setting, data, model, job.seed, TEST),
    }
    keep(job.path, found)
    return found


def keep(path: Path, found: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found) + "\n")
    part.replace(path)


class Batches:
    """A seed's training batches: the domains in turn, windows at random places. The same for all methods."""

    def __init__(self, setting: Setting, data: Data, seed: int) -> None:
        self.setting, self.data, self.seed = setting, data, seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        generator = np.random.default_rng([self.seed, TRAINING])
        count, names = self.setting.windows, self.data.domains
        turn = 0
        while True:
            domains = [(turn + index) % len(names) for index in range(count)]
            turn += count
            windows = [self.data.windows(names[d], "train", 1, self.setting.context, generator) for d in domains]
            tokens = torch.from_numpy(np.concatenate(windows))
            yield {"input_ids": tokens, "labels": tokens, "domain": torch.tensor(domains)}


def pretrain(setting: Setting, folder: Path) -> None:
    """Train the backbone on English manual pages, once."""
    path = folder / "backbone.pt"
    if path.is_file():
        return
    data = Data(setting.data.folder)
    model = methods.backbone(setting, len(data.token_bytes)).to(setting.device)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        generator = np.random.default_rng(0)
        while True:
            tokens = torch.from_numpy(data.windows(PRETRAINING, "train", setting.windows, setting.context, generator))
            yield {"input_ids": tokens, "labels": tokens}

    fm.moe.train(
        model, batches(), setting.pretraining_steps, lr=setting.pretraining_lr, warmup_steps=setting.pretraining_steps // 20, final_lr=0.1,
        betas=(0.9, 0.95), weight_decay=0.01, autocast=torch.bfloat16 if setting.autocast else None,
    )  # fmt: skip
    part = path.with_suffix(".part")
    torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, part)
    part.replace(path)


def backbone_alone(setting: Setting, folder: Path, seed: int) -> dict[str, Any]:
    """The backbone's bits per byte on a seed's test windows."""
    path = folder / f"{methods.BACKBONE}-seed{seed}.json"
    if not path.is_file():
        data = Data(setting.data.folder)
        model = methods.backbone(setting, len(data.token_bytes))
        model.load_state_dict(torch.load(folder / "backbone.pt", weights_only=True))
        keep(path, evaluate(setting, data, model.to(setting.device), seed, TEST))
    return dict(json.loads(path.read_text()))


@torch.no_grad()
def evaluate(setting: Setting, data: Data, model: nn.Module, seed: int, which: int) -> dict[str, Any]:
    """Bits per byte of each domain and their mean, on a seed's windows; of a model with routers also what they did."""
    generator = np.random.default_rng([seed, which])
    split = "test" if which == TEST else "validation"
    token_bytes = torch.from_numpy(data.token_bytes)
    adapted = model if isinstance(model, Adapted) else None
    per_domain, shares = {}, []
    model.eval()
    for index, name in enumerate(data.domains):
        tokens = torch.from_numpy(data.windows(name, split, setting.judged_windows, setting.context, generator))
        given = tokens.to(setting.device)
        with torch.autocast(setting.device, dtype=torch.bfloat16, enabled=setting.autocast):
            if adapted is None:
                logits = model(input_ids=given).logits
            else:
                domain = torch.full((len(tokens),), index, device=setting.device)
                with fm.moe.structure(adapted.model).recording() as records:
                    logits = adapted(given, domain).logits
                shares.append(expert_shares(records or adapted.given(given, domain)))
        nats = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), given[:, 1:].flatten(), reduction="sum")
        per_domain[name] = float(nats) / math.log(2) / int(token_bytes[tokens[:, 1:]].sum())
    found: dict[str, Any] = {"bits_per_byte": sum(per_domain.values()) / len(per_domain), "per_domain": per_domain}
    if shares and shares[0]:
        found["routers"] = {name: [share[name] for share in shares] for name in shares[0]}
    return found


def expert_shares(records: list[Record]) -> dict[str, list[float]]:
    """Router name -> [N]: the part of all gates that each expert got."""
    found = {}
    for record in records:
        mass = torch.zeros(record.logits.shape[-1], dtype=torch.float64)
        mass.scatter_add_(0, record.ids.flatten().long().cpu(), record.gates.flatten().double().cpu())
        found[record.name] = [round(float(share), 5) for share in mass / mass.sum()]
    return found
