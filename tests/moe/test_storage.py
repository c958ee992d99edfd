"""save and load: bit for bit, atomic, into plain and adapted models; and the published layouts of other projects."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fusedmerge as fm
from fusedmerge.errors import FormatError, InvalidTypeError, InvalidValueError, MissingFileError, StateError, UnknownNameError
from tests.moe.material import SIZES, adapted, config, tiny, tokens
from tests.moe.test_inject import Backwards

FORMS = {
    "lora_switch": {},
    "lora_switch, k=1, names": {"top_k": 1, "expert_names": ["a", "b", "c", "d"]},
    "lora_switch, table": {"router": "table"},
    "mola": {"num_experts": [2, 4]},
    "moral": {},
    "pesc": {},
    "mixlora": {},
    "loramoe": {"expert_types": [0, 0, 1, 1]},
    "molora": {},
    "xlora": {"xlora": {"depth": 2, "size": 6, "layerwise": True}},
    "lora": {"use_rslora": True},
}


def bits(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("form", FORMS)
def test_a_round_trip_is_bit_equal(form, tmp_path):
    ids = tokens()
    model = adapted(form.partition(",")[0], **FORMS[form])
    fm.moe.save(model, tmp_path / "a")
    again = fm.moe.load(tiny(), tmp_path / "a")
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert fm.moe.structure(again).config == fm.moe.structure(model).config
    fm.moe.save(again, tmp_path / "b")
    assert bits(tmp_path / "a") == bits(tmp_path / "b")
    assert sorted(bits(tmp_path / "a")) == ["adapter_config.json", "adapter_model.safetensors"]
    other = adapted(form.partition(",")[0], seed=9, **FORMS[form])
    if form != "lora_switch, table":
        assert not torch.equal(other(ids).logits, model(ids).logits)
    assert torch.equal(fm.moe.load(other, tmp_path / "a")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_keeps_its_bits(dtype, tmp_path):
    model = adapted().to(dtype)
    fm.moe.save(model, tmp_path)
    again = fm.moe.load(tiny(dtype=dtype), tmp_path)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == again.state_dict()[name].dtype and torch.equal(tensor, again.state_dict()[name]), name


def test_a_plain_module_remembers_where_its_router_sits(tmp_path):
    torch.manual_seed(0)
    model = fm.moe.inject(Backwards(), config(), 4)
    with pytest.raises(StateError, match=r"router.weight: expected a router whose width a forward has shown"):
        fm.moe.save(model, tmp_path / "early")
    assert not (tmp_path / "early").exists()
    x = torch.randn(3, 6)
    expected = model(x)
    fm.moe.save(model, tmp_path)
    torch.manual_seed(0)
    again = fm.moe.load(Backwards(), tmp_path)
    assert fm.moe.structure(again).places == {"router": "first"}
    assert torch.equal(again(x), expected)


def test_names_are_pefts(tmp_path):
    fm.moe.save(adapted(), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    assert tensors[f"{prefix}lora_A.weight"].shape == (4, 3, 16) and tensors[f"{prefix}lora_B.weight"].shape == (4, 16, 3)
    assert tensors[f"{prefix}scaling"].tolist() == [1.5] * 4 and tensors["base_model.model.router.weight"].shape == (4, 16)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (values["peft_type"], values["r"], values["lora_alpha"], values["method"]) == ("FUSEDMERGE_MOE", 3, 4.5, "lora_switch")
    with pytest.raises(FormatError, match="peft_type"):
        fm.AdapterBank.from_peft([tmp_path], tiny())


def test_an_interrupted_save_leaves_the_old_one(tmp_path, monkeypatch):
    import safetensors.torch

    fm.moe.save(adapted(), tmp_path)
    before = bits(tmp_path)

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        fm.moe.save(adapted(seed=9), tmp_path)
    assert bits(tmp_path) == before


def damage(directory, change):
    file = directory / "adapter_model.safetensors"
    tensors, values = load_file(file), json.loads((directory / "adapter_config.json").read_text())
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    changed = dict(tensors)
    if change == "missing":
        del changed[key]
    elif change == "unknown":
        changed["base_model.model.extra.weight"] = torch.ones(1)
    elif change == "shape":
        changed[key] = tensors[key][:, :-1].contiguous()
    elif change == "router":
        changed["base_model.model.router.weight"] = torch.ones(4, 15)
    elif change == "nan":
        changed[key] = tensors[key] * torch.nan
    elif change == "field":
        values["colour"] = "red"
    elif change == "value":
        values["top_k"] = 7
    config_text = json.dumps(values)
    save_file(changed, file, metadata={"config": config_text})
    (directory / "adapter_config.json").write_text(config_text)
    if change == "half":
        file.write_bytes(file.read_bytes()[:-50])
    elif change == "two saves":
        (directory / "adapter_config.json").write_text(json.dumps(values | {"lora_alpha": 99.0}))
    elif change == "no tensors":
        file.unlink()
    elif change == "no configuration":
        (directory / "adapter_config.json").unlink()
    elif change == "another":
        (directory / "adapter_config.json").write_text(json.dumps(values | {"format": "fusedmerge.moe.v9"}))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ("missing", FormatError, r"no base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"),
        ("unknown", FormatError, "base_model.model.extra.weight"),
        ("shape", FormatError, r"up_proj.lora_B.weight: expected shape \[4, 24, 3\], got \[4, 23, 3\]"),
        ("router", FormatError, r"router.weight: expected shape \[4, 16\], got \[4, 15\]"),
        ("nan", FormatError, "inf or NaN"),
        ("field", FormatError, "colour"),
        ("value", InvalidValueError, "top_k"),
        ("half", FormatError, "adapter_model.safetensors"),
        ("two saves", FormatError, "two files of one save"),
        ("no tensors", MissingFileError, "adapter_model.safetensors"),
        ("no configuration", MissingFileError, "adapter_config.json"),
        ("another", FormatError, "fusedmerge.moe.v1"),
    ],
)
def test_a_damaged_save_is_refused_and_the_model_left_alone(change, error, match, tmp_path):
    fm.moe.save(adapted(), tmp_path)
    damage(tmp_path, change)
    plain, ids = tiny(), tokens()
    with pytest.raises(error, match=match):
        fm.moe.load(plain, tmp_path)
    assert torch.equal(plain(ids).logits, tiny()(ids).logits) and plain.state_dict().keys() == tiny().state_dict().keys()
    mine = adapted(seed=9)
    with pytest.raises(error, match=match):
        fm.moe.load(mine, tmp_path)
    assert torch.equal(mine(ids).logits, adapted(seed=9)(ids).logits)


def test_arguments_and_other_models(tmp_path):
    fm.moe.save(adapted(), tmp_path / "a")
    with pytest.raises(MissingFileError, match="directory"):
        fm.moe.load(tiny(), tmp_path / "none")
    with pytest.raises(InvalidTypeError, match="directory"):
        fm.moe.save(adapted(), 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidValueError, match="a file"):
        fm.moe.save(adapted(), tmp_path / "file")
    with pytest.raises(StateError, match="^save"):
        fm.moe.save(tiny(), tmp_path / "b")
    with pytest.raises(InvalidValueError, match="top_k: 1 and 2"):
        fm.moe.load(adapted(top_k=1), tmp_path / "a")
    with pytest.raises(FormatError, match="shape"):
        fm.moe.load(tiny(intermediate_size=28), tmp_path / "a")
    with pytest.raises(FormatError):
        fm.moe.load(tiny(num_hidden_layers=1), tmp_path / "a")


class Project:
    """A checkpoint in another project's names, filled with one of our models' experts."""

    def __init__(self, model):
        self.model, self.made, self.tensors = model, fm.moe.structure(model), {}
        for name, part in self.made.parts.items():
            for side, stack in (("A", part.lora_A), ("B", part.lora_B)):
                for expert, factor in enumerate(stack.detach()):
                    self.add(name, side, expert if not part.static else None, factor.clone())
        for name, router in self.made.routers.items():
            self.add_router(name, router.weight.detach().clone())

    def write(self, directory, **fields):
        directory.mkdir()
        c = self.made.config
        common = {"r": c.r, "lora_alpha": c.lora_alpha, "lora_dropout": 0.25, "bias": "none", "target_modules": ["q_proj"]}
        (directory / "adapter_config.json").write_text(json.dumps(common | fields))
        torch.save(self.tensors, directory / "adapter_model.bin")
        return directory


class MoEPEFT(Project):
    def add(self, name, side, expert, factor):
        method, module = self.made.config.method, name.removeprefix("model.")
        at = f"experts.{expert}." if expert is not None else ""
        self.tensors[f"{method}.{module}.{at}lora_{side}.weight"] = factor

    def add_router(self, name, weight):
        self.tensors[f"{self.made.config.method}.{name.removeprefix('model.')}.moe_gate.weight"] = weight


class MoLA(Project):
    def add(self, name, side, expert, factor):
        self.tensors[f"base_model.model.{name}.lora_{side}_{expert}.weight"] = factor

    def add_router(self, name, weight):
        self.tensors[f"base_model.model.{name}.router.router.weight"] = weight


@pytest.mark.parametrize("method", ["mixlora", "loramoe", "mola"])
def test_moe_pefts_layouts(method, tmp_path):
    model, ids = adapted(method), tokens()
    fields = {"num_experts": 4, "peft_type": method.upper(), "routing_strategy": method} | ({"top_k": 2} if method != "loramoe" else {})
    directory = MoEPEFT(model).write(tmp_path / "a", **fields)
    loaded = fm.moe.load(tiny(), directory)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert fm.moe.structure(loaded).config.lora_dropout == 0.25
    shallow = tiny(num_hidden_layers=1)
    with pytest.raises((FormatError, UnknownNameError)):
        fm.moe.load(shallow, directory)
    assert shallow.state_dict().keys() == tiny(num_hidden_layers=1).state_dict().keys()
    if method == "mixlora":
        with pytest.raises(FormatError, match="act_fn"):
            fm.moe.load(tiny(), MoEPEFT(model).write(tmp_path / "b", **fields, act_fn="gelu"))


def test_molas_own_layout_with_experts_by_layer(tmp_path):
    model, ids = adapted("mola", num_experts=[2, 4]), tokens()
    directory = MoLA(model).write(tmp_path / "a", peft_type="LORA", r=[3, 3])
    plain = tiny()
    with pytest.raises(InvalidValueError, match="top_k"):
        fm.moe.load(plain, directory)
    loaded = fm.moe.load(plain, directory, top_k=2)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert fm.moe.structure(loaded).config.num_experts == (2, 4)


def lora_directory(path, seed, r=2):
    """A random PEFT adapter of the tiny model, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = ["q_proj", "down_proj"]
    model = get_peft_model(tiny(), LoraConfig(r=r, lora_alpha=3, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"))
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layerwise_scalings": True, "softmax_temperature": 0.3},
        {"xlora_depth": 3, "xlora_size": 6, "top_k_lora": 2},
        {"top_k_lora": 1, "enable_softmax": False, "enable_softmax_topk": True},
        {"enable_softmax": False, "enable_softmax_topk": True},
        {"enable_softmax": False, "global_scaling_weight": 0.5},
    ],
)
def test_x_lora_as_peft_saves_and_runs_it(options, tmp_path):
    from peft import XLoraConfig, get_peft_model

    adapters = {str(index): str(lora_directory(tmp_path / f"expert{index}", index)) for index in range(3)}
    base = tiny(use_cache=False)
    torch.manual_seed(5)
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=SIZES["hidden_size"], adapters=adapters, **options)
    theirs = get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in theirs.base_model.internal_xlora_classifier.parameters():
            parameter.mul_(6)
    theirs.save_pretrained(tmp_path / "x")
    whole = {name: tensor for name, tensor in theirs.state_dict().items() if "internal_xlora_classifier" in name}
    save_file(whole, tmp_path / "x/adapter_model.safetensors")  # PEFT 0.21 drops layer n of the classifier where an adapter is called "n"
    ids = tokens()
    ours = fm.moe.load(tiny(), tmp_path / "x")
    torch.testing.assert_close(ours(ids).logits, theirs(input_ids=ids).logits, atol=2e-5, rtol=1e-4)
    assert not any(part.lora_A.requires_grad for part in fm.moe.structure(ours).parts.values())


