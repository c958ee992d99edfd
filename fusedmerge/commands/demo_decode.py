"""The demo decodes: LoRA-MoE models of several methods, by every strategy, on the same tokens, with errors against float64 truth."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fusedmerge.commands.demo_setup import Stage

if TYPE_CHECKING:
    import torch

    from fusedmerge.moe.decoder import Decoder
    from fusedmerge.moe.generate import Session

__all__ = ["EXPERTS", "Run", "decode", "errors", "inject_experts", "launches", "peak_bytes"]

EXPERTS, TOP_K, RANK = 8, 2, 16  # the same for every method
PROMPT = 16  # tokens
BY_DECODER = {
    "lora": ("merged", "fused"),
    "lora_switch": ("unfused", "merged-simple", "merged", "fused"),
    "mola": ("unfused", "merged-simple", "fused"),
    "mixlora": ("unfused", "fused"),
}
BY_TRANSFORMERS = {
    "lora_switch": ("unfused", "merged", "fused"),
    "moral": ("unfused", "fused"),
    "molora": ("unfused",),
    "loramoe": ("unfused",),
    "xlora": ("unfused",),
    "pesc": ("unfused",),
}


@dataclass
class Run:
    """One row: a model of its own, since a merging strategy writes into its weights."""

    engine: str  # "decoder" or "transformers"
    method: str
    strategy: str
    model: Any  # Decoder or nn.Module
    capture: bool = True  # a decoder's step in a CUDA graph, where it can be

    def open(self, capacity: int, batch: int = 1) -> Any:
        """A session for `batch` sequences of `capacity` tokens."""
        from fusedmerge.moe.model_session import ModelSession
        from fusedmerge.moe.session import DecoderSession

        if self.engine == "decoder":
            return DecoderSession(self.model, self.strategy, batch, capacity, capture=self.capture)
        return ModelSession(self.model, self.strategy)

    @property
    def routers(self) -> Mapping[str, Any]:
        from fusedmerge.moe.structure import structure

        if self.strategy == "backbone":
            return {}
        return self.model.experts.routers if self.engine == "decoder" else structure(self.model).routers

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The backbone's weights."""
        if self.engine == "decoder":
            return dict(self.model.weights)
        return dict(self.model.state_dict())


def decode(stage: Stage, step: Callable[[], Any]) -> dict[str, Any]:
    """Decode the same tokens with every method and strategy; time, launches, memory and errors of each.

    The tokens are sampled once, from the fused lora_switch model. Times are of one step each, the rows in turn. `step`: once per token.
    """
    import torch

    from fusedmerge.commands.demo_checks import same_bits
    from fusedmerge.moe.measure import count_launches

    runs = _runs(stage)
    tokens = _tokens(stage, _find(runs, "lora_switch", "fused").model)
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), ExitStack() as stack:
        for run in runs:
            stage.progress(f"{run.method}, {run.strategy}")
            before = {name: tensor.clone() for name, tensor in run.tensors.items()}
            row: dict[str, Any] = {"engine": run.engine, "method": run.method, "strategy": run.strategy}
            rows.append(row | errors(run, tokens) | {"peak_bytes": peak_bytes(run, tokens)})
            rows[-1]["restored_bitwise"] = same_bits(run.tensors, before)
        stage.progress("decoding")
        sessions = [stack.enter_context(run.open(tokens.shape[1])) for run in runs]
        seconds = _times(sessions, tokens, step)
        counts = [launches(session, tokens) for session in sessions]
    for row, count, samples in zip(rows, counts, seconds, strict=True):
        row["launches"] = count
        backbone = next(i for i, other in enumerate(rows) if other["engine"] == row["engine"] and other["strategy"] == "backbone")
        row["median_ms"] = 1e3 * statistics.median(samples)
        row["over_backbone"] = statistics.median(s / b for s, b in zip(samples, seconds[backbone], strict=True)) - 1
        row["samples_ms"] = [round(1e3 * s, 4) for s in samples]
    router = _find(runs, "lora_switch", "merged").routers["router"]
    hidden = torch.zeros(1, 1, stage.config.model.hidden, dtype=torch.bfloat16)
    return {
        "rows": rows,
        "experts": EXPERTS,
        "top_k": TOP_K,
        "rank": RANK,
        "prompt": PROMPT,
        "tokens": tokens.shape[1] - PROMPT,
        "device": tokens.device.type,
        "router_launches": count_launches(lambda: router(hidden), tokens.device),
    }


