"""Generation by every strategy, for injected transformers models and for the reference decoder."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch

from fusedmerge.errors import DeviceError, InvalidTypeError, InvalidValueError
from fusedmerge.moe.auto import choose
from fusedmerge.moe.decoder import Decoder, check_tokens
from fusedmerge.moe.model_session import ModelSession
from fusedmerge.moe.session import DecoderSession
from fusedmerge.moe.strategies import STRATEGIES
from fusedmerge.moe.structure import find
from fusedmerge.shared import shared

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Session", "generate"]

_OP = "generate"
_TURNS: WeakKeyDictionary[torch.nn.Module | Decoder, threading.RLock] = WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()


class Session(Protocol):
    """One generation: what `generate` needs of a model."""

    def prefill(self, tokens: Tensor, padding: Tensor | None) -> Tensor:
        """Logits [B, V] after tokens [B, T]."""

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] after one more token [B] of each row."""


def generate(
    model: torch.nn.Module | Decoder,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    strategy: str = "auto",
    attention_mask: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue input_ids int64 [B, T] by up to max_new_tokens: int64 [B, T + new].

    model: a transformers model that `inject` has changed, or a `Decoder`. attention_mask [B, T]: zeros for padding, at the left.
    eos_token_id: one or several ids that end a row; it is filled with the first of them until all rows have ended (the host then waits for
    each token; without one, all rows get max_new_tokens). temperature 0: the likeliest token; else a sample, from `generator` if given.

    strategy: "backbone" (no experts), "unfused", "merged-simple", "merged", "fused" (see `fusedmerge.moe.strategies`), or "auto", which
    picks one of the last two by expected cost (`fusedmerge.moe.auto`). The prompt always runs un-merged, each token with its own experts.
    "merged" and "merged-simple" need one route for the whole batch. The weights are restored on return, also after an exception. Meanwhile
    the model is not to be used otherwise; generations of one model that several threads ask for wait for each other.

    Raises InvalidTypeError, InvalidValueError, ShapeError, DtypeError, DeviceError for arguments; StateError for a strategy that this model
    cannot run, and for rows whose routes differ while a strategy merges.
    """
    vocab, device = _vocabulary(model)
    padding = check_tokens(_OP, input_ids, attention_mask, vocab, device)
    ends = _check_sampling(max_new_tokens, strategy, eos_token_id, temperature, generator, vocab, device)
    tokens = input_ids.long()
    if max_new_tokens == 0:
        return tokens.clone()

    def run() -> Tensor:
        with _turn(model), torch.no_grad(), _open(model, strategy, tokens, max_new_tokens) as session:
            return torch.cat([tokens, _continue(session, tokens, padding, max_new_tokens, ends, temperature, generator)], dim=1)

    return _as_written(run)


def _turn(model: torch.nn.Module | Decoder) -> threading.RLock:
    """Held for a generation, which acts on the whole model: its weights, its linears, its mode."""
    found = None if isinstance(model, Decoder) else find(model)
    with _TURNS_LOCK:
        return _TURNS.setdefault(model if found is None else found.model, threading.RLock())  # the one inside torch.compile's and DDP's


def _as_written(run: Callable[[], Tensor]) -> Tensor:
    """`run()`, inside which compiled models run as they were written: a graph knows nothing of hooks that came after it, which merge. The
    caller may be a compiled function."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and the import takes seconds
        return run()

    def eager() -> Tensor:
        with _force_eager():
            return run()

    result: Tensor = torch.compiler.disable(eager)()
    return result


@shared
@contextmanager
def _force_eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def _continue(
    session: Session,
    tokens: Tensor,
    padding: Tensor | None,
    count: int,
    ends: Tensor | None,
    temperature: float,
    generator: torch.Generator | None,
) -> Tensor:
    """The new tokens [B, new]."""
    logits = session.prefill(tokens, padding)  # [B, V]
    found: list[Tensor] = []
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)  # [B]
    while True:
        token = _sample(logits, temperature, generator)  # [B]
        if ends is not None:
            token = torch.where(ended, ends[0], token)
            ended |= torch.isin(token, ends)
        found.append(token)
        if len(found) == count or (ends is not None and bool(ended.all())):
            return torch.stack(found, dim=1)
        logits = session.step(token)


def _sample(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """[B, V] -> [B]."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    shares = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(shares, 1, generator=generator)[:, 0]


def _open(model: torch.nn.Module | Decoder, strategy: str, tokens: Tensor, new_tokens: int) -> AbstractContextManager[Session]:
    strategy = choose(model, tokens, new_tokens) if strategy == "auto" else strategy
    if isinstance(model, Decoder):
        return DecoderSession(model, strategy, len(tokens), tokens.shape[1] + new_tokens)
    return ModelSession(model, strategy)


def _vocabulary(model: Any) -> tuple[int, torch.device]:
    if isinstance(model, Decoder):
        return model.config.vocab, model.device
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embedding is None:
        raise InvalidTypeError(_OP, "model", "a causal language model of transformers", type(model).__name__)
    return int(embedding.weight.shape[0]), embedding.weight.device


def _check_sampling(
    max_new_tokens: Any, strategy: Any, eos_token_id: Any, temperature: Any, generator: Any, vocab: int, device: torch.device
) -> Tensor | None:
    """Check what is not a token, and return the ids that end a row."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
        raise InvalidTypeError(_OP, "max_new_tokens", "an int", type(max_new_tokens).__name__)
    if max_new_tokens < 0:
        raise InvalidValueError(_OP, "max_new_tokens", "at least 0", max_new_tokens)
    if strategy not in STRATEGIES:
        raise InvalidValueError(_OP, "strategy", f"one of {', '.join(STRATEGIES)}", repr(strategy))
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise InvalidTypeError(_OP, "temperature", "a number", type(temperature).__name__)
    if not 0 <= temperature < math.inf:
        raise InvalidValueError(_OP, "temperature", "a finite number of at least 0", temperature)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise InvalidTypeError(_OP, "generator", "a torch.Generator", type(generator).__name__)
        if generator.device.type != device.type:
            raise DeviceError(_OP, "generator", f"one on the model's device ({device})", generator.device)
    if eos_token_id is None:
        return None
    ids = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
    if not isinstance(ids, Sequence) or isinstance(ids, str) or not all(isinstance(x, int) and not isinstance(x, bool) for x in ids):
        raise InvalidTypeError(_OP, "eos_token_id", "an int or ints", repr(eos_token_id))
    if not ids or not all(0 <= x < vocab for x in ids):
        raise InvalidValueError(_OP, "eos_token_id", f"0 to {vocab - 1}", repr(eos_token_id))
    return torch.tensor(list(ids), device=device)