def test_x_loras_authors_layout(tmp_path):
    model = adapted("xlora", num_experts=2, xlora={"depth": 2, "size": 6}, target_modules=["q_proj", "down_proj"], r=2, lora_alpha=3)
    for index in range(2):
        lora_directory(tmp_path / "x" / "adapters" / f"e{index}", index)
    layers = fm.moe.structure(model).routers["router"].layers
    names = {
        "inner.0.weight": layers[0].weight,
        "inner.0.bias": layers[0].bias,
        "last.weight": layers[1].weight,
        "last.bias": layers[1].bias,
    }
    save_file({name: tensor.detach() for name, tensor in names.items()}, tmp_path / "x/xlora_classifier.safetensors")
    values = {
        "hidden_size": 16,
        "adapters": {"e0": "gone", "e1": "gone"},
        "xlora_depth": 2,
        "xlora_size": 6,
        "use_trainable_adapters": True,
    }
    (tmp_path / "x/xlora_config.json").write_text(json.dumps(values))
    loaded = fm.moe.load(tiny(), tmp_path / "x")
    made = fm.moe.structure(loaded)
    assert made.config.names == ("e0", "e1")
    for own, given in zip(made.routers["router"].layers, layers, strict=True):
        assert torch.equal(own.weight, given.weight) and torch.equal(own.bias, given.bias)
    bank = fm.AdapterBank.from_peft([tmp_path / "x/adapters/e0", tmp_path / "x/adapters/e1"], tiny())
    for name, linear in made.linears.items():
        assert torch.equal(linear.lora_A, bank.target(name).a[:, :2])
    elsewhere = fm.moe.load(tiny(), tmp_path / "x", adapters=[tmp_path / "x/adapters/e1", tmp_path / "x/adapters/e0"])
    name, linear = next(iter(fm.moe.structure(elsewhere).linears.items()))
    assert torch.equal(linear.lora_A.flip(0), made.linears[name].lora_A)
    for field, value in (("scaling_pass_value", 0.5), ("enable_softmax_topk", True)):
        (tmp_path / "x/xlora_config.json").write_text(json.dumps(values | {field: value}))
        with pytest.raises(FormatError, match=field):
            fm.moe.load(tiny(), tmp_path / "x")
    (tmp_path / "x/xlora_config.json").write_text(json.dumps(values))
    with pytest.raises(MissingFileError, match="e0"):
        fm.moe.load(tiny(), tmp_path / "x", adapters={"e0": tmp_path / "none", "e1": tmp_path / "x/adapters/e1"})
    with pytest.raises(InvalidValueError, match="adapters"):
        fm.moe.load(tiny(), tmp_path / "x", adapters=[tmp_path / "x/adapters/e1"])
