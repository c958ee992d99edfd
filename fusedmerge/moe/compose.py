"""Independent adapters as the experts of one lora_switch model: with a router trained on top, or with a table and no training."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusedmerge.bank import AdapterBank
from fusedmerge.errors import InvalidTypeError, InvalidValueError, StateError, UnknownNameError
from fusedmerge.formats.lora import Adapter, Factors
from fusedmerge.moe.config import LoRAMoEConfig
from fusedmerge.moe.inject import eject, inject
from fusedmerge.moe.published import PREFIX, stacked
from fusedmerge.moe.routing import TableRouter
from fusedmerge.moe.structure import Structure, injected
from fusedmerge.moe.targets import make_plan, token_embedding

if TYPE_CHECKING:
    PathLike = str | os.PathLike[str]
    Choice = int | str | Sequence[int | str] | Mapping[int | str, float]

__all__ = ["compose", "token_table"]


def compose(
    model: nn.Module,
    adapters: AdapterBank | Mapping[str, PathLike] | Sequence[PathLike],
    *,
    top_k: int = 2,
    table: Mapping[int, Choice] | None = None,
    hold: bool = False,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Adapt `model` in place with existing adapters as experts, and return it. LoRA-Switch's experts, trained apart from each other.

    adapters: PEFT directories, {name: directory}, or an AdapterBank. Adapters may differ in rank, scaling and targets; a target that an
    adapter lacks is 0 there. Factors become float32 and stay frozen (train_experts=True to train them). A router (top_k of them per token)
    is added on top, to be trained.
    table: no router, but {token id: experts}: a name or number, several of them (gate 1 each, duplicates add), or {name: gate}; [] is
    none. A token that is not in the table has none. top_k is then the longest entry. hold: it keeps the last choice before it instead
    (control tokens).
    options: further fields of LoRAMoEConfig.

    Raises as AdapterBank.from_peft and inject do; InvalidValueError, UnknownNameError for a table that does not fit.
    """
    bank = adapters if isinstance(adapters, AdapterBank) else AdapterBank.from_peft(adapters, model, "cpu", torch.float32)
    if fixed := sorted({"method", "num_experts", "target_modules", "r", "lora_alpha", "router", "expert_names"} & options.keys()):
        raise InvalidValueError("compose", "options", "fields that the adapters leave open", ", ".join(fixed))
    members = [_adapter(bank, name) for name in bank.names]
    rows = _parse_table(table, bank.names) if table is not None else None
    config = LoRAMoEConfig(
        method="lora_switch",
        num_experts=len(members),
        top_k=max(len(row) for row in rows.values()) if rows else top_k,
        r=max(pair.rank for adapter in members for pair in adapter.targets.values()),
        target_modules=tuple(name.removesuffix(".weight") for name in bank.targets),
        router="learned" if rows is None else "control" if hold else "table",
        expert_names=bank.names,
        **{"train_experts": False, **options},
    )
    plan = make_plan(model, config, "compose")
    tensors = stacked(members, plan, int(config.r or 0))
    inject(model, config, seed)
    try:
        made = injected(model, "compose")
        for name, part in made.parts.items():
            for attribute, field in (("lora_A", "lora_A.weight"), ("lora_B", "lora_B.weight"), ("scaling", "scaling")):
                own: torch.Tensor = getattr(part, attribute)
                own.data.copy_(tensors[f"{PREFIX}{name}.{field}"])
        if rows is not None:
            _set_table(made, rows)
    except BaseException:
        eject(model)
        raise
    return model


def _adapter(bank: AdapterBank, name: str) -> Adapter:
    slot, targets = bank.slot(name), {}
    for target in bank.targets:
        stack = bank.target(target)
        if stack.spec.transposed:
            raise InvalidTypeError("compose", target, "the weight of an nn.Linear", "one that is stored as [in, out]")
        if rank := stack.ranks[slot]:
            a, b = stack.a[slot, :rank].float().cpu(), stack.b[slot, :, :rank].float().cpu()
            targets[target] = Factors(a, b, stack.scalings[slot])
    return Adapter(name, targets)


