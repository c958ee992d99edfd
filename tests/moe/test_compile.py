"""torch.compile of injected models: one graph, the same logits and gradients; routing, and what switches it, is seen by the compiler."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.utils import counters

import fusedmerge as fm
from tests.moe.test_generate import METHODS, injected

OFTEN = ("lora_switch", "mola")


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def tokens():
    return torch.randint(0, 67, (2, 9), generator=torch.Generator().manual_seed(0))


def compiled(model, backend="eager", whole=True):
    return torch.compile(model, backend=backend, fullgraph=whole)


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


@pytest.mark.parametrize("method", [m if m in OFTEN else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_a_forward_is_one_graph(method, tokens, tmp_path):
    model = injected(tmp_path, method).eval()
    expected, other = logits(model, tokens), logits(model, tokens.flip(0))
    fast = compiled(model)
    assert torch.equal(logits(fast, tokens), expected) and torch.equal(logits(fast, tokens.flip(0)), other)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 1 or method == "xlora"  # whose first pass is a forward of its own
    with ThreadPoolExecutor(1) as thread:
        assert torch.equal(thread.submit(logits, fast, tokens).result(), expected)
    assert counters["stats"]["unique_graphs"] <= graphs + 1  # a thread begins without the attribute that the others have
    assert torch.equal(logits(fast, tokens), expected)
    assert counters["stats"]["unique_graphs"] <= graphs + 1


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("checkpointed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients(tokens, tmp_path, checkpointed):
    model = injected(tmp_path).train()
    if checkpointed:
        model.gradient_checkpointing_enable()

    def step(forward):
        model.zero_grad()
        forward(tokens, labels=tokens, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, fm.moe.aux_loss(model).detach()

    expected, aux = step(model)
    found, found_aux = step(compiled(model, "aot_eager", whole=not checkpointed))  # torch compiles no region that sets what others read
    assert aux > 0 and torch.equal(aux, found_aux)
    assert expected.keys() == found.keys() and any("lora_routers" in name for name in found)
    for name, gradient in expected.items():
        assert (gradient - found[name]).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.slow
def test_what_switches_routing_is_seen(tokens, tmp_path):
    model = injected(tmp_path).eval()
    fast, structure = compiled(model), fm.moe.structure(model)
    routed = logits(fast, tokens)
    with structure.suspended():
        plain = logits(fast, tokens)
        assert torch.equal(plain, logits(model, tokens)) and not torch.equal(plain, routed)
    for ids in ([1, 2], [3, 0]):
        with structure.forced(torch.tensor([[ids]]), torch.tensor([[[0.5, 0.5]]])):
            forced = logits(fast, tokens)
            assert torch.equal(forced, logits(model, tokens)) and not torch.equal(forced, routed)
    with structure.recording() as records:
        logits(fast, tokens)
        logits(fast, tokens.flip(0))
    assert [record.ids.tolist() for record in records] == [records[0].ids.tolist(), records[0].ids.flip(0).tolist()]
    assert torch.equal(logits(fast, tokens), routed)


@pytest.mark.parametrize("whole", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_generate_runs_a_compiled_model_as_it_was_written(tokens, tmp_path, whole):
    model = injected(tmp_path)
    prompt = tokens[:1]
    expected = {
        strategy: fm.moe.generate(model, prompt, 8, strategy=strategy) for strategy in ("merged-simple", "merged", "fused", "backbone")
    }
    for layer in model.model.layers:
        if not whole:
            layer.compile(backend="eager", fullgraph=True)
    fast = compiled(model) if whole else model
    routed = logits(fast, prompt)
    for strategy, found in expected.items():
        assert torch.equal(fm.moe.generate(fast, prompt, 8, strategy=strategy), found), strategy
    graphs = counters["stats"]["unique_graphs"]
    assert torch.equal(logits(fast, prompt), routed) and counters["stats"]["unique_graphs"] == graphs
