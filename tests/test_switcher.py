"""Switcher: what the weights hold after each call, and that a call that raises has changed nothing."""

import random
import weakref

import pytest
import torch

import fusedmerge as fm
from fusedmerge import errors
from fusedmerge.backend.cpu import Expert, ordered
from tests import kit

pytestmark = pytest.mark.usefixtures("engine")

SHAPES = [(1, 1), (1, 4096), (67, 131), (257, 130), (300, 1000)]  # one element, one row, ragged, ragged, more than one block of rows


@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize("bank_dtype", kit.fast_first([None, torch.float32]))
def test_a_switch_is_within_the_bound_of_float64_truth(dtype, bank_dtype, engine):
    shapes = [*SHAPES[:-1], (130, 260)] if engine == "sim" else [*SHAPES, (600, 700)]  # more are seconds on the simulator
    weights = kit.make_weights(shapes, dtype)
    base = {name: tensor.clone() for name, tensor in weights.items()}
    bank = kit.make_bank(weights, dtype=bank_dtype)
    switcher = fm.Switcher(weights, bank)
    for mixture in ([(0, 0.7), (2, 0.3)], [(1, -1.3)], [(0, 0.4), (1, 0.3), (2, 0.2), (3, 0.1)], [(3, 1e-3)]):
        switcher.switch([slot for slot, _ in mixture], [gate for _, gate in mixture])
        for name, live in weights.items():
            few = live.numel() < 10_000 and dtype != torch.float32  # one misrounded element would be more than the share
            kit.assert_merged(live, base[name], bank.target(name), mixture, share=0.99 if few else None)


def test_folding_gates_into_16_bit_factors_would_be_seen():
    """The comparator's own test: the shortcut that the switch must not take misrounds far more than 0.1 % of the weights."""
    weights = kit.make_weights([(256, 256)])
    bank = kit.make_bank(weights)
    target = bank.target("w0")
    folded = weights["w0"].float() + (target.b[2] * 0.3 * 0.5).float() @ target.a[2].float()
    with pytest.raises(AssertionError):
        kit.assert_merged(folded.bfloat16(), weights["w0"], target, [(2, 0.3)])


def test_a_lower_matmul_precision_chosen_for_the_model_does_not_reach_the_weights():
    weights = kit.make_weights([(256, 300)], torch.float32)
    base = weights["w0"].clone()
    bank = kit.make_bank(weights)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # bfloat16 products
    try:
        fm.Switcher(weights, bank).switch({"a3": 1.0})
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    kit.assert_merged(weights["w0"], base, bank.target("w0"), [(3, 1.0)])


@pytest.mark.parametrize("dtype", kit.fast_first(kit.DTYPES))
def test_ten_thousand_switches_leave_no_trace(dtype, engine):
    weights = kit.make_weights([(9, 31), (17, 5)], dtype)
    before, pointers = kit.snapshot(weights), {name: t.data_ptr() for name, t in weights.items()}
    bank = kit.make_bank(weights)
    switcher = fm.Switcher(weights, bank)
    rng = random.Random(0)
    for _ in range(100 if engine == "sim" else 10_000):  # the simulator takes milliseconds for what others do in microseconds
        switcher.switch({name: rng.uniform(-1, 1) for name in rng.sample(bank.names, rng.randint(0, 3))})
    last = {"a0": 0.7, "a3": 0.3}
    switcher.switch(last)
    fresh = kit.make_weights([(9, 31), (17, 5)], dtype)
    fm.Switcher(fresh, bank).switch(last)
    assert kit.snapshot(weights) == kit.snapshot(fresh) != before
    switcher.restore()
    assert kit.snapshot(weights) == before
    assert {name: t.data_ptr() for name, t in weights.items()} == pointers


def test_the_order_in_which_a_mixture_is_written_does_not_change_its_bits():
    weights = kit.make_weights([(67, 131)])
    switcher = fm.Switcher(weights, kit.make_bank(weights))
    switcher.switch({"a0": 0.7, "a1": 0.7, "a2": -0.1})
    one = kit.snapshot(weights)
    switcher.switch(["a2", "a1", "a0", "a1"], [-0.1, 0.35, 0.7, 0.35])
    assert kit.snapshot(weights) == one


