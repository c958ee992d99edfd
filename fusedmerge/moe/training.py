"""A plain training loop for injected models: AdamW over what is trainable, and a resume that continues bit by bit.

Anything that trains an nn.Module can train an injected model: examples/train_lora_switch.py does it with transformers' Trainer. This loop
is for those who want no more than a loop.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedmerge.errors import FormatError, InvalidTypeError, InvalidValueError, StateError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["learning_rate", "train"]

_OPERATION = "train"
_READ_EVERY = 10  # steps between two reads of the loss: reading waits for the device


def train(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    steps: int,
    *,
    lr: float = 1e-3,
    warmup_steps: int = 0,
    final_lr: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 0,
    progress: bool = True,
) -> list[float]:
    """Train the parameters that require gradients for `steps` optimiser steps; return each step's loss (balance and z-losses included).

    batches: keyword arguments of the model's forward, with labels, so that outputs.loss is there; tensors are moved to the model's device.
        Started again at its end. It draws from a random state of its own, seeded with `seed`: a shuffling DataLoader gives the same order
        whatever the model draws.
    lr: rises linearly over warmup_steps, then falls along a cosine to final_lr * lr (1.0: stays).
    accumulate: batches per step; their mean losses count equally.
    autocast: None, or torch.bfloat16: the forward runs in mixed precision. Parameters and optimiser state keep their dtype.
    seed: of dropout and of the order of batches; the caller's random state is left as it was.
    checkpoint: a file, written at the end and every checkpoint_every steps (0: at the end only), with the trainable parameters, the
        optimiser, and the random state. If it is there, training goes on from it, to the same bits as without the interruption (on a GPU:
        as far as torch's own kernels repeat theirs); the batches of the steps that are done are drawn and dropped.

    Raises InvalidTypeError, InvalidValueError, StateError (nothing trainable, a router whose width no forward has told, no loss, a loss
    that is not finite), FormatError (a checkpoint of another model or of other settings).
    """
    import torch
    from tqdm import tqdm

    settings = {
        "lr": lr, "warmup_steps": warmup_steps, "final_lr": final_lr, "betas": list(betas), "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm, "accumulate": accumulate, "autocast": str(autocast), "seed": seed,
        "steps": None if final_lr == 1.0 else steps,  # a constant rate may be trained on for longer
    }  # fmt: skip
    whole = {
        "steps": (steps, 1),
        "warmup_steps": (warmup_steps, 0),
        "accumulate": (accumulate, 1),
        "checkpoint_every": (checkpoint_every, 0),
    }
    rates = {"lr": lr, "final_lr": final_lr, "weight_decay": weight_decay, "max_grad_norm": 1.0 if max_grad_norm is None else max_grad_norm}
    _check_numbers(whole | {"seed": (seed, -(2**63))}, rates)
    trained = _check(model, autocast)
    device = next(iter(trained.values())).device
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, betas=betas, weight_decay=weight_decay)
    path = None if checkpoint is None else Path(checkpoint)
    was_training = model.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        stream = _stream(batches, seed)
        losses: list[float] = []
        unread: list[torch.Tensor] = []
        if path is not None and path.is_file():
            losses = _resume(path, trained, optimizer, settings, device)
            for _ in range(len(losses) * accumulate):
                next(stream)
        bar = tqdm(total=steps, initial=len(losses), disable=not progress, desc="train", unit="step")
        model.train()
        optimizer.zero_grad(set_to_none=True)
        try:
            for step in range(len(losses), steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, lr, warmup_steps, final_lr)
                total = torch.zeros((), device=device)
                for _ in range(accumulate):
                    batch = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in next(stream).items()}
                    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                        loss = getattr(model(**batch), "loss", None)
                    if loss is None:
                        raise StateError(_OPERATION, "outputs.loss", "a loss (batches with labels)", "none")
                    (loss / accumulate).backward()
                    total += loss.detach() / accumulate
                if max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(trained.values(), max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                unread.append(total)
                save = path is not None and (step + 1 == steps or (checkpoint_every and (step + 1) % checkpoint_every == 0))
                if save or step + 1 == steps or len(unread) == _READ_EVERY:
                    losses += _read(unread, len(losses))
                    bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
                if save and path is not None:
                    _save(path, trained, optimizer, settings, losses, device)
                bar.update()
        finally:
            bar.close()
            model.train(was_training)
            optimizer.zero_grad(set_to_none=True)
    return losses


def learning_rate(step: int, steps: int, lr: float, warmup_steps: int, final_lr: float) -> float:
    """The rate of a step: linear over the first warmup_steps, times a cosine from 1 to final_lr over all steps."""
    falling = final_lr + (1.0 - final_lr) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
    return lr * falling * (min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0)


def _check_numbers(whole: Mapping[str, tuple[Any, int]], rates: Mapping[str, Any]) -> None:
    for field, (value, least) in whole.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidTypeError(_OPERATION, field, "an int", repr(value))
        if value < least:
            raise InvalidValueError(_OPERATION, field, f"at least {least}", value)
    for field, value in rates.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InvalidTypeError(_OPERATION, field, "a number", repr(value))
        if not math.isfinite(value) or value < 0 or (field == "lr" and value == 0):
            raise InvalidValueError(_OPERATION, field, "a finite number of at least 0 (lr: above 0)", value)


def _check(model: nn.Module, autocast: torch.dtype | None) -> dict[str, nn.Parameter]:
    """The trainable parameters by name."""
    import torch

    if autocast not in (None, torch.bfloat16):
        raise InvalidValueError(_OPERATION, "autocast", "None or torch.bfloat16 (float16 would need a scaled loss)", autocast)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise StateError(_OPERATION, "model", "parameters that require gradients (is it injected?)", "none")
    for name, parameter in trained.items():
        if torch.nn.parameter.is_lazy(parameter):
            raise StateError(_OPERATION, name, "a parameter with a shape (run the model once)", "none yet")
    return trained


def _stream(batches: Iterable[Mapping[str, Any]], seed: int) -> Iterator[Mapping[str, Any]]:
    """The batches, over and over, drawn under a random state that nothing else moves."""
    import torch

    state = torch.Generator().manual_seed(seed).get_state()
    source: Iterator[Mapping[str, Any]] | None = None
    while True:
        with torch.random.fork_rng([]):
            torch.set_rng_state(state)
            batch = None if source is None else next(source, None)
            if batch is None:
                source = iter(batches)
                batch = next(source, None)
            state = torch.get_rng_state()
        if batch is None:
            raise InvalidValueError(_OPERATION, "batches", "at least one batch (and more, if it cannot be started again)", "none")
        yield batch


def _read(unread: list[torch.Tensor], done: int) -> list[float]:
    import torch

    values: list[float] = torch.stack(unread).tolist()
    unread.clear()
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise StateError(_OPERATION, f"loss of step {done + index}", "a finite number", value)
    return values


def _save(
    path: Path, trained: Mapping[str, nn.Parameter], optimizer: Any, settings: Mapping[str, Any], losses: list[float], device: torch.device
) -> None:
    """Written beside and renamed: an interrupted write leaves the last checkpoint."""
    import torch

    state = {
        "settings": dict(settings),
        "parameters": {name: parameter.detach() for name, parameter in trained.items()},
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "losses": losses,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    part.replace(path)


def _resume(
    path: Path, trained: Mapping[str, nn.Parameter], optimizer: Any, settings: Mapping[str, Any], device: torch.device
) -> list[float]:
    """Put a checkpoint's state in place, after all of it was checked; return the losses so far."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = {name: (list(tensor.shape), tensor.dtype) for name, tensor in state["parameters"].items()}
        differing = sorted(name for name in settings if state["settings"][name] != settings[name])
        losses = [float(loss) for loss in state["losses"]]
        random, optimizer_state = state["random"], state["optimizer"]
    except Exception as error:
        raise FormatError(_OPERATION, str(path), "a checkpoint that `train` wrote", f"{type(error).__name__}: {error}") from error
    if differing:
        had = {name: state["settings"][name] for name in differing}
        raise FormatError(_OPERATION, str(path), f"a checkpoint of { ({n: settings[n] for n in differing}) }", had)
    expected = {name: (list(parameter.shape), parameter.dtype) for name, parameter in trained.items()}
    if found != expected:
        name = next(n for n in [*expected, *found] if found.get(n) != expected.get(n))
        raise FormatError(_OPERATION, str(path), f"{name}: {expected.get(name, 'not there')}", found.get(name, "not there"))
    optimizer.load_state_dict(optimizer_state)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state["parameters"][name])
    torch.set_rng_state(random)
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["random_cuda"], device)
    return losses
