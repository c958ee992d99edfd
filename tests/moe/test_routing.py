"""Routing travels with the forward call; routers, losses, and what a caller can watch or force."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from torch import nn

import fusedmerge as fm
from fusedmerge.errors import DtypeError, FusedMergeError, InvalidTypeError, ShapeError, StateError
from fusedmerge.moe.losses import balance_loss, total_loss
from fusedmerge.moe.routing import Record, Router
from tests.moe import reference
from tests.moe.material import VOCABULARY, adapted, config, float64, gradients, tiny, tokens

SHARED = ("lora_switch", "moral")
CPU = torch.device("cpu")


def router(num_experts=6, width=8, top_k=2, gating="softmax_of_topk", seed=0):
    return Router(num_experts, width, top_k, gating, 1.0, seed, CPU)


@pytest.mark.parametrize("gating", ["softmax_of_topk", "topk_of_softmax", "topk_of_softmax_renormalized"])
@pytest.mark.parametrize("top_k", range(1, 9))
def test_a_router_chooses_as_its_gating_says(gating, top_k):
    layer = router(8, 5, top_k, gating)
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    ids, gates = layer(x)
    assert ids.dtype == torch.int32 and gates.dtype == torch.float32 and ids.shape == gates.shape == (3, 4, top_k)
    weight = float64(layer.weight)
    for position in np.ndindex(3, 4):
        expected = reference.choose(weight @ float64(x[position]), top_k, gating)
        assert ids[position].tolist() == [expert for expert, _ in expected]
        np.testing.assert_allclose(float64(gates[position]), [gate for _, gate in expected], rtol=2e-6)


def test_a_single_gate_has_a_gradient_unless_it_is_renormalised():
    x = torch.randn(3, 8)
    for gating, flows in (("softmax_of_topk", True), ("topk_of_softmax", True), ("topk_of_softmax_renormalized", False)):
        layer = router(top_k=1, gating=gating)
        layer(x)[1].sum().backward()
        assert bool(layer.weight.grad.abs().sum() > 1e-6) is flows, gating


def test_a_router_routes_in_float32_and_says_a_wrong_width():
    layer = router(top_k=2)
    x = torch.randn(5, 8)
    ids, gates = layer(x.bfloat16())
    same_ids, same_gates = layer(x.bfloat16().float())
    assert torch.equal(ids, same_ids) and (gates - same_gates).abs().max() < 1e-6  # another order of addition
    with pytest.raises(ShapeError, match=r"Router: x: expected \[..., 8\], got \[5, 7\]"):
        layer(x[:, :7])


def test_one_router_decides_for_all_layers_of_lora_switch():
    model, ids = adapted(), tokens()
    made = fm.moe.structure(model)
    with made.recording() as records:
        model(ids)
    assert [record.name for record in records] == ["router"]
    assert records[0].ids.shape == (2, 5, 2) and records[0].logits.shape == (2, 5, 4)
    seen = {}
    for name, part in made.linears.items():
        part.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: module.route(args[0])}))
    model(ids)
    assert len(seen) == 14 and all(torch.equal(found[0], records[0].ids) for found in seen.values())
    with made.recording() as records:
        adapted("mola")(ids)
    assert records == []
    for method, count in (("mola", 14), ("moral", 2), ("mixlora", 2), ("pesc", 2), ("loramoe", 6), ("lora", 0), ("xlora", 1)):
        model = adapted(method)
        with fm.moe.structure(model).recording() as records:
            model(ids)
        assert len(records) == count == len(fm.moe.structure(model).routers), method


@pytest.mark.parametrize("method", ["lora_switch", "moral", "mola", "mixlora", "pesc", "xlora"])
def test_two_forwards_before_one_backward(method):
    first, second = tokens(seed=1), tokens(seed=2)
    model = adapted(method).train()
    (model(first, labels=first).loss + model(second, labels=second).loss).backward()
    together = gradients(model)
    model.zero_grad()
    for ids in (first, second):
        model(ids, labels=ids).loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(together[name], grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["lora_switch", "moral", "mola", "mixlora", "pesc", "xlora"])
def test_gradient_checkpointing_gives_the_same_gradients(method, reentrant):
    first, second = tokens(seed=1), tokens(seed=2)
    model = adapted(method, z_loss_coef=0.01).train()

    def both():
        model.zero_grad()
        losses = [model(ids, labels=ids).loss for ids in (first, second)]
        (losses[0] + losses[1]).backward()
        return [loss.item() for loss in losses], gradients(model), fm.moe.aux_loss(model).item()

    plain = both()
    model.enable_input_require_grads()  # what reentrant checkpointing needs of any frozen model
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    again = both()
    assert plain[0] == pytest.approx(again[0], rel=1e-5) and plain[2] == pytest.approx(again[2], rel=1e-5)
    assert plain[1].keys() == again[1].keys() and any("router" in name for name in again[1])
    for name, grad in plain[1].items():
        torch.testing.assert_close(again[1][name], grad, atol=1e-6, rtol=1e-4)


class Residual(nn.Module):
    """Blocks that checkpoint themselves through `run`; their linears are registered in the reverse of the order in which they run."""

    def __init__(self, run=None, width=8):
        super().__init__()
        self.last = nn.Linear(2 * width, width)
        self.blocks = nn.ModuleList(nn.Linear(2 * width, 2 * width) for _ in range(2))
        self.entry = nn.Linear(width, 2 * width)
        self.run = run

    def forward(self, x):
        x = torch.tanh(self.entry(x))
        for block in self.blocks:
            part = lambda x, block=block: x + torch.tanh(block(x))  # noqa: E731
            x = self.run(part, x) if self.run else part(x)
        return self.last(x)


def residual(run=None, method="lora_switch", **fields):
    torch.manual_seed(0)
    return fm.moe.inject(Residual(run).double(), config(method, **fields), 1)


@pytest.mark.parametrize("method", ["lora_switch", "mola"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_any_modules_own_checkpointing_through_moe_checkpoint(method, reentrant):
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for run in (None, lambda part, x: fm.moe.checkpoint(part, x, use_reentrant=reentrant)):
        model = residual(run, method)
        model(x).square().sum().backward()
        results.append(gradients(model))
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad)


def test_checkpointing_that_does_not_carry_the_routing_says_so():
    from torch.utils.checkpoint import checkpoint

    model = residual(lambda part, x: checkpoint(part, x, use_reentrant=False))
    with pytest.raises(FusedMergeError, match="fusedmerge.moe.checkpoint"):
        model(torch.randn(5, 8, dtype=torch.float64)).sum().backward()


def test_threads_and_nested_models_do_not_share_routing():
    model = adapted()
    batches = [tokens(1, 6, seed) for seed in range(4)]
    expected = [model(ids).logits for ids in batches]
    got = [None] * 4

    def work(index):
        for _ in range(5):
            got[index] = model(batches[index]).logits

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.entry, self.inner, self.exit = nn.Linear(VOCABULARY, 8), adapted(), nn.Linear(8, 8)

        def forward(self, x, ids):
            hidden = self.entry(x)
            logits = self.inner(ids).logits
            return self.exit(hidden) + 0 * logits.sum(), logits

    torch.manual_seed(0)
    outer = fm.moe.inject(Outer(), config(target_modules=["entry", "exit"]), 0)
    x = torch.randn(2, 5, VOCABULARY)
    mixed, logits = outer(x, batches[0])
    made = fm.moe.structure(outer)
    ids, gates = made.routers["router"](x)
    assert torch.equal(logits, expected[0])
    first, second = made.linears.values()
    torch.testing.assert_close(mixed, second.mixed(first.mixed(x, ids, gates), ids, gates))


def test_an_exception_inside_a_forward_leaves_nothing_behind():
    model, ids = adapted(), tokens()
    expected = model(ids).logits
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        model(ids)
    handle.remove()
    from fusedmerge.moe.routing import innermost

    assert innermost() is None
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_is_a_model_of_its_own(make):
    model, ids = adapted(), tokens()
    expected = model(ids).logits  # with a graph, which no copy takes along
    twin = make(model)
    with torch.no_grad():
        for part in fm.moe.structure(model).linears.values():
            part.lora_B.zero_()
        fm.moe.structure(model).routers["router"].weight.neg_()
    assert torch.equal(twin(ids).logits, expected)
    assert fm.moe.structure(twin).model is twin
    with fm.moe.structure(model).suspended():
        assert torch.equal(twin(ids).logits, expected)
    fm.moe.eject(twin)
    assert all(parameter.requires_grad for parameter in twin.parameters())
    assert not model.lm_head.weight.requires_grad and torch.equal(twin(ids).logits, tiny()(ids).logits)


def test_a_part_of_the_model_called_by_itself():
    model = adapted()
    q_proj, v_proj = model.model.layers[0].self_attn.q_proj, model.model.layers[1].self_attn.v_proj
    x = torch.randn(1, 3, 16)
    model(tokens())
    assert q_proj(x).shape == (1, 3, 16)  # where the router sits: it can decide
    with pytest.raises(StateError, match="call the whole model"):
        v_proj(x)


def test_forced_and_suspended():
    model, ids = adapted(), tokens()
    made, base = fm.moe.structure(model), tiny()
    with made.suspended():
        assert torch.equal(model(ids).logits, base(ids).logits)
    none = torch.full((2, 5, 2), -1, dtype=torch.int32)
    with made.forced(none, torch.ones(2, 5, 2)):
        torch.testing.assert_close(model(ids).logits, base(ids).logits)
    with made.recording() as records:
        expected = model(ids).logits
    with made.forced(records[0].ids, records[0].gates):
        assert torch.equal(model(ids).logits, expected)
        assert not torch.equal(model(ids.flip(1)).logits, adapted()(ids.flip(1)).logits)
    with made.forced(torch.tensor([[[1]], [[3]]]), torch.ones(2, 1, 1)):  # one expert for each sample, as an oracle has it
        rows = model(ids).logits
    for row, expert in enumerate((1, 3)):
        with made.forced(torch.tensor([expert]), torch.ones(1)):
            torch.testing.assert_close(model(ids[row : row + 1]).logits, rows[row : row + 1])
    for given, error in (
        ((torch.zeros(2), torch.zeros(2)), DtypeError),
        ((torch.zeros(2, dtype=torch.int32), torch.zeros(3)), ShapeError),
        (([1], torch.zeros(1)), InvalidTypeError),
    ):
        with pytest.raises(error), made.forced(*given):
            pass
    with made.forced(torch.zeros(3, 7, 1, dtype=torch.int32), torch.ones(3, 7, 1)), pytest.raises(ShapeError, match="tokens"):
        model(ids)
    assert torch.equal(model(ids).logits, expected)


def record_of(logits, top_k=2, gating="softmax_of_topk"):
    chosen = [reference.choose(row, top_k, gating) for row in logits]
    ids = torch.tensor([[int(expert) for expert, _ in row] for row in chosen], dtype=torch.int32)
    gates = torch.tensor([[gate for _, gate in row] for row in chosen])
    return Record("r", ids, gates, torch.tensor(logits)), chosen


@pytest.mark.parametrize("kind", ["switch", "mixtral", "cv2"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_balance_losses_are_their_formulas(kind, top_k, rng):
    logits = rng.normal(size=(12, 5))
    record, chosen = record_of(logits, top_k)
    mask = (rng.random(12) > 0.3).astype(float)
    formula = getattr(reference, f"{kind}_loss")
    for weight in (np.ones(12), mask):
        got = balance_loss(record, kind, torch.tensor(weight))
        assert float(got) == pytest.approx(formula(logits, chosen, weight), rel=1e-6)


def test_minima_of_the_balance_losses():
    logits = np.zeros((4, 4)) + 1e-3 * np.stack([np.roll(np.arange(4), shift) for shift in range(4)])
    for top_k in (1, 2):
        record, _ = record_of(logits, top_k)
        assert float(balance_loss(record, "switch")) == pytest.approx(1, abs=1e-5)
        assert float(balance_loss(record, "mixtral")) == pytest.approx(top_k, abs=1e-5)
        assert float(balance_loss(record, "cv2")) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("method", ["lora_switch", "mola", "mixlora", "pesc", "loramoe"])
def test_the_loss_of_a_padded_batch_is_that_of_its_tokens(method):
    """Averaged over routers; the attention mask's padding counts for nothing; added to outputs.loss with its coefficients."""
    model, ids = adapted(method, balance_loss_coef=0.5, z_loss_coef=0.25), tokens(2, 6)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    made = fm.moe.structure(model)
    with made.recording() as records:
        output = model(ids, attention_mask=mask, labels=labels)
    formula = getattr(reference, f"{made.config.balance_loss}_loss")
    weight = mask.numpy().reshape(-1).astype(float)
    losses = []
    for record in records:
        logits = float64(record.logits).reshape(12, -1)
        pairs = zip(record.ids.reshape(12, -1).tolist(), float64(record.gates).reshape(12, -1), strict=True)
        chosen = [list(zip(*pair, strict=True)) for pair in pairs]
        losses.append(0.5 * formula(logits, chosen, weight) + 0.25 * reference.z_loss(logits, weight))
    assert float(fm.moe.aux_loss(model)) == pytest.approx(np.mean(losses), rel=1e-5)
    own = nn.functional.cross_entropy(output.logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))
    assert float(output.loss - own) == pytest.approx(np.mean(losses), rel=1e-4)
    as_tuple = model(ids, attention_mask=mask, labels=labels, return_dict=False)
    torch.testing.assert_close(as_tuple[0], output.loss)