def _parse_table(table: Mapping[int, Choice], names: Sequence[str]) -> dict[int, dict[int, float]]:
    """{token id: {expert: gate}}."""
    if not isinstance(table, Mapping) or not table:
        raise InvalidTypeError("compose", "table", "{token id: experts}, not empty", repr(table)[:80])
    rows: dict[int, dict[int, float]] = {}
    for token, choice in table.items():
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise InvalidValueError("compose", "table", "token ids of at least 0", repr(token))
        given = [choice] if isinstance(choice, (int, str)) else choice
        if not isinstance(given, (Mapping, Sequence)):
            raise InvalidTypeError("compose", f"table[{token}]", "an expert, several of them, or {expert: gate}", repr(choice))
        row: dict[int, float] = {}
        for expert, gate in given.items() if isinstance(given, Mapping) else ((expert, 1.0) for expert in given):
            index = names.index(expert) if expert in names else expert
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(names):
                raise UnknownNameError("compose", f"table[{token}]", f"one of {', '.join(names)}, or 0 to {len(names) - 1}", repr(expert))
            if isinstance(gate, bool) or not isinstance(gate, (int, float)):
                raise InvalidTypeError("compose", f"table[{token}]: gate", "a number", repr(gate))
            if not math.isfinite(gate):
                raise InvalidValueError("compose", f"table[{token}]: gate", "a finite number", gate)
            row[index] = row.get(index, 0.0) + gate
        rows[token] = row
    if not any(rows.values()):
        raise InvalidValueError("compose", "table", "at least one expert", "none")
    return rows


def _set_table(made: Structure, rows: Mapping[int, Mapping[int, float]]) -> None:
    router = made.routers["router"]
    assert isinstance(router, TableRouter)
    if max(rows) >= len(router.ids):
        raise InvalidValueError("compose", "table", f"token ids below {len(router.ids)} (the vocabulary)", max(rows))
    ids, gates, steers = torch.full_like(router.ids, -1), torch.zeros_like(router.gates), torch.zeros_like(router.steers)
    for token, row in rows.items():
        steers[token] = True
        for place, (expert, gate) in enumerate(row.items()):
            ids[token, place], gates[token, place] = expert, gate
    router.ids, router.gates, router.steers = ids, gates, steers


class _Reached(Exception):
    """Ends a forward at the first adapted linear."""


@torch.no_grad()
def token_table(model: Any, chunk: int = 4096) -> TableRouter:
    """The routing of every token id, for a lora_switch model whose first adapted linear sees nothing but the token's embedding (the first
    layer's q_proj does, under rotary positions): a table to route with before the forward. ids int32 [V, k], gates float32 [V, k].

    Found by execution: one forward up to that linear for each `chunk` of the vocabulary, and one to see that neither position nor
    neighbours change its input. Raises StateError where they do, or where no router is shared by all layers.
    """
    made = injected(model, "token_table")
    router, first = made.routers.get("router"), next(iter(made.linears.values()), None)
    embedding = token_embedding(model)
    if made.config.method != "lora_switch" or router is None or first is None or embedding is None:
        raise StateError("token_table", "model", "a transformers model with lora_switch", f"{type(model).__name__}, {made.config.method}")
    if isinstance(router, TableRouter):
        return router
    seen: list[torch.Tensor] = []

    def stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    def first_input(tokens: torch.Tensor) -> torch.Tensor:
        handle = first.register_forward_pre_hook(stop)
        try:
            model(input_ids=tokens)
        except _Reached:
            return seen.pop()
        finally:
            handle.remove()
        raise StateError("token_table", "model", "a forward that runs its first adapted linear", "one that does not")

    vocabulary = torch.arange(embedding.num_embeddings, device=embedding.weight.device)
    inputs = [first_input(part[:, None])[:, 0] for part in vocabulary.split(chunk)]
    probe = vocabulary[torch.linspace(0, len(vocabulary) - 1, min(64, len(vocabulary))).long()]
    together, alone = first_input(probe[None])[0], torch.cat(inputs)[probe]
    if not torch.allclose(together.float(), alone.float(), rtol=1e-3, atol=1e-5):
        raise StateError(
            "token_table", "model", "a first adapted linear that sees one token's embedding only", "one whose input depends on more"
        )
    routed = [router(x) for x in inputs]
    return TableRouter(torch.cat([ids for ids, _ in routed]), torch.cat([gates for _, gates in routed]))