def _find(runs: Sequence[Run], method: str, strategy: str) -> Run:
    return next(run for run in runs if (run.method, run.strategy) == (method, strategy))


# ---------------------------------------------------------------------- models


def _runs(stage: Stage) -> list[Run]:
    from fusedmerge.moe.decoder import Decoder

    base, models = stage.out / "base", {}
    for method in [*BY_DECODER, *(m for m in BY_TRANSFORMERS if m not in BY_DECODER)]:
        stage.progress(f"writing {method} experts")
        models[method] = _write_experts(stage, method)
    plain = "(no experts)"
    runs = [Run("decoder", plain, "backbone", Decoder.from_pretrained(base))]
    for method, strategies in BY_DECODER.items():
        experts = stage.out / "moe" / method
        runs += [Run("decoder", method, strategy, Decoder.from_pretrained(base, experts=experts)) for strategy in strategies]
    runs.append(Run("transformers", plain, "backbone", copy.deepcopy(stage.base)))
    for method, strategies in BY_TRANSFORMERS.items():
        runs += [Run("transformers", method, strategy, copy.deepcopy(models[method])) for strategy in strategies]
    return runs


def _write_experts(stage: Stage, method: str) -> Any:
    """A copy of the base with random experts, saved to out/moe/<method>."""
    import fusedmerge as fm

    sizes: dict[str, Any] = {} if method == "lora" else {"num_experts": EXPERTS, "top_k": TOP_K}
    model = inject_experts(copy.deepcopy(stage.base), stage.config.delta, stage.config.seed, method=method, r=RANK, **sizes)
    fm.moe.save(model, stage.out / "moe" / method)
    return model


def inject_experts(model: Any, delta: float, seed: int, *, r: int, **config: Any) -> Any:
    """Adapt a bfloat16 `model` with random experts of |delta| / |W| each, and routers with preferences. config: LoRAMoEConfig's."""
    import torch

    import fusedmerge as fm

    config = {"lora_alpha": 2 * r, "init_lora_weights": False, "router_init_std": 0.1, **config}
    fm.moe.inject(model, fm.moe.LoRAMoEConfig(r=r, **config), seed=seed)
    with torch.no_grad():
        parts: Any = fm.moe.structure(model).parts.values()
        for part in parts:
            linear = next(module for module in part.base_layer.modules() if isinstance(module, torch.nn.Linear))
            weight = linear.weight.float().norm() * (part.lora_B.shape[1] * part.lora_A.shape[2] / linear.weight.numel()) ** 0.5
            deltas = torch.einsum("nor,nri->noi", part.lora_B, part.lora_A).flatten(1).norm(dim=1) * part.scaling
            part.lora_B *= (delta * weight / deltas)[:, None, None]
            part.lora_A.copy_(part.lora_A.bfloat16())  # so that the factors of the float64 truth are those that bfloat16 weights get
            part.lora_B.copy_(part.lora_B.bfloat16())
    return model.eval()


def _tokens(stage: Stage, decoder: Decoder) -> torch.Tensor:
    import torch

    import fusedmerge as fm

    generator = torch.Generator().manual_seed(stage.config.seed)
    prompt = torch.randint(0, stage.config.model.vocab, (1, PROMPT), generator=generator)
    return fm.moe.generate(decoder, prompt, stage.config.tokens, strategy="fused", temperature=1.0, generator=generator)


# ---------------------------------------------------------------------- measures


