"""Switcher: shared, moved and unfit weights, banks that do not fit, backends by name."""

import dataclasses

import pytest
import torch
from torch import nn

import fusedmerge as fm
from fusedmerge import errors, placement
from tests import kit

pytestmark = pytest.mark.usefixtures("engine")


def test_two_switchers_on_shared_weights():
    weights = kit.make_weights([(9, 31), (5, 6)])
    bank = kit.make_bank(weights)
    one, two = fm.Switcher(weights, bank), fm.Switcher({"w1": weights["w1"]}, kit.make_bank({"w1": weights["w1"]}))
    one.switch("a0")
    state = kit.snapshot(weights)
    with pytest.raises(errors.StateError, match=r"switch: w1: expected weights that no other Switcher has merged"):
        two.switch("a1")
    with pytest.raises(errors.StateError, match="no other Switcher"):
        fm.Switcher(weights, bank)  # its pristine copy would hold one's mixture
    assert kit.snapshot(weights) == state
    two.restore()  # nothing to do, nothing to refuse
    one.restore()
    two.switch("a1")
    with pytest.raises(errors.StateError, match="no other Switcher"):
        one.switch("a0")
    two.close()
    one.switch("a0")
    del one  # a mixture may be left in for good
    fm.Switcher(weights, bank).switch("a1")


def test_switchers_on_disjoint_slices_of_one_storage_do_not_mind_each_other():
    packed = torch.randn(8, 6)
    q, k = {"q": packed[:4]}, {"k": packed[4:]}
    one, two = fm.Switcher(q, fm.AdapterBank.random(q, 1, 2)), fm.Switcher(k, fm.AdapterBank.random(k, 1, 2))
    one.switch("random_0")
    two.switch("random_0")


def test_a_stale_backward_raises_torch_s_error():
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    switcher = fm.Switcher(model, fm.AdapterBank.random(model, 1, 2))
    x = torch.randn(4, 5, requires_grad=True)
    model(x).sum().backward()
    loss = model(x).sum()
    switcher.switch("random_0")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model(x).sum().backward()
    assert model[0].weight.requires_grad and model[0].weight.is_leaf


def _replace_module(model):
    model[0] = nn.Linear(5, 6)


def _shrink_storage(model):
    model[0].weight.untyped_storage().resize_(0)


def _transpose(model):
    model[0].weight.data = model[0].weight.data.t()


def _cut_rows(model):
    model[0].weight.data = model[0].weight.data[:3]


def _reinterpret(model):
    weight = model[0].weight.requires_grad_(False)
    weight.data = weight.data.view(torch.int32)


def _new_storage(model):
    model[0].weight.data = model[0].weight.data.clone()


MOVES = {
    "half": lambda model: model.half(),
    "new parameter": lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(5, 5))),
    "new module": _replace_module,
    "shared memory": lambda model: model.share_memory(),
    "storage freed": _shrink_storage,
    "transposed": _transpose,
    "fewer rows": _cut_rows,
    "another dtype over the same bytes": _reinterpret,
    "new storage": _new_storage,
    "no parameter": lambda model: setattr(model[0], "weight", None),
    "parameter removed": lambda model: delattr(model[0], "weight"),
    "module removed": lambda model: model._modules.pop("0"),
}


@pytest.fixture(params=["extension", "python"])
def look(request, monkeypatch):
    """Both ways to look at the weights: without torch's exchange API or the extension, Python's."""
    if request.param == "python":
        monkeypatch.setattr(placement, "_fast_look", lambda: None)
    elif placement._fast_look() is None:
        pytest.skip("torch before 2.10, or no extension")


@pytest.mark.usefixtures("look")
@pytest.mark.parametrize("move", MOVES)
def test_weights_that_moved_are_refused(move, engine):
    if move == "shared memory" and engine in ("jit", "aot"):
        return  # a GPU's memory is shared where it is
    model = nn.Sequential(nn.Linear(5, 5))
    bank = fm.AdapterBank.random(model, 1, 2)
    switcher = fm.Switcher(model, bank)
    switcher.switch("random_0")
    switcher.check()
    MOVES[move](model)
    for call in (lambda: switcher.switch({}), lambda: switcher.switch("random_0"), switcher.check, switcher.restore):
        with pytest.raises(errors.StateError, match="build a new Switcher"):
            call()
    with pytest.raises(errors.StateError, match="build a new Switcher"):
        switcher.close()
    switcher.close()  # freed all the same
    assert switcher.nbytes == 0
    bank.remove("random_0")


def check_that_a_clone_is_refused():
    weights = kit.make_weights([(9, 31), (5, 6)])
    switcher = fm.Switcher(weights, kit.make_bank(weights))
    switcher.switch("a0")
    switcher.switch("a0")
    weights["w1"].data = weights["w1"].data.clone()
    with pytest.raises(errors.StateError, match="switch: w1: expected the storage"):
        switcher.switch("a0")


