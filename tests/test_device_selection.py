"""Ids and gates that are on the device already, for which the simulator's memory is the device; flags that the device sets; arrays.

tests/test_gpu.py is for a GPU.
"""

import cupy
import numpy as np
import pytest
import torch

import fusedmerge as fm
from fusedmerge import errors, selection
from tests import kit

SHAPES = [(9, 31), (67, 131)]


@pytest.fixture
def on_sim(sim_library, monkeypatch):
    monkeypatch.setenv("FUSEDMERGE_SIM_LIB", sim_library)
    monkeypatch.setenv("FUSEDMERGE_BACKEND", "sim")
    weights = kit.make_weights(SHAPES) | {"wide": kit.make_weights([(20, 40)], torch.float32)["w0"]}
    return weights, kit.make_bank(weights)


def ids_and_gates(*pairs):
    return torch.tensor([i for i, _ in pairs], dtype=torch.int32), torch.tensor([g for _, g in pairs], dtype=torch.float32)


def test_a_selection_on_the_device_is_what_it_would_be_from_the_host(on_sim):
    weights, bank = on_sim
    made = fm.Switcher(weights, bank)
    made.switch({"a0": 0.7, "a2": 0.3})
    merged = kit.snapshot(weights)
    made.switch("a1")
    versions = [weight._version for weight in weights.values()]
    made._set_on_device(*ids_and_gates((2, 0.3), (-1, 9.0), (0, 0.7)), "switch")
    assert kit.snapshot(weights) == merged and all(w._version > v for w, v in zip(weights.values(), versions, strict=True))
    assert [(name, pytest.approx(gate)) for name, gate in made.active] == [("a0", 0.7), ("a2", 0.3)]
    made.switch({"a0": 0.7, "a2": 0.3})
    assert made.active == (("a0", 0.7), ("a2", 0.3))
    with made.switched("a1"):
        pass
    assert kit.snapshot(weights) == merged
    made.restore()
    assert made.active == ()


def test_bad_values_on_the_device_change_nothing_and_are_told_once(on_sim):
    weights, bank = on_sim
    made = fm.Switcher(weights, bank)
    made.switch({"a0": 0.7})
    held = kit.snapshot(weights)
    for pair, words in (((4, 1.0), "ids: expected -1"), ((-2, 1.0), "ids: expected -1"), ((1, float("nan")), "gates: expected finite")):
        for tell in (made.check, lambda: made.active):
            made._set_on_device(*ids_and_gates(pair), "switch")
            assert kit.snapshot(weights) == held
            with pytest.raises(errors.InvalidValueError, match=words):
                tell()
            made.check()
            assert made.active == (("a0", 0.7),)
    with pytest.raises(errors.InvalidValueError, match="at most 32"):
        made._set_on_device(*ids_and_gates(*[(0, 0.1)] * 33), "switch")
    assert kit.snapshot(weights) == held


def test_no_adapter_can_leave_while_the_device_may_choose_it(on_sim):
    weights, bank = on_sim
    made = fm.Switcher(weights, bank)
    made._set_on_device(*ids_and_gates((1, 1.0)), "switch")
    with pytest.raises(errors.StateError, match="not active"):
        bank.remove("a3")
    made.switch("a1")
    bank.remove("a3")
    made.restore()
    before = kit.snapshot(weights)
    made._set_on_device(*ids_and_gates((3, 1.0)), "switch")  # a free slot adds nothing
    assert kit.snapshot(weights) == before


def test_after_a_capture_the_device_alone_is_believed(on_sim, monkeypatch):
    """The replay of a captured switch, which the host does not see, is stood in for by the launch that a graph would make."""
    weights, bank = on_sim
    made = fm.Switcher(weights, bank)
    engine = made._engine
    ids, gates = ids_and_gates((0, 1.0))
    launches = []
    launch = engine.launch
    with monkeypatch.context() as patch:
        patch.setattr(engine, "is_capturing", lambda: True)
        patch.setattr(engine, "launch", lambda *args: launches.append(args))
        made._set_on_device(ids, gates, "switch")
        with pytest.raises(errors.StateError, match=r"ids and gates on the GPU while a CUDA graph is captured"):
            made.switch("a0")
    made.switch("a1")
    merged = kit.snapshot(weights)
    for graph in launches:
        launch(*graph)
    assert made.active == (("a0", 1.0),) and kit.snapshot(weights) != merged
    made.switch("a1")  # the host's last word was the same
    assert kit.snapshot(weights) == merged and made.active == (("a1", 1.0),)
    ids.fill_(99)
    for graph in launches:
        launch(*graph)
    with pytest.raises(errors.InvalidValueError, match="ids: expected -1"):
        _ = made.active
    with pytest.raises(errors.StateError, match="not active"):
        bank.remove("a3")  # a replay may choose it at any time


def test_no_other_switcher_s_device_is_waited_for(on_sim, monkeypatch):
    """A capture may not wait, and a selection on the device is not to; only weights that are shared need an answer."""
    weights, bank = on_sim
    elsewhere = kit.make_weights(SHAPES)
    first, second, third = fm.Switcher(weights, bank), fm.Switcher(elsewhere, kit.make_bank(elsewhere)), fm.Switcher(weights, bank)
    first._set_on_device(*ids_and_gates((0, 1.0)), "switch")
    with monkeypatch.context() as patch:
        for group in first._engine._groups:
            patch.setattr(group, "state", lambda: pytest.fail("the device was waited for"))
        second._set_on_device(*ids_and_gates((1, 1.0)), "switch")
        second.switch("a2")
    with pytest.raises(errors.StateError, match="no other Switcher has merged"):
        third.switch("a1")
    first._set_on_device(*ids_and_gates((-1, 0.0)), "switch")
    third.switch("a1")