def test_experts_are_added_in_ascending_order_of_their_coefficient():
    a, b, empty = torch.ones(2, 3), torch.ones(4, 2), torch.ones(0, 3)
    given = [Expert(a, b, 0.5), Expert(a, b, -0.1), Expert(a, b, 0.0), Expert(empty, b[:, :0], 0.2), Expert(a, b, 0.3)]
    assert [expert.coefficient for expert in ordered(given)] == [-0.1, 0.3, 0.5]


def test_odd_bits_survive():
    """-0.0, NaN with a payload and infinities come through a switch to nothing and a restore."""
    weights = {"w": torch.tensor([[-0.0, float("nan"), float("inf"), 1.0]] * 3, dtype=torch.bfloat16)}
    weights["w"].view(torch.int16)[1, 1] = 0x7FA5
    before = kit.snapshot(weights)
    bank = fm.AdapterBank.from_tensors({"w": (torch.ones(2, 1, 4).bfloat16(), torch.ones(2, 3, 1).bfloat16())}, 1.0)
    switcher = fm.Switcher(weights, bank)
    switcher.switch("0")
    assert weights["w"][:, 3].tolist() == [2.0] * 3 and weights["w"][:, 1].isnan().all()
    switcher.switch({"1": 0.0})
    assert kit.snapshot(weights) == before
    switcher.switch("1")
    switcher.restore()
    assert kit.snapshot(weights) == before


def test_a_target_that_no_chosen_adapter_has_keeps_its_bits():
    weights = kit.make_weights([(5, 6), (7, 8)])
    weights["w1"][0, 0] = -0.0
    before = kit.snapshot(weights)
    bank = fm.AdapterBank.from_tensors({"w0": (torch.ones(1, 2, 6).bfloat16(), torch.ones(1, 5, 2).bfloat16())}, 1.0)
    full = fm.AdapterBank.random(weights, 1, 2)
    switcher = fm.Switcher(weights, bank)
    switcher.switch("0")
    after = kit.snapshot(weights)
    assert after["w0"] != before["w0"] and after["w1"] == before["w1"]
    switcher.close()
    full.remove("random_0")
    full.add("partial", {"w0": (torch.ones(2, 6), torch.ones(5, 2))}, 1.0)
    fm.Switcher(weights, full).switch("partial")
    assert kit.snapshot(weights)["w1"] == before["w1"]


def test_strided_rows_inside_packed_qkv():
    packed = torch.randn(24, 16).bfloat16()
    untouched = packed.clone()
    weights = {"q": packed[:8], "v": packed[16:], "k_half": packed[8:16, :10]}
    base = {name: tensor.clone() for name, tensor in weights.items()}
    bank = kit.make_bank(weights)
    switcher = fm.Switcher(weights, bank)
    switcher.switch({"a1": 1.0})
    for name, live in weights.items():
        kit.assert_merged(live, base[name], bank.target(name), [(1, 1.0)], share=0.98)
    assert torch.equal(packed[8:16, 10:], untouched[8:16, 10:])
    switcher.restore()
    assert torch.equal(packed, untouched)


def test_active_and_repetition():
    weights = kit.make_weights([(9, 31)])
    switcher = fm.Switcher(weights, kit.make_bank(weights))
    assert switcher.active == ()
    switcher.switch({"a1": 0.7, "a0": 0.3})
    assert switcher.active == (("a1", 0.7), ("a0", 0.3))
    merged, version = kit.snapshot(weights), weights["w0"]._version
    switcher.switch(["a0", "a1"], [0.3, 0.7])
    assert kit.snapshot(weights) == merged and weights["w0"]._version == version  # nothing was written
    assert switcher.active == (("a0", 0.3), ("a1", 0.7))
    switcher.switch({})
    assert switcher.active == ()