def errors(run: Run, tokens: torch.Tensor, prompt: int = PROMPT) -> dict[str, float]:
    """Relative errors of the logits after each token [B, T] beyond the prompt: ||logits - truth|| / ||truth||, the truth in float64 over
    the same routes."""
    import torch

    routes: dict[str, list[Any]] = {name: [] for name in run.routers}
    with replace(run, capture=False).open(tokens.shape[1], len(tokens)) as session:
        if run.engine == "decoder":  # its kernels choose without calling the routers
            found = _decoded(session, tokens, prompt, routes)
        else:
            with _recorded(run.routers, routes):
                found = _decoded(session, tokens, prompt)
    if run.engine == "decoder" and run.capture and tokens.is_cuda:  # a captured step routes alike
        with run.open(tokens.shape[1], len(tokens)) as session:
            found = _decoded(session, tokens, prompt)
    with _played_back(run.routers, routes):
        if run.engine == "decoder":
            exact = run.model.to(torch.float64).logits(tokens, strategy="backbone" if run.strategy == "backbone" else "fused")
        else:
            exact = copy.deepcopy(run.model).double()(tokens, use_cache=False).logits
    exact = exact[:, prompt - 1 :]
    apart = (found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    return {"max_error": float(apart.max()), "mean_error": float(apart.mean())}


def _decoded(session: Any, tokens: torch.Tensor, prompt: int, routes: Mapping[str, list[Any]] | None = None) -> torch.Tensor:
    """The logits [B, T - prompt + 1, V] after the prompt and each token; a DecoderSession's choices meanwhile go to `routes`."""
    import torch

    def noted(logits: torch.Tensor) -> torch.Tensor:
        for name, choices in (routes or {}).items():
            choices.append(tuple(part.clone() for part in session.chosen[name]))
        return logits.clone()

    found = [noted(session.prefill(tokens[:, :prompt], None))]
    return torch.stack([*found, *(noted(session.step(tokens[:, t])) for t in range(prompt, tokens.shape[1]))], dim=1)


@contextmanager
def _recorded(routers: Mapping[str, Any], found: Mapping[str, list[Any]]) -> Iterator[None]:
    """What the routers choose meanwhile goes to `found`, by name."""

    def recording(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            found[name].append(forward(*given))
            return found[name][-1]

        return call

    with _replaced({name: recording(name, router.forward) for name, router in routers.items()}, routers):
        yield


@contextmanager
def _played_back(routers: Mapping[str, Any], found: Mapping[str, Sequence[Any]]) -> Iterator[None]:
    """Routers that choose once more what they chose, for all tokens at once: in float64 a near tie could fall the other way."""
    import torch

    def join(calls: Sequence[Any]) -> Any:
        """Of what a router gave, call by call: tensors [B, T, ...], or tuples and dicts of them."""
        first = calls[0]
        if isinstance(first, torch.Tensor):
            return torch.cat(list(calls), dim=1)
        if isinstance(first, Mapping):
            return {key: join([call[key] for call in calls]) for key in first}
        return tuple(join(parts) for parts in zip(*calls, strict=True))

    routes = {name: join(calls) for name, calls in found.items()}
    with _replaced({name: (lambda *_, name=name: routes[name]) for name in routers}, routers):
        yield


@contextmanager
def _replaced(forwards: Mapping[str, Callable[..., Any]], routers: Mapping[str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, router in routers.items():
            router.__dict__["forward"] = forwards[name]
            stack.callback(router.__dict__.pop, "forward")
        yield


def peak_bytes(run: Run, tokens: torch.Tensor, prompt: int = PROMPT) -> int:
    """Bytes of the model and its experts, and whatever a session, a prefill and two steps take beside them at most."""
    from fusedmerge.moe.measure import peak_memory

    def call() -> None:
        with run.open(tokens.shape[1], len(tokens)) as session:
            session.prefill(tokens[:, :prompt], None)
            for t in range(prompt, min(prompt + 2, tokens.shape[1])):
                session.step(tokens[:, t])

    held = sum(tensor.nbytes for tensor in run.tensors.values())
    if run.engine == "decoder" and run.model.experts is not None:
        held += sum(linear.a.nbytes + linear.b.nbytes for linear in run.model.experts.linears.values())
    return held + peak_memory(call, tokens.device)


def _times(sessions: Sequence[Session], tokens: torch.Tensor, step: Callable[[], Any]) -> list[list[float]]:
    """Seconds of every step of every session, in an order that changes each time."""
    seconds: list[list[float]] = [[] for _ in sessions]
    for session in sessions:
        session.prefill(tokens[:, :PROMPT], None)
    for t in range(PROMPT, tokens.shape[1]):
        for index in [(t + i) % len(sessions) for i in range(len(sessions))]:
            start = time.perf_counter()
            sessions[index].step(tokens[:, t])
            seconds[index].append(time.perf_counter() - start)
        step()
    return seconds


def launches(session: Session, tokens: torch.Tensor, prompt: int = PROMPT) -> int:
    """Of one step."""
    from fusedmerge.moe.measure import count_launches

    token = tokens[:, prompt]
    session.prefill(tokens[:, :prompt], None)
    session.step(token)
    return count_launches(lambda: session.step(token), token.device)