def test_what_counts_as_a_selection_on_the_device():
    device = torch.device("meta")  # stands for a GPU: no value can be looked at
    ids, gates = torch.zeros(2, dtype=torch.int64, device=device), torch.zeros(2, dtype=torch.bfloat16, device=device, requires_grad=True)
    found = selection.selection_on(device, ids, gates)
    assert (found[0].dtype, found[1].dtype, found[1].requires_grad) == (torch.int32, torch.float32, False)
    assert selection.selection_on(device, ids, None)[1].shape == (2,)
    for adapters in ("a0", {"a0": 1.0}, [0, 1], torch.zeros(2, dtype=torch.int32), np.zeros(2, dtype=np.int32), None):
        assert selection.selection_on(device, adapters, None) is None
        assert selection.selection_on(torch.device("cpu"), ids, gates) is None
    refused = [
        (ids, [0.5, 0.5], errors.DeviceError, "gates: expected an array on meta"),
        (ids, torch.zeros(2), errors.DeviceError, "values on the host"),
        (ids, gates[:1], errors.InvalidValueError, r"gates: expected 2 values \(one per id\), got 1"),
        (ids[None], gates, errors.ShapeError, "ids: expected one dimension"),
        (ids.float(), gates, errors.DtypeError, "ids: expected integers"),
        (ids, ids, errors.DtypeError, "gates: expected floats"),
        (ids.bool(), gates, errors.DtypeError, "ids: expected integers"),
    ]
    for bad_ids, bad_gates, error, words in refused:
        with pytest.raises(error, match=words):
            selection.selection_on(device, bad_ids, bad_gates)
    weights = kit.make_weights(SHAPES)
    made = fm.Switcher(weights, kit.make_bank(weights))
    with pytest.raises(errors.DeviceError, match=r"the host \(or ids and gates both on the weights' GPU\), got meta"):
        made.switch(ids, gates)
    with pytest.raises(errors.BackendError, match="one that reads ids and gates on the device"):
        made._set_on_device(*ids_and_gates((0, 1.0)), "switch")


# ---- options and arrays ----------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_told_where_asked(engine):
    def overflowed(check_finite):
        weights = kit.make_weights([(9, 31), (20, 16)], torch.float16)
        factors = {name: (torch.ones(1, 2, w.shape[1]).half(), torch.ones(1, w.shape[0], 2).half()) for name, w in weights.items()}
        factors["w1"][1][0, 7] = 300.0
        made = fm.Switcher(weights, fm.AdapterBank.from_tensors(factors, 1.0), check_finite=check_finite)
        made.switch({"0": 100.0})
        made.check()
        made.switch({"0": 200.0})  # 2 * 200 * 300 is no float16
        assert weights["w1"][7].isinf().all() and weights["w0"].isfinite().all()
        return made

    overflowed(False).check()
    made = overflowed(True)
    with pytest.raises(errors.InvalidValueError, match="w1: expected finite values after the switch, got NaN or infinity"):
        made.check()
    made.restore()
    made.check()


def test_infinity_that_was_overwritten_is_still_told(on_sim):
    weights = kit.make_weights([(9, 31)], torch.float16)
    bank = fm.AdapterBank.from_tensors({"w0": (torch.ones(1, 2, 31).half(), torch.ones(1, 9, 2).half())}, 1.0)
    made = fm.Switcher(weights, bank, check_finite=True)
    made.switch({"0": 6e4})
    made.restore()
    with pytest.raises(errors.InvalidValueError, match="overwritten since"):
        _ = made.active
    made.check()


def test_arrays_of_other_libraries_are_used_where_they_are(engine):
    if engine in ("jit", "aot"):
        weights, base = {"w": cupy.random.standard_normal((9, 31), dtype="float32")}, None
    else:
        weights = {"w": np.random.default_rng(0).standard_normal((9, 31), dtype="float32")}
    base = weights["w"].copy()
    stack = (np.ones((1, 2, 31), dtype="float32"), np.ones((1, 9, 2), dtype="float32"))
    bank = fm.AdapterBank.from_tensors({"w": stack if engine not in ("jit", "aot") else tuple(map(cupy.asarray, stack))}, 0.25)
    made = fm.Switcher(weights, bank)
    made.switch("0")
    assert (weights["w"] == base + np.float32(0.5)).all()
    made.restore()
    assert (weights["w"] == base).all()


def test_another_default_device_for_new_tensors_does_not_matter(on_sim, monkeypatch):
    weights, _ = on_sim
    for name in ("sim", "cpu"):
        monkeypatch.setenv("FUSEDMERGE_BACKEND", name)
        before = kit.snapshot(weights)
        torch.set_default_device("meta")
        try:
            random = fm.AdapterBank.random(weights, 2, 4)
            made = fm.Switcher(weights, random)
            made.switch({"random_0": 0.5})
            made.check()
            made.close()
        finally:
            torch.set_default_device(None)
        assert kit.snapshot(weights) == before