def test_inplace_subtracts_the_last_mixture_and_drifts():
    weights = kit.make_weights([(64, 64)])
    base = weights["w0"].clone()
    bank = kit.make_bank(weights)
    switcher = fm.Switcher(weights, bank, mode="inplace")
    assert switcher.nbytes == 0 and fm.Switcher(weights, bank).nbytes == base.nbytes
    switcher.switch({"a0": 0.7, "a2": 0.3})
    kit.assert_merged(weights["w0"], base, bank.target("w0"), [(0, 0.7), (2, 0.3)], share=0.99)
    rng = random.Random(0)
    for _ in range(200):
        switcher.switch(rng.sample(bank.names, 2), [0.7, 0.3])
    switcher.restore()
    drift = ((weights["w0"].double() - base.double()).norm() / base.double().norm()).item()
    assert 0.01 < drift < 0.04  # rounding at every switch: a random walk of 200 steps of 0.0017


def test_switched_restores_the_previous_mixture_also_after_an_exception():
    weights = kit.make_weights([(9, 31)])
    switcher = fm.Switcher(weights, kit.make_bank(weights))
    switcher.switch({"a1": 0.7})
    outer = kit.snapshot(weights)
    with switcher.switched("a2") as inner:
        assert inner is switcher and switcher.active == (("a2", 1.0),)
        with switcher.switched({}):
            assert switcher.active == ()
        assert switcher.active == (("a2", 1.0),)
    assert switcher.active == (("a1", 0.7),) and kit.snapshot(weights) == outer
    with pytest.raises(ZeroDivisionError), switcher.switched(["a3"], [0.1]):
        raise ZeroDivisionError
    assert switcher.active == (("a1", 0.7),) and kit.snapshot(weights) == outer
    with pytest.raises(errors.UnknownNameError), switcher.switched("nobody"):
        pass
    assert switcher.active == (("a1", 0.7),) and kit.snapshot(weights) == outer
    with switcher.switched("a2"):
        switcher.close()
    assert "closed" in repr(switcher)


def test_invalidate_makes_the_next_switch_write():
    weights = kit.make_weights([(9, 31)])
    switcher = fm.Switcher(weights, kit.make_bank(weights))
    switcher.switch("a1")
    merged = kit.snapshot(weights)
    weights["w0"].zero_()
    switcher.switch("a1")
    assert not weights["w0"].any()
    switcher.invalidate()
    assert switcher.active == (("a1", 1.0),)
    switcher.switch("a1")
    assert kit.snapshot(weights) == merged
    version = weights["w0"]._version
    switcher.switch("a1")
    assert weights["w0"]._version == version  # only the next one


def test_refresh_takes_outside_edits_as_the_new_base():
    weights = kit.make_weights([(9, 31)])
    switcher = fm.Switcher(weights, kit.make_bank(weights))
    weights["w0"].mul_(2)
    edited = weights["w0"].clone()
    switcher.refresh()
    switcher.switch("a1")
    with pytest.raises(errors.StateError, match=r"restore\(\) first"):
        switcher.refresh()
    switcher.restore()
    assert torch.equal(weights["w0"], edited)


def test_close_restores_and_frees():
    weights = kit.make_weights([(9, 31)])
    before = kit.snapshot(weights)
    switcher = fm.Switcher(weights, kit.make_bank(weights))
    switcher.switch("a1")
    copy = weakref.ref(switcher._segments[0].base)
    switcher.close()
    switcher.close()
    assert kit.snapshot(weights) == before and copy() is None and switcher.nbytes == 0
    for call in (
        lambda: switcher.switch("a1"),
        switcher.restore,
        switcher.check,
        switcher.invalidate,
        switcher.refresh,
        lambda: switcher.active,
    ):
        with pytest.raises(errors.StateError, match="a closed one"):
            call()


def test_bad_calls_change_nothing():
    weights = kit.make_weights([(9, 31)])
    switcher = fm.Switcher(weights, kit.make_bank(weights))
    switcher.switch("a1")
    state = kit.snapshot(weights)
    for adapters, gates in [("b", None), ({"a1": float("nan")}, None), ([0, 1], [1.0]), ([9], None), (None, None), (["a0", "b"], None)]:
        with pytest.raises(fm.FusedMergeError):
            switcher.switch(adapters, gates)
        assert kit.snapshot(weights) == state and switcher.active == (("a1", 1.0),)
