"""Bases that the caller holds: fp8 with scales, float32, or the weight's own dtype."""

import numpy as np
import pytest
import torch

import fusedmerge as fm
from fusedmerge import errors, reference
from tests import kit

SHAPE = (131, 264)


def fp8_weight(kind, dtype=torch.bfloat16, shape=SHAPE):
    """(weight, q, scale, base values in float64)."""
    rows, cols = shape
    q = (kit.make_weights([shape], torch.float32)["w0"] * 800).to(torch.float8_e4m3fn)
    scales = {"tensor": (), "row": (rows, 1), "rows": (rows,), "block": (-(-rows // 128), -(-cols // 128))}
    scale = torch.rand(scales[kind], device="cpu", generator=torch.Generator().manual_seed(2)).add(0.5).mul(1e-3).to(q.device)
    wide = scale.expand(rows, cols) if kind == "tensor" else scale.reshape(rows, 1).expand(rows, cols) if "row" in kind else None
    if wide is None:
        wide = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    values = q.float() * wide
    return values.to(dtype), q, scale, values


@pytest.fixture(params=["sim", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("jit", "aot"))])
def on_kernel(request, monkeypatch):
    """The backends that run the CUDA kernel."""
    if request.param == "sim":
        monkeypatch.setenv("FUSEDMERGE_SIM_LIB", request.getfixturevalue("sim_library"))
        monkeypatch.setenv("FUSEDMERGE_BACKEND", "sim")
    else:
        monkeypatch.setenv("FUSEDMERGE_BACKEND", request.param)
        torch.set_default_device("cuda")
        request.addfinalizer(lambda: torch.set_default_device(None))


def check_merged(live, values, target, mixture):
    experts = reference.members(target, mixture)
    base = reference.to_float64(values)
    truth, found = reference.merged(base, experts), reference.to_float64(live)
    assert np.all(np.abs(found - truth) <= reference.error_bound(base, experts, kit.name_of(live.dtype)))
    assert np.mean(found == reference.round_to(truth, kit.name_of(live.dtype))) >= 0.99


@pytest.mark.parametrize("kind", ["tensor", "row", "rows", "block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_fp8_base(on_kernel, kind, dtype):
    weight, q, scale, values = fp8_weight(kind, dtype)
    before = kit.bits(weight)
    weights = {"w0": weight}
    bank = kit.make_bank(weights)
    switcher = fm.Switcher(weights, bank, base={"w0": (q, scale)})
    assert switcher.nbytes == 0
    switcher.switch({"a0": 0.7, "a3": 0.3})
    check_merged(weight, values, bank.target("w0"), [(0, 0.7), (3, 0.3)])
    copied = {"w0": values.to(dtype)}
    fm.Switcher(copied, bank).switch({"a0": 0.7, "a3": 0.3})
    assert not torch.equal(copied["w0"], weight)  # the base's own values, not their rounding, were merged
    switcher.restore()
    assert kit.bits(weight) == before


def test_a_float32_base_and_one_that_is_a_number(on_kernel):
    values = kit.make_weights([SHAPE], torch.float32)["w0"]
    weights = {"w0": values.bfloat16(), "w1": torch.ones(5, 24).bfloat16()}
    bank = kit.make_bank(weights)
    switcher = fm.Switcher(weights, bank, base={"w0": values, "w1": torch.ones(5, 24).bfloat16()})
    switcher.switch({"a1": 1.0})
    check_merged(weights["w0"], values, bank.target("w0"), [(1, 1.0)])
    switcher.close()
    weight = {"w": torch.full((4, 8), 2.0).bfloat16()}
    single = fm.Switcher(weight, kit.make_bank(weight), base={"w": (torch.ones(4, 8).to(torch.float8_e4m3fn), 2.0)})
    single.switch("a0")
    single.restore()
    assert (weight["w"] == 2).all()


def test_a_base_in_the_weight_s_dtype_saves_the_copy(engine):
    weights, kept = kit.make_weights([(9, 31)]), kit.make_weights([(9, 31)])
    bank = kit.make_bank(weights)
    switcher = fm.Switcher(weights, bank, base=kept)
    assert switcher.nbytes == 0
    switcher.switch("a1")
    kit.assert_merged(weights["w0"], kept["w0"], bank.target("w0"), [(1, 1.0)], share=0.99)
    switcher.restore()
    with pytest.raises(errors.StateError, match="refresh: base: expected the Switcher's own copy"):
        switcher.refresh()
    assert kit.snapshot(weights) == kit.snapshot(kept)


def refusals():
    weight, q, scale, _ = fp8_weight("row")
    other = q.view(torch.uint8).clone()
    other[130, 7] ^= 1
    tensor = torch.zeros
    return [
        ([q], errors.InvalidTypeError, r"base: expected \{weight name"),
        ({}, errors.UnknownNameError, "a base for every target of the bank, got none for w0"),
        ({"w0": weight, "x": weight}, errors.UnknownNameError, "got also x"),
        ({"w0": "file"}, errors.InvalidTypeError, "base of w0: expected a tensor, or a tensor and its scale"),
        ({"w0": weight.half()}, errors.DtypeError, r"torch.bfloat16, float32 or float8_e4m3fn, got torch.float16"),
        ({"w0": q}, errors.InvalidTypeError, "a scale with a float8_e4m3fn tensor, and with no other, got none"),
        ({"w0": (weight, scale)}, errors.InvalidTypeError, "and with no other, got one"),
        ({"w0": weight[:5]}, errors.ShapeError, r"\[131, 264\], got \[5, 264\]"),
        ({"w0": weight.t().contiguous().t()}, errors.ShapeError, "rows that are contiguous"),
        ({"w0": weight.to("meta")}, errors.DeviceError, "cpu, got meta"),
        ({"w0": (q, scale.double())}, errors.DtypeError, "scale of the base of w0: expected float32, got torch.float64"),
        ({"w0": (q, scale.to("meta"))}, errors.DeviceError, "scale of the base of w0: expected cpu, got meta"),
        ({"w0": (q, tensor(3, 2))}, errors.ShapeError, r"\[\], \[131\], \[131, 1\] or \[2, 3\], got \[3, 2\]"),
        ({"w0": (other.view(torch.float8_e4m3fn), scale)}, errors.InvalidValueError, "bits, got 1 of 34584 in rows 0 to 131 that do not"),
    ]


@pytest.mark.parametrize(("given", "error", "words"), refusals())
def test_bases_that_do_not_fit_are_refused(given, error, words):
    weights = {"w0": fp8_weight("row")[0]}
    before = kit.snapshot(weights)
    with pytest.raises(error, match=words):
        fm.Switcher(weights, kit.make_bank(weights), base=given)
    assert kit.snapshot(weights) == before


def test_where_no_base_can_be_used(monkeypatch):
    monkeypatch.setenv("FUSEDMERGE_BACKEND", "cpu")
    weight, q, scale, values = fp8_weight("tensor")
    bank = kit.make_bank({"w0": weight})
    for base in ((q, scale), values):
        with pytest.raises(errors.BackendError, match=r"base of w0: expected torch.bfloat16, as the weight, on the CPU, got torch.float"):
            fm.Switcher({"w0": weight}, bank, base={"w0": base})
    with pytest.raises(errors.InvalidValueError, match='None in mode "inplace"'):
        fm.Switcher({"w0": weight}, bank, "inplace", base={"w0": weight})