def test_the_localized_balance_constraint_of_loramoe():
    model = adapted("loramoe", expert_types=[0, 0, 1, 1], balance_loss_coef=1.0)
    ids, types = tokens(3, 4), torch.tensor([0, 1, 1])
    made = fm.moe.structure(model)
    with made.recording() as records, made.task_types(types):
        model(ids)
    expected = [
        reference.localized_loss([list(enumerate(row)) for row in float64(r.gates).reshape(12, 4)], 4, 3, types.tolist(), [0, 0, 1, 1])
        for r in records
    ]
    assert float(fm.moe.aux_loss(model)) == pytest.approx(np.mean(expected), rel=1e-5)
    with made.task_types(types[:2]), pytest.raises(ShapeError, match="task_types"):
        model(ids, labels=ids)


def test_transformers_own_mixtral_loss_agrees(rng):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = rng.normal(size=(12, 5)).astype(np.float32)
    record, _ = record_of(logits)
    theirs = load_balancing_loss_func((torch.tensor(logits),), 5, 2)
    assert float(balance_loss(record, "mixtral")) == pytest.approx(float(theirs), rel=1e-5)


def test_aux_loss_needs_a_forward_that_kept_its_logits():
    model, ids = adapted(), tokens()
    with pytest.raises(StateError, match="aux_loss"):
        fm.moe.aux_loss(model)
    with torch.no_grad():
        model(ids)
        with pytest.raises(StateError, match="aux_loss"):
            fm.moe.aux_loss(model)
        with fm.moe.structure(model).recording():
            model(ids)
        kept = fm.moe.aux_loss(model)
        model(ids, labels=ids)
        assert torch.equal(kept, fm.moe.aux_loss(model))
    assert total_loss([], config(), None) == 0
    with pytest.raises(StateError, match="^aux_loss"):
        fm.moe.aux_loss(tiny())


@pytest.mark.parametrize("method", ["lora_switch", "moral", "mola", "mixlora", "pesc", "loramoe", "molora", "lora"])
def test_nothing_in_a_forward_or_its_losses_reads_a_value_back(method):
    """Fake tensors have no values: whatever asks for one raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = adapted(method).train()
    model.set_attn_implementation("sdpa")
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.zeros(2, 5, dtype=torch.long)
        output = model(inputs_embeds=torch.zeros(2, 5, 16), labels=ids)
    assert output.loss.shape == () and output.logits.shape == (2, 5, VOCABULARY)


def test_distributed_data_parallel(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, ids = adapted().train(), tokens()
        model(ids, labels=ids).loss.backward()
        expected = gradients(model)
        model.zero_grad()
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert fm.moe.structure(wrapped) is fm.moe.structure(model)
        wrapped(ids, labels=ids).loss.backward()
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grad, expected[name])
    finally:
        dist.destroy_process_group()
