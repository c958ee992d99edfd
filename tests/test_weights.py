"""Names of weights, and which weights a switch may write into."""

import copy

import pytest
import torch
from torch import nn

import fusedmerge as fm
from fusedmerge import errors
from fusedmerge.weights import Weight, canonical_name, check_writable, collect, overlap
from tests import kit


@pytest.mark.parametrize(
    "raw",
    [
        "model.layers.0.q_proj.weight",
        "base_model.model.model.layers.0.q_proj.weight",
        "base_model.model.model.layers.0.q_proj.base_layer.weight",
        "_orig_mod.model.layers.0.q_proj.weight",
        "module.model.layers.0.q_proj.weight",
        "module._orig_mod.base_model.model.model.layers._orig_mod.0.q_proj.base_layer.weight",
        "model._fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.q_proj.weight",
    ],
)
def test_names_lose_their_wrappers(raw):
    assert canonical_name(raw) == "model.layers.0.q_proj.weight"


@pytest.mark.parametrize("name", ["my_module.weight", "layers.0.module.weight", "a_base_layer.weight", "modules.0.weight"])
def test_other_names_stay(name):
    assert canonical_name(name) == name


def test_wrapped_models_give_the_bare_names():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    compiled = torch.compile(model)
    assert set(collect(compiled, "test")) == set(collect(model, "test")) == {"0.weight", "0.bias", "1.weight", "1.bias"}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.other = nn.Linear(6, 6, bias=False)
        self.head.weight = self.embed.weight


def test_a_tied_target_is_refused_and_others_are_not():
    model = Tied()
    before = kit.snapshot(dict(model.named_parameters()))
    for target in ("head.weight", "embed.weight"):
        bank = fm.AdapterBank.random(model, 1, 2, targets=[target])
        with pytest.raises(errors.StateError, match="tied to or overlaps"):
            fm.Switcher(model, bank)
    fm.Switcher(model, fm.AdapterBank.random(model, 1, 2, targets=["other.weight"])).switch("random_0")
    after = kit.snapshot(dict(model.named_parameters()))
    assert after["other.weight"] != before["other.weight"]
    assert after["embed.weight"] == before["embed.weight"]


def test_a_module_registered_twice_is_adapted_once():
    model = nn.Module()
    model.first = nn.Linear(5, 4, bias=False)
    model.second = model.first
    base = model.first.weight.detach().clone()
    bank = fm.AdapterBank.random({"first.weight": base}, 1, 2)
    switcher = fm.Switcher(model, bank)
    switcher.switch("random_0")
    kit.assert_merged(model.second.weight, base, bank.target("first.weight"), [(0, 1.0)])
    with pytest.raises(errors.StateError, match="tied"):
        fm.Switcher(model, fm.AdapterBank.random({"first.weight": base, "second.weight": base}, 1, 2))


def test_overlapping_views_are_refused_and_slices_of_packed_qkv_are_not():
    packed = torch.randn(12, 8)
    q, k = packed[:4], packed[4:]
    bank = fm.AdapterBank.random({"q": q, "k": k}, 1, 2)
    fm.Switcher({"q": q, "k": k}, bank)
    with pytest.raises(errors.StateError, match="overlaps"):
        fm.Switcher({"q": packed[:4], "k": packed[3:11]}, bank)
    with pytest.raises(errors.StateError, match="overlaps"):  # also beside a weight that has no adapter
        fm.Switcher({"q": q, "k": k, "all": packed}, bank)


def test_overlap_of_column_slices_is_told_exactly():
    packed = torch.zeros(6, 10)
    assert not overlap(packed[:, :4], packed[:, 4:])
    assert overlap(packed[:, :5], packed[:, 4:])
    assert not overlap(packed[:3, 2:7], packed[3:, 2:7])
    assert overlap(packed[:4, 2:7], packed[3:, 6:])
    assert not overlap(packed[:4], torch.zeros(4, 10))
    assert overlap(packed, packed.t())


def _shapes(**tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.int8), errors.DtypeError, "unquantised base"),
        (torch.zeros(3, 4, dtype=torch.float8_e4m3fn), errors.DtypeError, "bfloat16, float16 or float32"),
        (torch.zeros(3, 4, dtype=torch.float64), errors.DtypeError, "bfloat16, float16 or float32"),
        (torch.zeros(3, 4, device="meta"), errors.DeviceError, "materialise the model"),
        (torch.zeros(4, 3).t(), errors.ShapeError, "rows that are contiguous"),
        (torch.zeros(1, 4).expand(3, 4), errors.ShapeError, "do not overlap"),
        (torch.zeros(3, 4, requires_grad=True) * 2, errors.StateError, "grad_fn"),
    ],
)
def test_weights_that_cannot_be_written(tensor, error, message):
    with pytest.raises(error, match=message):
        check_writable(_shapes(w=tensor), collect({"w": tensor}, "test"), "test")


def test_sparse_weights_are_refused():
    weight = torch.eye(3).to_sparse_csr()
    with pytest.raises(errors.ShapeError, match="a dense weight"):
        check_writable({"w": (3, 3)}, {"w": Weight("w", weight, None)}, "test")


def test_a_buffer_that_overlaps_a_target_is_seen():
    model = nn.Linear(4, 4, bias=False)
    model.register_buffer("view", model.weight.data[:2])
    with pytest.raises(errors.StateError, match="overlaps view"):
        fm.Switcher(model, fm.AdapterBank.random(model, 1, 2))


def test_missing_and_misshapen_targets():
    found = collect({"w": torch.zeros(3, 4)}, "test")
    with pytest.raises(errors.UnknownNameError, match="no v"):
        check_writable({"v": (3, 4)}, found, "test")
    with pytest.raises(errors.ShapeError, match=r"expected shape \[4, 3\], got \[3, 4\]"):
        check_writable({"w": (4, 3)}, found, "test")


class Params4bit(nn.Parameter):  # bitsandbytes' own name for its packed 4-bit weights
    pass


def test_quantised_modules_are_refused_by_name():
    model = nn.Linear(4, 4, bias=False)
    bank = fm.AdapterBank.random(model, 1, 2)
    packed = copy.deepcopy(model)
    packed.weight = Params4bit(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(errors.DtypeError, match=r"unquantised base.*Params4bit"):
        fm.Switcher(packed, bank)
    gptq = nn.Module()
    gptq.register_buffer("qweight", torch.zeros(1, 4, dtype=torch.int32))
    with pytest.raises(errors.DtypeError, match="qweight"):
        fm.Switcher(gptq, bank)


@pytest.mark.parametrize("weights", [[torch.zeros(2, 2)], None, {"w": [[1.0]]}, {3: torch.zeros(2, 2)}])
def test_weights_of_a_wrong_type(weights):
    with pytest.raises(errors.InvalidTypeError, match="weights"):
        collect(weights, "test")


def test_two_weights_of_one_name_are_refused():
    with pytest.raises(errors.InvalidValueError, match="two weights named"):
        collect({"w": torch.zeros(2, 2), "module.w": torch.zeros(2, 2)}, "test")
