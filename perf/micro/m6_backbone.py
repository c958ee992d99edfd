"""M6: what do a decode step, PEFT's merge and unmerge, and an addmm loop cost? The denominators of honest ratios."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from perf.micro.m0_copy import same
from perf.micro.session import Session, require

if TYPE_CHECKING:
    import torch

TITLE = "M6: a decode step of a Llama-2-7B-shaped backbone of {layers} layers, PEFT merge + unmerge, a captured addmm loop"
RANK, EXPERTS = 64, 2


def measure(session: Session) -> None:
    for part in (decode_steps, addmm_loop, peft_merges):
        part(session)
        gc.collect()
        release(session)


def release(session: Session) -> None:
    """Give cached memory back: the next part needs it in other pieces."""
    import torch

    if session.device.where == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------- a decode step, batch 1, captured


def decode_steps(session: Session) -> None:
    sizes = session.sizes
    weights = backbone_weights(session)
    nbytes = sum(w.nbytes for layer in weights["layers"] for w in layer.values()) + weights["head"].nbytes
    logits = {}
    for packed in (True, False):
        step = decode_step(session, weights, packed)
        result: list[torch.Tensor] = []

        def run(step: Callable[[], torch.Tensor] = step, result: list[torch.Tensor] = result) -> None:
            result[:] = [step()]

        replay = session.device.graph(run)
        replay()
        logits[packed] = result[0].double().clone()
        require(logits[packed].isfinite().all() and logits[packed].abs().max() > 0, "decode step: logits")
        seconds = session.device.samples(replay, sizes.samples)
        title = f"F.linear, {'packed' if packed else 'unpacked'} q/k/v and gate/up, {sizes.context} tokens of context"
        session.record(f"decode_{'packed' if packed else 'unpacked'}", "decode step, batch 1, captured", title, seconds, bytes=nbytes)
    difference = float((logits[True] - logits[False]).norm() / logits[True].norm())
    require(difference < 0.1, f"decode step: packed and unpacked differ by {difference:g}")


def backbone_weights(session: Session) -> dict[str, Any]:
    """Random weights, packed, and a KV cache [layers, 2, heads, context, head]."""
    import torch

    sizes, where = session.sizes, session.device.where
    layers = [{name: session.weight(*shape) for name, shape in sizes.shapes.items()} for _ in range(sizes.layers)]
    cache = torch.randn(sizes.layers, 2, sizes.heads, sizes.context, sizes.hidden // sizes.heads, device=where).to(torch.bfloat16)
    head = session.weight(sizes.vocabulary, sizes.hidden)
    token = torch.randn(1, sizes.hidden, device=where).to(torch.bfloat16)
    return {"layers": layers, "cache": cache, "head": head, "token": token}


def decode_step(session: Session, weights: dict[str, Any], packed: bool) -> Callable[[], torch.Tensor]:
    """Norm, attention over the cache, norm, gated feed-forward, per layer; then the head. As torch users write it, without a mask."""
    import torch
    from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

    sizes, where = session.sizes, session.device.where
    heads, size = sizes.heads, sizes.hidden // sizes.heads
    norm = torch.ones(sizes.hidden, dtype=torch.bfloat16, device=where)
    angles = torch.arange(0, size, 2, device=where).float().div(size).mul(-9.21).exp().mul(sizes.context).repeat(2)
    cosine, sine = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [heads, 1, size]
        low, high = x.chunk(2, dim=-1)
        return x * cosine + torch.cat((-high, low), dim=-1) * sine

    def several(x: torch.Tensor, weight: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        return linear(x, weight).chunk(parts, dim=-1) if packed else tuple(linear(x, part) for part in weight.chunk(parts))

    def step() -> torch.Tensor:
        hidden = weights["token"]
        for layer, cache in zip(weights["layers"], weights["cache"], strict=True):
            x = rms_norm(hidden, (sizes.hidden,), norm, 1e-5)
            q, k, v = (part.view(heads, 1, size) for part in several(x, layer["qkv"], 3))
            cache[0, :, -1:] = rotate(k)
            cache[1, :, -1:] = v
            found = scaled_dot_product_attention(rotate(q)[None], cache[0][None], cache[1][None])
            hidden = hidden + linear(found.view(1, sizes.hidden), layer["o"])
            gate, up = several(rms_norm(hidden, (sizes.hidden,), norm, 1e-5), layer["gate_up"], 2)
            hidden = hidden + linear(silu(gate) * up, layer["down"])
        return linear(rms_norm(hidden, (sizes.hidden,), norm, 1e-5), weights["head"])

    return step


# ---------------------------------------------------------------------- switches by the libraries


def addmm_loop(session: Session) -> None:
    """live = addmm(base, B, A) for every linear, gates folded into bf16 factors: fast, and rounded twice more than a switch."""
    import torch

    sizes = session.sizes
    shapes = [(rows // sizes.parts[name], cols) for name, (rows, cols) in sizes.shapes.items() for _ in range(sizes.parts[name])]
    shapes *= sizes.layers
    bases = [session.weight(*shape) for shape in shapes]
    lives = [torch.empty_like(base) for base in bases]
    factors = [(session.weight(rows, EXPERTS * RANK), session.weight(EXPERTS * RANK, cols).mul_(0.05)) for rows, cols in shapes]

    def run() -> None:
        for base, live, (b, a) in zip(bases, lives, factors, strict=True):
            torch.addmm(base, b, a, out=live)

    replay = session.device.graph(run)
    replay()
    base, live, (b, a) = bases[-1], lives[-1], factors[-1]
    truth = base[:64].double() + b[:64].double() @ a.double()
    require(((live[:64].double() - truth).abs() <= 2**-7 * truth.abs() + 2**-12).all(), "addmm: wrong")
    nbytes = sum(2 * w.nbytes for w in bases) + sum(b.nbytes + a.nbytes for b, a in factors)
    seconds = session.device.samples(replay, session.sizes.samples)
    title = f"addmm(out=) of {len(shapes)} linears, captured"
    session.record("addmm", f"switch of {EXPERTS} experts, r = {RANK}", title, seconds, bytes=nbytes)

    target = [torch.empty_like(b) for b in bases]

    def copy() -> None:
        for into, base in zip(target, bases, strict=True):
            into.copy_(base)

    seconds, nbytes = session.device.samples(session.device.graph(copy), sizes.samples), sum(2 * w.nbytes for w in bases)
    session.record("copy", f"switch of {EXPERTS} experts, r = {RANK}", f"copy of {len(shapes)} linears, captured", seconds, bytes=nbytes)


def peft_merges(session: Session) -> None:
    """PEFT's merge_adapter + unmerge_adapter of two adapters on all linears, as its users call it."""
    import torch

    model = peft_model(session)
    pristine = model.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight.detach().clone()
    for dtype in (torch.float32, torch.bfloat16):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
        merged = None
        found = []
        for number in range(6):
            session.device.synchronize()
            start = time.perf_counter()
            model.merge_adapter(adapter_names=["first", "second"])
            if number == 0:
                merged = model.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight.detach().clone()
            model.unmerge_adapter()
            session.device.synchronize()
            found.append(time.perf_counter() - start)
        require(merged is not None and not same(merged.flatten(), pristine.flatten()), "PEFT: nothing was merged")
        title = f"PEFT merge + unmerge, {str(dtype).removeprefix('torch.')} adapters"
        session.record(f"peft_{str(dtype).removeprefix('torch.')}", f"switch of {EXPERTS} experts, r = {RANK}", title, found[1:])
    session.suite.setting["peft_median_seconds"] = statistics.median(found[1:])


def peft_model(session: Session) -> Any:
    """A random bf16 Llama with two adapters, made on the device."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = session.sizes
    config = LlamaConfig(
        hidden_size=sizes.hidden, intermediate_size=sizes.intermediate, num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads, vocab_size=sizes.vocabulary, dtype="bfloat16",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(session.device.where):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False)
    found = get_peft_model(model, lora, adapter_name="first")
    found.add_adapter("second", lora)
    return found
