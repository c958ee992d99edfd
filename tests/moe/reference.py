"""Float64 truth for the LoRA-MoE methods, in NumPy, written for reading: a Llama-like decoder, and each method as its paper writes it.

Nothing here is shared with fusedmerge.moe. Tokens are worked on one by one where a mixture is involved. Shapes: T tokens, D width.
"""

import numpy as np


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def silu(z):
    return z / (1 + np.exp(-z))


def gelu(z):
    from math import erf, sqrt

    return np.vectorize(lambda v: 0.5 * v * (1 + erf(v / sqrt(2))))(z)


class Llama:
    """Llama, Mistral and Qwen2: RMSNorm, rotary positions, grouped-query attention, gated MLP. weights: {name: float64 array}."""

    def __init__(self, weights, heads, kv_heads, layers, eps, theta, window=None):
        self.w, self.heads, self.kv_heads, self.num_layers, self.eps, self.theta = weights, heads, kv_heads, layers, eps, theta
        self.window = window

    def linear(self, name, x):
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def norm(self, name, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps) * self.w[f"{name}.weight"]

    def rotate(self, x):  # x [T, heads, d]
        tokens, _, d = x.shape
        angle = np.arange(tokens)[:, None] * self.theta ** (-np.arange(0, d, 2) / d)[None]  # [T, d/2]
        cos, sin = (np.concatenate([f(angle)] * 2, -1)[:, None] for f in (np.cos, np.sin))
        half = np.concatenate([-x[..., d // 2 :], x[..., : d // 2]], -1)
        return x * cos + half * sin

    def attention(self, layer, x, method):
        at = f"model.layers.{layer}.self_attn."
        tokens = len(x)
        q, k, v = (method.linear(self, at + name, x).reshape(tokens, n, -1) for name, n in self._projections())
        q, k = self.rotate(q), self.rotate(k)
        k, v = (np.repeat(t, self.heads // self.kv_heads, axis=1) for t in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(tokens, dtype=bool)[None], scores, -np.inf)
        out = np.einsum("hij,jhd->ihd", softmax(scores), v).reshape(tokens, -1)
        return method.linear(self, at + "o_proj", out)

    def _projections(self):
        return (("q_proj", self.heads), ("k_proj", self.kv_heads), ("v_proj", self.kv_heads))

    def mlp(self, layer, x, method):
        at = f"model.layers.{layer}.mlp."
        hidden = silu(method.linear(self, at + "gate_proj", x)) * method.linear(self, at + "up_proj", x)
        return method.linear(self, at + "down_proj", hidden)

    def hidden(self, ids, method):
        """ids [T] -> the last hidden states [T, D]."""
        x = self.w["model.embed_tokens.weight"][ids]
        for layer in range(self.num_layers):
            x = x + self.attention(layer, self.norm(f"model.layers.{layer}.input_layernorm", x), method)
            x = x + method.mlp(self, layer, self.norm(f"model.layers.{layer}.post_attention_layernorm", x))
        return self.norm("model.norm", x)

    def logits(self, ids, method):
        method.begin(self, ids)
        return self.hidden(ids, method) @ self.w["lm_head.weight"].T


class Plain:
    """No adapters."""

    def begin(self, backbone, ids):
        pass

    def linear(self, backbone, name, x):
        return backbone.linear(name, x)

    def mlp(self, backbone, layer, x):
        return backbone.mlp(layer, x, self)


def choose(logits, k, gating):
    """One token's logits [N] -> [(expert, gate), ...]."""
    order = np.argsort(-logits, kind="stable")[:k]
    if gating == "softmax_of_topk" and k > 1:
        gates = softmax(logits[order])
    else:
        gates = softmax(logits)[order]
        if gating == "topk_of_softmax_renormalized":
            gates = gates / gates.sum()
    return list(zip(order, gates, strict=True))


class Mixture(Plain):
    """y = W x + b + sum_j gate_j s_j B_j A_j x with the choices of `choices`.

    experts: {linear: (A [N, r, in], B [N, out, r], s [N])}.
    """

    def __init__(self, experts, routers, k, gating):
        self.experts, self.routers, self.k, self.gating = experts, routers, k, gating

    def choices(self, name, x):
        """For each token of x [T, D]: its experts and gates."""
        raise NotImplementedError

    def delta(self, name, x, expert):
        a, b, s = (part[expert] for part in self.experts[name])
        return s * (b @ (a @ x))

    def linear(self, backbone, name, x):
        y = backbone.linear(name, x)
        if name in self.experts:
            for t, chosen in enumerate(self.choices(name, x)):
                for expert, gate in chosen:
                    y[t] = y[t] + gate * self.delta(name, x[t], expert)
        return y

    def routed(self, router, x):
        return [choose(self.routers[router] @ token, self.k, self.gating) for token in x]


class Switch(Mixture):
    """LoRA-Switch, section 3: the input of the first adapted linear decides for all."""

    def begin(self, backbone, ids):
        self.decided = None

    def choices(self, name, x):
        if self.decided is None:
            self.decided = self.routed("router", x)
        return self.decided


class PerLinear(Mixture):
    """MoLA: each linear has a router of its own."""

    def choices(self, name, x):
        return self.routed(name, x)


class PerLayer(Mixture):
    """MoRAL, as assumed here: one router in each layer, which reads the input of the layer's first adapted linear."""

    def begin(self, backbone, ids):
        self.decided = {}

    def choices(self, name, x):
        layer = ".".join(name.split(".")[:3])
        if layer not in self.decided:
            self.decided[layer] = self.routed(layer, x)
        return self.decided[layer]


class Dense(Mixture):
    """MoLoRA and LoRAMoE: all experts, softmax over all of them; linears without a router have one plain LoRA (LoRAMoE's attention)."""

    def choices(self, name, x):
        if name not in self.routers:
            return [[(0, 1.0)]] * len(x)
        return [list(enumerate(softmax(self.routers[name] @ token))) for token in x]


class Static(Mixture):
    """One plain LoRA."""

    def choices(self, name, x):
        return [[(0, 1.0)]] * len(x)


class MixLoRA(Mixture):
    """Section 3: plain LoRA on attention; an expert is a whole gated MLP with LoRA on its three linears; the gates come after it."""

    def choices(self, name, x):
        return [[(0, 1.0)]] * len(x)

    def mlp(self, backbone, layer, x):
        at = f"model.layers.{layer}.mlp"
        y = np.zeros_like(x)
        for t, chosen in enumerate(self.routed(at, x)):
            for expert, gate in chosen:

                def apply(name, v, expert=expert):
                    full = f"{at}.{name}"
                    out = backbone.linear(full, v[None])[0]
                    return out + self.delta(full, v, expert) if full in self.experts else out

                y[t] += gate * apply("down_proj", silu(apply("gate_proj", x[t])) * apply("up_proj", x[t]))
        return y


class PESC(Mixture):
    """Section 2.3: y = sum gate (h + s Up(GELU(Down h))), h the MLP's output; the router reads the MLP's input."""

    def mlp(self, backbone, layer, x):
        at = f"model.layers.{layer}.mlp"
        h = backbone.mlp(layer, x, Plain())
        down, up, s = self.experts[at]
        y = np.zeros_like(h)
        for t, chosen in enumerate(self.routed(at, x)):
            for expert, gate in chosen:
                y[t] += gate * (h[t] + s[expert] * (up[expert] @ gelu(down[expert] @ h[t])))
        return y

    def linear(self, backbone, name, x):
        return backbone.linear(name, x)


class XLoRA(Mixture):
    """A first pass without adapters; its last hidden states, through the classifier, give the gates. layers: [(W, b), ...]."""

    def __init__(self, experts, layers, k, temperature, layerwise):
        super().__init__(experts, {}, k, None)
        self.layers, self.temperature, self.layerwise = layers, temperature, layerwise

    def begin(self, backbone, ids):
        h = backbone.hidden(ids, Plain())
        for index, (weight, bias) in enumerate(self.layers):
            h = np.maximum(h, 0) if index else h
            h = h @ weight.T + bias
        num_experts = len(next(iter(self.experts.values()))[0])
        self.gates = softmax(h.reshape(len(ids), -1, num_experts) / self.temperature)  # [T, L, N]

    def choices(self, name, x):
        gates = self.gates[:, list(self.experts).index(name) if self.layerwise else 0]
        kept = [np.argsort(-row, kind="stable")[: self.k] for row in gates]
        return [[(expert, row[expert]) for expert in experts] for experts, row in zip(kept, gates, strict=True)]


# Auxiliary losses of one router. logits [T, N], chosen: per token [(expert, gate), ...], weight [T] (0: padding).


def switch_loss(logits, chosen, weight):
    """Switch Transformers, equation 4, for k choices: N sum_i f_i P_i, f_i the share of all choices that fell on i."""
    num_experts, k = logits.shape[1], len(chosen[0])
    f, p, count = np.zeros(num_experts), np.zeros(num_experts), weight.sum()
    for row, choice, keep in zip(logits, chosen, weight, strict=True):
        p += keep * softmax(row) / count
        for expert, _ in choice:
            f[expert] += keep / (k * count)
    return num_experts * (f * p).sum()


def mixtral_loss(logits, chosen, weight):
    """As transformers' Mixtral: f_i counts tokens, so that sum f_i = k."""
    return len(chosen[0]) * switch_loss(logits, chosen, weight)


def cv2_loss(logits, chosen, weight):
    """The squared coefficient of variation of the experts' summed gates."""
    importance = np.zeros(logits.shape[1])
    for choice, keep in zip(chosen, weight, strict=True):
        for expert, gate in choice:
            importance[expert] += keep * gate
    return importance.var() / importance.mean() ** 2


def localized_loss(chosen, num_experts, batch, task_types, expert_types, delta=0.1):
    """LoRAMoE, section 3.3: var(Z) / mean(Z), Z = I * Q."""
    z = np.zeros((num_experts, batch))
    per_sample = len(chosen) // batch
    for t, choice in enumerate(chosen):
        sample = t // per_sample
        for expert, gate in choice:
            same = task_types[sample] == expert_types[expert]
            z[expert, sample] += (1 + delta if same else 1 - delta) * gate
    return z.var() / z.mean()


def z_loss(logits, weight):
    squares = np.log(np.exp(logits).sum(-1)) ** 2
    return (squares * weight).sum() / weight.sum()
