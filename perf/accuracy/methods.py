"""The methods under test as LoRA-MoE models of equal size, and the two controls whose routing is given."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import fusedmerge as fm
from fusedmerge.moe.routing import Record
from perf.accuracy.settings import Setting

BACKBONE = "backbone"
SLACK = 0.05  # of the trainable parameters, between methods


@dataclass(frozen=True)
class Method:
    """config: what differs from the setting's (N, k, r) in fm.moe.LoRAMoEConfig. rank: "matched": the r whose trainable parameters come
    closest to lora_switch's; "active": k * r; "given": the setting's, or config's. table: experts by "token" (random) or by "domain"."""

    title: str
    config: Mapping[str, Any] = field(default_factory=dict)
    rank: str = "given"
    table: str | None = None


METHODS = {
    "lora_equal_active": Method("LoRA, equal active rank", {"method": "lora"}, "active"),
    "lora_equal_total": Method("LoRA, equal total parameters", {"method": "lora"}, "matched"),
    "random_table": Method("random table, token to experts", table="token"),
    "oracle": Method("oracle, domain to experts", table="domain"),
    "mola": Method("MoLA, per linear, 2/4/6/8", {"method": "mola", "num_experts": (2, 4, 6, 8)}, "matched"),
    "mixlora": Method("MixLoRA, per block", {"method": "mixlora"}, "matched"),
    "molora": Method("MoLoRA, per linear, dense", {"method": "molora", "top_k": None}, "matched"),
    "lora_switch": Method("LoRA-Switch, token-wise"),
}
GATE = ("lora_equal_total", "oracle")  # these two run first


def ablations(setting: Setting) -> dict[str, Method]:
    """Variants of lora_switch. Their sizes differ where the table says so."""
    half, double = setting.r // 2, 2 * setting.r
    return {
        "lora_switch": METHODS["lora_switch"],
        "top_1": Method("top-1", {"top_k": 1}),
        "top_4": Method("top-4", {"top_k": 4}),
        "experts_4": Method("N = 4", {"num_experts": 4}),
        "experts_16": Method("N = 16", {"num_experts": 16}),
        "rank_half": Method(f"r = {half}", {"r": half}),
        "rank_double": Method(f"r = {double}", {"r": double}),
        "router_per_layer": Method("router per layer (MoRAL)", {"method": "moral"}, "matched"),
        "router_per_linear": Method("router per linear (MoLA, N = 8 everywhere)", {"method": "mola"}, "matched"),
        "not_renormalised": Method("gates: softmax over all, top-2, not renormalised", {"gating": "topk_of_softmax"}),
    }


def backbone(setting: Setting, vocabulary: int) -> nn.Module:
    """A Llama, random; the same weights on every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=setting.hidden, intermediate_size=setting.intermediate, num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads, num_key_value_heads=setting.heads, max_position_embeddings=setting.context,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    return model


class Adapted(nn.Module):
    """An injected model whose forward also takes each window's domain; a control's routing comes from its table."""

    ids: torch.Tensor
    gates: torch.Tensor

    def __init__(self, model: nn.Module, table: str | None, entries: int, num_experts: int, top_k: int, seed: int) -> None:
        super().__init__()
        self.model, self.table, self.num_experts = model, table, num_experts
        if table is None:
            return
        for router in fm.moe.structure(model).routers.values():
            router.requires_grad_(False)  # never asked
        if table == "token":
            generator = torch.Generator().manual_seed(seed)
            ids = torch.rand(entries, num_experts, generator=generator).topk(top_k).indices
        else:  # domain d has experts d, d + 1, ...: as many active ones as with the other methods
            ids = (torch.arange(entries)[:, None] + torch.arange(top_k)) % num_experts
        self.register_buffer("ids", ids.to(torch.int32))  # [entries, k]
        self.register_buffer("gates", torch.full(ids.shape, 1.0 / top_k))

    def forward(self, input_ids: torch.Tensor, domain: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        """input_ids, labels [B, T]; domain [B]."""
        given = self.given(input_ids, domain)
        forced = fm.moe.structure(self.model).forced(given[0].ids, given[0].gates) if given else nullcontext()
        with forced:
            return self.model(input_ids=input_ids, labels=labels)

    def given(self, input_ids: torch.Tensor, domain: torch.Tensor) -> list[Record]:
        """What the table says for each token, as a router's record; nothing without a table."""
        if self.table is None:
            return []
        entry = input_ids if self.table == "token" else domain[:, None].expand_as(input_ids)
        return [Record("table", self.ids[entry], self.gates[entry], self.gates.new_zeros(self.num_experts))]


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _injected(setting: Setting, model: nn.Module, method: Method, r: int, seed: int) -> nn.Module:
    """alpha = 2 r everywhere: the scaling is no difference between methods."""
    given: dict[str, Any] = {"num_experts": setting.num_experts, "top_k": setting.top_k, **method.config}
    given |= {"r": r, "lora_alpha": 2.0 * r, "lora_dropout": 0.0}
    return fm.moe.inject(model, fm.moe.LoRAMoEConfig(**given), seed=seed)


def rank_of(setting: Setting, method: Method, vocabulary: int) -> int:
    """The rank that `method` gets. Raises SystemExit where no rank brings its parameters within SLACK of lora_switch's."""
    given = int(method.config.get("r", setting.r))
    if method.rank == "active":
        return setting.top_k * setting.r
    if method.rank == "given":
        return given

    def count(chosen: Method, r: int) -> int:
        return trainable(_injected(setting, backbone(setting, vocabulary), chosen, r, 0))

    aim = count(METHODS["lora_switch"], setting.r)
    one, two = count(method, 1), count(method, 2)
    r = max(1, round(1 + (aim - one) / (two - one)))
    if abs(count(method, r) / aim - 1) > SLACK:
        raise SystemExit(f"{method.title}: r = {r} has {count(method, r)} trainable parameters, lora_switch {aim}: choose another r")
    return r


def build(setting: Setting, method: Method, r: int, state: Mapping[str, torch.Tensor], domains: int, seed: int) -> Adapted:
    """The method on the pre-trained backbone."""
    model = backbone(setting, len(state["model.embed_tokens.weight"]))
    model.load_state_dict(state)
    _injected(setting, model, method, r, seed)
    entries = domains if method.table == "domain" else len(state["model.embed_tokens.weight"])
    k = int(method.config.get("top_k") or setting.top_k)
    return Adapted(model, method.table, entries, setting.num_experts, k, seed).to(setting.device)
