"""Small checkpoints and experts for the decoder's tests, and float64 truth for per-token mixtures."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

import fusedmerge as fm
from fusedmerge.moe.decoder import Cache, Decoder
from fusedmerge.moe.decoder_files import bias_name
from fusedmerge.moe.experts import ExpertLinear, ExpertSet
from fusedmerge.moe.session import DecoderSession
from fusedmerge.moe.strategies import Apply

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
SIZE = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.15}


def write_model(directory, kind="llama", dtype=torch.float32, shard_size="1GB", **options):
    """A random transformers model, saved; its norms and biases are not the ones and zeros of a fresh model."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**{**SIZE, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    model.generation_config.eos_token_id = None
    model.to(dtype).save_pretrained(str(directory), max_shard_size=shard_size)
    return model


def make_experts(decoder, method="lora_switch", count=4, r=5, k=2, seed=0, delta=0.15):
    """Random experts on all linears of a decoder (in its dtype), each |delta| about 0.15 |W|, and routers with clear preferences."""
    generator = torch.Generator().manual_seed(seed)
    linears, routers = {}, {}
    for layer, names in enumerate(decoder.names):
        for part, name in names.items():
            weight = decoder.weights[name]
            out, width = weight.shape
            router = router_of(method, layer, part)
            n = count if router is not None else 1
            a = torch.randn(n, r, width, generator=generator) / math.sqrt(width)
            b = torch.randn(n, out, r, generator=generator) * delta * float(weight.float().norm()) / math.sqrt(r * out)
            scaling = 0.5 + torch.rand(n, generator=generator)
            linears[name] = ExpertLinear(a.to(decoder.dtype), b.to(decoder.dtype), scaling, router)
            if router is not None and router not in routers:
                routers[router] = partial(fm.route_topk, router_weight=torch.randn(n, width, generator=generator).to(decoder.dtype), k=k)
    return ExpertSet(method, linears, routers)


def router_of(method, layer, part):
    """The router's name, as each method places it."""
    if method == "lora":
        return None
    if method == "lora_switch":
        return "token"
    if method == "mola":
        return f"{layer}.{part}"
    return f"{layer}.mlp" if part in ("gate_proj", "up_proj", "down_proj") else None


class Recorder:
    """Routers that note what they choose, and routers that choose the same again."""

    def __init__(self, experts):
        self.found = {name: [] for name in experts.routers}
        self.experts = ExpertSet(
            experts.method, experts.linears, {name: partial(self._note, name) for name in experts.routers}, experts.bank
        )
        self._routers = experts.routers

    def _note(self, name, x):
        route = self._routers[name](x)
        self.found[name].append(route)
        return route

    def played_back(self, experts):
        """`experts` with everything recorded, as one sequence [B, T, k]."""
        joined = {name: tuple(torch.cat(part, dim=1) for part in zip(*routes, strict=True)) for name, routes in self.found.items()}
        return ExpertSet(experts.method, experts.linears, {name: (lambda x, name=name: joined[name]) for name in joined})


class Truth(Apply):
    """Each token's own effective weights W + sum g s B A, one token after the other: nothing shared with the strategies."""

    def start(self, tokens, cache):
        self.chosen = {}

    def _route(self, router, x):
        if router is None:
            return torch.zeros(*x.shape[:2], 1, dtype=torch.int32), torch.ones(*x.shape[:2], 1)
        if router not in self.chosen:
            self.chosen[router] = self.decoder.experts.routers[router](x)
        return self.chosen[router]

    def _one(self, x, name, ids, gates):
        """x [in] under one mixture."""
        weight, bias = self.decoder.weights[name], self.decoder.weights.get(bias_name(name))
        expert = self.decoder.experts.linears.get(name)
        for index, gate in zip(ids.tolist(), gates.tolist(), strict=True) if expert else ():
            weight = weight + gate * float(expert.scaling[index]) * (expert.b[index] @ expert.a[index])
        return weight @ x + (0.0 if bias is None else bias)

    def project(self, x, names):
        outs = []
        for name in names:
            expert = self.decoder.experts.linears.get(name)
            ids, gates = self._route(expert.router if expert else None, x)
            rows = [[self._one(x[b, t], name, ids[b, t], gates[b, t]) for t in range(x.shape[1])] for b in range(len(x))]
            outs.append(torch.stack([torch.stack(row) for row in rows]))
        return outs

    def mlp(self, x, gate, up, down):
        if self.decoder.experts.method != "mixlora":
            return super().mlp(x, gate, up, down)
        ids, gates = self._route(self.decoder.experts.linears[gate].router, x)
        out = torch.zeros_like(x)
        one = torch.ones(1)
        for b in range(len(x)):
            for t in range(x.shape[1]):
                for index, share in zip(ids[b, t, :, None], gates[b, t].tolist(), strict=True):
                    h = F.silu(self._one(x[b, t], gate, index, one)) * self._one(x[b, t], up, index, one)
                    out[b, t] += share * self._one(h, down, index, one)
        return out


def truth_logits(decoder, experts, tokens):
    """Float64 logits [B, T, V]; experts=None: of the plain backbone."""
    wide = Decoder(
        decoder.config, {name: weight.double() for name, weight in decoder.weights.items()}, experts and experts.to(torch.float64)
    )
    apply = Apply(wide) if experts is None else Truth(wide)
    cache = Cache(wide, *tokens.shape)
    return wide.head(wide.hidden(tokens, cache, cache.slots, tokens.shape[1], apply))


def forced(decoder, strategy, tokens, prompt):
    """Logits [B, T, V] of a prefill of `prompt` tokens and then one step per token, on given tokens [B, T]; those of the prompt but the
    last are left out."""
    with DecoderSession(decoder, strategy, *tokens.shape) as session:
        found = [session.prefill(tokens[:, :prompt])]
        found += [session.step(tokens[:, t]).clone() for t in range(prompt, tokens.shape[1])]
    return torch.stack(found, dim=1)


def routed(decoder, strategy, tokens, prompt):
    """`forced` without a graph, and the experts with the routes that were taken, wherever they were decided."""
    experts, routes, found = decoder.experts, {name: [] for name in decoder.experts.routers}, []
    with DecoderSession(decoder, strategy, *tokens.shape) as session:
        session._captures = False
        for start, end in ((0, prompt), *((t, t + 1) for t in range(prompt, tokens.shape[1]))):
            found.append(session.step(tokens[:, start]).clone() if start else session.prefill(tokens[:, :end]))
            chosen = (session._decode if start else session._prefill).chosen
            for name, taken in routes.items():
                taken.append(tuple(part.cpu().clone() for part in chosen[name]))
    joined = {name: tuple(torch.cat(part, dim=1) for part in zip(*taken, strict=True)) for name, taken in routes.items()}
    played = {name: (lambda x, name=name: joined[name]) for name in joined}
    return torch.stack(found, dim=1), ExpertSet(experts.method, experts.linears, played)


def relative(got, exact):
    """||got - exact|| / ||exact|| per token [B, T]."""
    return (got.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