def test_an_exchange_that_is_none_of_dlpack_s_leaves_the_look_to_python(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", 1, raising=False)
    check_that_a_clone_is_refused()


@pytest.mark.usefixtures("look")
def test_bare_tensors_that_moved_are_refused():
    check_that_a_clone_is_refused()


@pytest.mark.usefixtures("look")
def test_a_new_parameter_over_the_old_storage_is_the_same_weight():
    model = nn.Sequential(nn.Linear(5, 6))
    before = model[0].weight.detach().clone()
    switcher = fm.Switcher(model, fm.AdapterBank.random(model, 1, 2))
    model[0].weight = nn.Parameter(model[0].weight.data, requires_grad=False)
    switcher.switch("random_0")
    assert not torch.equal(model[0].weight, before)
    switcher.restore()
    assert torch.equal(model[0].weight, before)


def test_the_mixture_to_come_back_is_kept_in_the_bank():
    weights = kit.make_weights([(9, 31)])
    bank = kit.make_bank(weights)
    switcher = fm.Switcher(weights, bank)
    switcher.switch("a0")
    with switcher.switched("a1"), pytest.raises(errors.StateError, match="not active"):
        bank.remove("a0")
    with pytest.raises(ZeroDivisionError) as kept, switcher.switched("a1"):
        raise ZeroDivisionError
    switcher.restore()
    bank.remove("a0")  # also while something holds on to the block's frame
    assert kept


def test_no_other_call_passes_by_an_active_switcher():
    weights = kit.make_weights([(9, 31)])
    before = kit.snapshot(weights)
    bank = kit.make_bank(weights)
    one, two = fm.Switcher(weights, bank), fm.Switcher(weights, bank)
    one.switch("a0")
    merged = kit.snapshot(weights)
    with pytest.raises(errors.StateError, match="no other Switcher"):
        two.switch({})  # it would write nothing, but nor would it set what it was asked to
    two.invalidate()
    for call in (lambda: two.switch("a1"), lambda: two.switch({}), two.refresh, two.restore):
        with pytest.raises(errors.StateError, match="no other Switcher"):
            call()
        assert kit.snapshot(weights) == merged
    one.restore()
    two.restore()
    assert kit.snapshot(weights) == before


def test_a_model_with_modules_of_its_own_called_lora_is_no_peft_model():
    model = nn.Sequential(nn.Linear(5, 6))
    model[0].lora_A = nn.Parameter(torch.zeros(1, 5))
    fm.Switcher(model, fm.AdapterBank.random(model, 1, 2, targets=["0.weight"])).switch("random_0")


@pytest.mark.parametrize("mode", ["Exact", "", None, 1])
def test_modes(mode):
    weights = kit.make_weights([(5, 6)])
    with pytest.raises(errors.InvalidValueError, match='"exact" or "inplace"'):
        fm.Switcher(weights, kit.make_bank(weights), mode)


def test_banks_that_do_not_fit():
    weights = kit.make_weights([(5, 6)])
    bank = kit.make_bank(weights)
    with pytest.raises(errors.InvalidTypeError, match="an AdapterBank"):
        fm.Switcher(weights, {"w0": 1})
    with pytest.raises(errors.UnknownNameError, match="no w0"):
        fm.Switcher({"other": torch.zeros(5, 6)}, bank)
    with pytest.raises(errors.ShapeError, match=r"expected shape \[5, 6\], got \[6, 5\]"):
        fm.Switcher({"w0": torch.zeros(6, 5).bfloat16()}, bank)
    with pytest.raises(errors.DtypeError, match=r"in the weight's dtype \(torch.float16\) or in float32, got torch.bfloat16"):
        fm.Switcher({"w0": torch.zeros(5, 6).half()}, bank)
    with pytest.raises(errors.DeviceError, match="device meta"):
        fm.Switcher({"w0": torch.zeros(5, 6, device="meta").bfloat16()}, bank)
    with torch.inference_mode():
        frozen = torch.zeros(5, 6).bfloat16()
    with pytest.raises(errors.StateError, match="inference_mode"):
        fm.Switcher({"w0": frozen}, bank)
    target = bank.target("w0")
    target.spec = dataclasses.replace(target.spec, device=torch.device("cuda", 7))
    with pytest.raises(errors.DeviceError, match=r"bank's device \(cuda:7\), got c"):
        fm.Switcher(weights, bank)


def test_the_backend_can_be_named_and_says_why_it_cannot_be_used(monkeypatch):
    torch.set_default_device(None)
    weights = kit.make_weights([(5, 6)])
    bank = kit.make_bank(weights)
    assert fm.backends()["cpu"] and set(fm.backends()) == {"cpu", "sim", "jit", "aot"}
    monkeypatch.setenv("FUSEDMERGE_BACKEND", "cpu")
    fm.Switcher(weights, bank)
    monkeypatch.setenv("FUSEDMERGE_BACKEND", "gpu")
    with pytest.raises(errors.InvalidValueError, match="one of cpu, sim, jit, aot"):
        fm.Switcher(weights, bank)
    monkeypatch.setenv("FUSEDMERGE_BACKEND", "jit")
    with pytest.raises(errors.BackendError, match="jit"):
        fm.Switcher(weights, bank)
