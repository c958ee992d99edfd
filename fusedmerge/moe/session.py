"""One generation of a decoder: static buffers, a prefill, and a decode step that a CUDA graph can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from fusedmerge.errors import StateError
from fusedmerge.moe.decoder import Cache
from fusedmerge.moe.strategies import MERGED, make

if TYPE_CHECKING:
    from torch import Tensor

    from fusedmerge.moe.decoder import Decoder

__all__ = ["DecoderSession", "StepGraph"]

_WARM_UPS = 2  # libraries allocate workspaces, and kernels are compiled, at first use: not while a graph is captured


class DecoderSession:
    """Prefill, then step after step, with one strategy; close it (it is a context manager) and the weights are as they were.

    A prefill always runs un-merged, each token with its own experts. On a GPU the decode step is captured in one CUDA graph at its first
    call: embedding, routing, the switch or the experts beside each linear, attention over the whole static cache, and the LM head; the
    host waits for nothing. A merging strategy with B > 1 is not captured: it must see that all rows have one route, at every token. With
    capture=False nothing is: every kernel is launched from Python, as transformers does.
    """

    def __init__(self, decoder: Decoder, strategy: str, batch: int, capacity: int, *, capture: bool = True) -> None:
        self.decoder = decoder
        self.cache = Cache(decoder, batch, capacity)
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=decoder.device)  # [B, 1]
        self._position = torch.zeros(1, dtype=torch.int64, device=decoder.device)  # [1]
        self._logits = torch.zeros(batch, decoder.config.vocab, dtype=decoder.dtype, device=decoder.device)  # [B, V]
        self._length = 0  # what `_position` holds, on the host
        self._decode = make(decoder, strategy)
        self._prefill = make(decoder, "fused") if strategy in MERGED else self._decode
        self._last = self._prefill
        self._graph: StepGraph | None = None
        self._captures = capture and decoder.device.type == "cuda" and (batch == 1 or strategy not in MERGED)

    def prefill(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """The logits [B, V] after tokens [B, T], of which the first `padding` [B] positions of each row are empty. Starts anew."""
        self._reserve("prefill", 0, tokens.shape[1])
        self._decode.restore()
        self.cache.padding.copy_(torch.zeros_like(self.cache.padding) if padding is None else padding)
        self.cache.is_fresh = True
        self._last = self._prefill
        positions = self.cache.slots[: tokens.shape[1]]  # [T]
        hidden = self.decoder.hidden(tokens, self.cache, positions, tokens.shape[1], self._prefill)  # [B, T, hidden]
        self.cache.is_fresh = False
        self._position.fill_(self._length)
        return self.decoder.head(hidden[:, -1])

    def step(self, tokens: Tensor) -> Tensor:
        """The logits [B, V] after one more token of each row, tokens [B]. The next step overwrites them."""
        self._reserve("step", self._length, 1)
        self._tokens.copy_(tokens[:, None])
        self._last = self._decode
        if self._captures and self._graph is None:
            self._graph = StepGraph(self._step, lambda: self._position.fill_(self._length - 1))
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()
        return self._logits

    @property
    def chosen(self) -> Mapping[str | None, tuple[Tensor, Tensor]]:
        """What each router chose in the last prefill or step: ids [B, T, k] and gates [B, T, k]. Empty for a backbone."""
        return self._last.chosen

    def _step(self) -> None:
        """Reads `_tokens` and `_position`; writes the cache, `_logits`, and the next `_position`."""
        hidden = self.decoder.hidden(self._tokens, self.cache, self._position, self.cache.capacity, self._decode)  # [B, 1, hidden]
        self._logits.copy_(self.decoder.head(hidden[:, 0]))
        self._position += 1

    def _reserve(self, operation: str, length: int, count: int) -> None:
        if length + count > self.cache.capacity:
            raise StateError(operation, "cache", f"at most {self.cache.capacity} positions", length + count)
        self._length = length + count

    def close(self) -> None:
        """Restore the weights."""
        self._graph = None
        self._decode.close()

    def __enter__(self) -> DecoderSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StepGraph:
    """A step captured in a CUDA graph. `reset` undoes what a step did to the state that it reads."""

    def __init__(self, step: Callable[[], None], reset: Callable[[], object]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                step()
                reset()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            step()

    def replay(self) -> None:
        """Run the step once."""
        self._graph.replay()
