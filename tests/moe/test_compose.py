"""Independent adapters as experts, tables instead of a router, and the way to the switch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fusedmerge as fm
from fusedmerge.errors import InvalidTypeError, InvalidValueError, ShapeError, StateError, UnknownNameError
from tests.moe.material import VOCABULARY, adapted, backbone, config, float64, tiny, tokens
from tests.moe.reference import Mixture
from tests.moe.test_storage import lora_directory


@pytest.fixture
def adapters(tmp_path):
    return {name: lora_directory(tmp_path / name, index, r=2 + index) for index, name in enumerate(("math", "code", "chat"))}


def peft_logits(directory, ids):
    from peft import PeftModel

    return PeftModel.from_pretrained(tiny(), directory)(input_ids=ids).logits


def test_adapters_become_frozen_experts_under_a_router(adapters):
    ids = tokens()
    for given in (adapters, list(adapters.values()), fm.AdapterBank.from_peft(adapters, tiny())):
        model = fm.moe.compose(tiny(), given)
        made = fm.moe.structure(model)
        assert made.config.names == ("math", "code", "chat") and made.bank().names == ("math", "code", "chat")
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lora_routers.router.weight"]
        for index, directory in enumerate(adapters.values()):  # each alone is what PEFT makes of it
            with made.forced(torch.tensor([index]), torch.ones(1)):
                torch.testing.assert_close(model(ids).logits, peft_logits(directory, ids), atol=1e-5, rtol=1e-5)
    before = made.linears["model.layers.0.self_attn.q_proj.weight"].lora_A.clone()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    first = model(ids, labels=ids).loss
    first.backward()
    optimiser.step()
    assert model(ids, labels=ids).loss < first
    assert torch.equal(before, made.linears["model.layers.0.self_attn.q_proj.weight"].lora_A)


def test_a_composed_model_is_saved_with_its_own_scalings(adapters, tmp_path):
    model, ids = fm.moe.compose(tiny(), adapters, top_k=3), tokens()
    fm.moe.save(model, tmp_path / "saved")
    assert torch.equal(fm.moe.load(tiny(), tmp_path / "saved")(ids).logits, model(ids).logits)


def test_a_table_needs_no_training(adapters):
    ids = tokens()
    table = {int(ids[0, 0]): "math", int(ids[0, 1]): ["code", 2], int(ids[0, 2]): {"chat": -0.5}}
    model = fm.moe.compose(tiny(), adapters, table=table)
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    made = fm.moe.structure(model)
    rows = dict(zip(table, ([(0, 1.0)], [(1, 1.0), (2, 1.0)], [(2, -0.5)]), strict=True))

    class Table(Mixture):
        def begin(self, backbone, ids):
            self.chosen = [rows.get(int(token), []) for token in ids]

        def choices(self, name, x):
            return self.chosen

    experts = {name: tuple(map(float64, (part.lora_A, part.lora_B, part.scaling))) for name, part in made.parts.items()}
    expected = np.stack([backbone(tiny()).logits(row, Table(experts, {}, 2, None)) for row in ids.numpy()])
    np.testing.assert_allclose(float64(model(ids).logits), expected, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(StateError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 16))


def test_a_control_token_decides_for_what_follows_it(adapters, tmp_path):
    math, code, off, other = 3, 9, 11, 20
    model = fm.moe.compose(tiny(), adapters, table={math: "math", code: {"code": 0.5, "chat": 1.0}, off: []}, hold=True)
    made = fm.moe.structure(model)
    ids = torch.tensor([[other, math, other, other, code, other, math], [math, off, other, code, other, other, other]])
    rows = {math: ([0, -1], [1.0, 0.0]), code: ([1, 2], [0.5, 1.0]), off: ([-1, -1], [0.0, 0.0])}
    steering = [[off, math, math, math, code, code, math], [math, off, off, code, code, code, code]]
    with made.forced(*(torch.tensor([[rows[token][part] for token in row] for row in steering]) for part in (0, 1))):
        expected = model(ids).logits
    assert torch.equal(model(ids).logits, expected)
    first = model(ids[:, :3], use_cache=True)
    parts = [first.logits] + [model(ids[:, t : t + 1], past_key_values=first.past_key_values).logits for t in range(3, 7)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)
    fm.moe.save(model, tmp_path / "saved")
    assert torch.equal(fm.moe.load(tiny(), tmp_path / "saved")(ids).logits, expected)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"table": {}}, InvalidTypeError, "table"),
        ({"table": {-1: 0}}, InvalidValueError, "token ids"),
        ({"table": {VOCABULARY: 0}}, InvalidValueError, "vocabulary"),
        ({"table": {0: "cooking"}}, UnknownNameError, "cooking"),
        ({"table": {0: 3}}, UnknownNameError, "0 to 2"),
        ({"table": {0: True}}, UnknownNameError, "0 to 2"),
        ({"table": {0: None}}, InvalidTypeError, "an expert, several"),
        ({"table": {0: 1.5}}, InvalidTypeError, "an expert, several"),
        ({"table": {0: {0: "half"}}}, InvalidTypeError, "gate"),
        ({"table": {0: {0: float("nan")}}}, InvalidValueError, "gate"),
        ({"table": {0: []}}, InvalidValueError, "at least one expert"),
        ({"top_k": 4}, InvalidValueError, "top_k"),
        ({"r": 4}, InvalidValueError, "r"),
        ({"method": "mola"}, InvalidValueError, "method"),
    ],
)
def test_what_compose_refuses_leaves_the_model_alone(adapters, fields, error, match):
    model = tiny()
    with pytest.raises(error, match=match):
        fm.moe.compose(model, adapters, **fields)
    assert not hasattr(model, "_fusedmerge_moe") and model.state_dict().keys() == tiny().state_dict().keys()


def test_compose_refuses_adapters_of_another_model(adapters):
    with pytest.raises((ShapeError, UnknownNameError)):
        fm.moe.compose(tiny(hidden_size=24), adapters)


def test_a_random_table_gives_distinct_experts_and_needs_no_router():
    model, ids = adapted(router="table", top_k=2), tokens()
    table = fm.moe.structure(model).routers["router"]
    assert table.ids.shape == (VOCABULARY, 2) and bool((table.ids[:, 0] != table.ids[:, 1]).all())
    assert len({tuple(row) for row in table.ids.tolist()}) > 5
    with fm.moe.structure(model).forced(table.ids[ids], table.gates[ids]):
        expected = model(ids).logits
    assert torch.equal(model(ids).logits, expected)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.bfloat16()
    assert table.gates.dtype == torch.float32


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
def test_a_token_table_is_what_the_router_decides(family):
    model, ids = adapted(family=family), tokens(2, 7)
    table = fm.moe.token_table(model, chunk=7)
    with fm.moe.structure(model).recording() as records:
        model(ids)
    assert torch.equal(table.ids[ids], records[0].ids)
    torch.testing.assert_close(table.gates[ids], records[0].gates)
    assert table.ids.shape == (VOCABULARY, 2)


def test_a_token_table_is_refused_where_the_router_sees_more_than_the_token():
    for targets in (["o_proj"], [r"k_proj", "layers.1.mlp.up_proj"], ["layers.1.self_attn.q_proj"]):
        model = adapted(target_modules=targets)
        if targets[0] == "k_proj":
            assert len(fm.moe.token_table(model).ids) == VOCABULARY
            continue
        with pytest.raises(StateError, match="one token's embedding only"):
            fm.moe.token_table(model)
    for model in (adapted("mola"), fm.moe.inject(nn.Sequential(nn.Linear(3, 3)), config())):
        with pytest.raises(StateError, match="token_table"):
            fm.moe.token_table(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", ["exact", "inplace"])
def test_a_switched_model_is_the_unmerged_one(dtype, mode):
    """bank() and suspended(): merged into the weights, one routing gives what un-merged application gives, within rounding."""
    ids = tokens(1, 6)
    model = fm.moe.inject(tiny(dtype=dtype), config(), 3)
    made = fm.moe.structure(model)
    bank = made.bank()
    assert bank.names == tuple(f"expert_{e}" for e in range(4)) and set(bank.targets) == set(made.linears)
    before = {name: part.base_layer.weight.clone() for name, part in made.linears.items()}
    with torch.no_grad():
        with made.recording() as records:
            model(ids)
        chosen, gates = records[0].ids[0, 2], records[0].gates[0, 2]
        with made.forced(chosen, gates):
            unmerged = model(ids).logits
        switcher = fm.Switcher(model, bank, mode=mode)
        with switcher.switched(chosen, gates), made.suspended():
            merged = model(ids).logits
        plain = tiny(dtype=torch.float64)
        fm.moe.inject(plain, config(), 3)
        with fm.moe.structure(plain).forced(chosen, gates.double()):
            truth = plain(ids).logits
    eps = torch.finfo(dtype).eps
    scale = truth.abs().mean()
    assert (merged.double() - truth).abs().mean() < 6 * eps * scale
    assert (unmerged.double() - truth).abs().mean() < 6 * eps * scale
    assert (tiny()(ids).logits - truth).abs().mean() > 0.1 * scale
    if mode == "exact":
        assert all(torch.equal(part.base_layer.weight, before[name]) for name, part in made.linears.items())


def test_what_a_bank_holds():
    made = fm.moe.structure(adapted("loramoe", dtype=torch.float32))
    bank = made.bank()
    assert bank.names == ("expert_0", "expert_1", "expert_2", "expert_3", "static")
    q_proj, up_proj = (f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "mlp.up_proj"))
    assert bank.target(q_proj).ranks == [0, 0, 0, 0, 3] and bank.target(up_proj).ranks == [3, 3, 3, 3, 0]
    assert torch.equal(bank.target(up_proj).a[2, :3], made.linears[up_proj].lora_A[2])
    assert bank.target(up_proj).scalings == [1.5, 1.5, 1.5, 1.5, 0.0]
    by_layer = fm.moe.structure(adapted("mola", num_experts=[2, 4])).bank()
    assert by_layer.target(q_proj).ranks == [3, 3, 0, 0]
    assert fm.moe.structure(adapted("lora")).bank().names == ("static",)
    narrow = made.bank(dtype=torch.bfloat16)
    assert narrow.target(up_proj).a.dtype == torch.bfloat16
    for method in ("mixlora", "pesc"):
        with pytest.raises(StateError, match=method):
            fm.moe.structure(adapted(method)).bank()
