"""Every form of a mixture that may be passed, and every bad one."""

import numpy as np
import pytest
import torch

from fusedmerge import errors
from fusedmerge.checks import to_float32
from fusedmerge.selection import parse
from tests import kit


@pytest.fixture(scope="module")
def bank():
    bank = kit.make_bank(kit.make_weights([(6, 5)]), ranks=(1, 2, 3, 4, 5))
    bank.remove("a3")
    return bank


@pytest.mark.parametrize(
    ("adapters", "gates", "named"),
    [
        ({"a0": 0.7, "a2": 0.3}, None, (("a0", 0.7), ("a2", 0.3))),
        ({"a2": 0.3, "a0": 0.7}, None, (("a2", 0.3), ("a0", 0.7))),
        ("a1", None, (("a1", 1.0),)),
        ("a1", 0.5, (("a1", 0.5),)),
        (["a1", "a0"], None, (("a1", 1.0), ("a0", 1.0))),
        (("a1", "a0"), (2, -0.5), (("a1", 2.0), ("a0", -0.5))),
        ([0, 2], [0.25, 0.75], (("a0", 0.25), ("a2", 0.75))),
        ([0, -1], [0.25, 0.75], (("a0", 0.25),)),
        (4, None, (("a4", 1.0),)),
        (np.array([4, 0]), np.array([0.5, 0.25], np.float32), (("a4", 0.5), ("a0", 0.25))),
        (torch.tensor([4, 0], dtype=torch.int32), torch.tensor([0.5, 0.25]), (("a4", 0.5), ("a0", 0.25))),
        (torch.tensor(4), torch.tensor(0.5, dtype=torch.bfloat16), (("a4", 0.5),)),
        ([np.int64(1)], [np.float32(0.5)], (("a1", 0.5),)),
        ([1], [torch.tensor(0.5)], (("a1", 0.5),)),
        (["a1", 1, "a0"], [0.5, 0.25, 1.0], (("a1", 0.75), ("a0", 1.0))),  # duplicates add
        (["a1", "a1"], [0.5, -0.5], ()),  # and may cancel
        ({"a1": 0.0}, None, ()),
        ({"a1": 1e-60}, None, ()),  # no float32 but 0
        ({}, None, ()),
        ([], None, ()),
        ([], [], ()),
        ([-1, -1], None, ()),
        (torch.empty(0, dtype=torch.int64), None, ()),
    ],
)
def test_forms(bank, adapters, gates, named):
    mixture, got = parse(bank, adapters, gates)
    assert got == named
    assert dict(mixture) == {bank.slot(name): float(np.float32(gate)) for name, gate in named}
    assert list(mixture) == sorted(mixture)


def test_order_does_not_matter(bank):
    assert parse(bank, {"a0": 0.7, "a2": 0.3}, None)[0] == parse(bank, [2, 0], [0.3, 0.7])[0]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("adapters", "gates", "error", "message"),
    [
        ("a9", None, errors.UnknownNameError, 'expected one of a0, a1, a2, a4, got "a9"'),
        ({"A0": 1.0}, None, errors.UnknownNameError, '"A0"'),
        ("a3", None, errors.UnknownNameError, "a3"),  # removed
        ([3], None, errors.InvalidValueError, "3, which is free"),
        ([5], None, errors.InvalidValueError, r"-1 \(empty\) or 0 to 4, got 5"),
        ([-2], None, errors.InvalidValueError, "got -2"),
        ([0, 1], [1.0], errors.InvalidValueError, r"2 values \(one per adapter\), got 1"),
        ([0], [1.0, 1.0], errors.InvalidValueError, "1 values"),
        ({"a0": 1.0}, [1.0], errors.InvalidTypeError, "None with a mapping"),
        ({"a0": NAN}, None, errors.InvalidValueError, "gate of 'a0': expected a finite float32, got nan"),
        (["a0"], [INF], errors.InvalidValueError, "got inf"),
        (["a0"], [1e39], errors.InvalidValueError, "finite float32"),
        ([-1], [NAN], errors.InvalidValueError, "finite float32"),
        (["a0", "a0"], [3e38, 3e38], errors.InvalidValueError, "finite float32"),  # the sum overflows
        (["a0"], ["1.0"], errors.InvalidTypeError, r"gates\[0\]: expected a number, got str"),
        (["a0"], [True], errors.InvalidTypeError, "bool"),
        (["a0"], [1j], errors.InvalidTypeError, "complex"),
        (["a0"], [None], errors.InvalidTypeError, "NoneType"),
        ({"a0": None}, None, errors.InvalidTypeError, "gate of 'a0'"),
        (None, None, errors.InvalidTypeError, "NoneType"),
        (0.5, None, errors.InvalidTypeError, "a name,"),
        ({"a0", "a1"}, None, errors.InvalidTypeError, "set"),
        (b"a0", None, errors.InvalidTypeError, "bytes"),
        ([True], None, errors.InvalidTypeError, "bool"),
        ([1.0], None, errors.InvalidTypeError, "float"),
        ([None], None, errors.InvalidTypeError, "NoneType"),
        ([torch.tensor(1.7)], None, errors.InvalidTypeError, "slot ids"),
        ([torch.tensor([0, 1])], None, errors.InvalidTypeError, "slot ids"),
        ([0], [torch.tensor([0.5, 1.0])], errors.InvalidTypeError, "a number"),
        ("a0", 10**400, errors.InvalidValueError, "finite float32"),
        (torch.tensor([0.0]), None, errors.DtypeError, "expected integers, got torch.float32"),
        (torch.tensor([True]), None, errors.DtypeError, "bool"),
        (torch.tensor([[0]]), None, errors.ShapeError, "one dimension"),
        (torch.tensor([0]), torch.tensor([[1.0]]), errors.ShapeError, "one dimension"),
        (torch.tensor([0]), torch.tensor([1j]), errors.DtypeError, "floats"),
        (torch.tensor([0], device="meta"), None, errors.DeviceError, "meta"),
        (torch.tensor([0]), torch.tensor([1.0], device="meta"), errors.DeviceError, "meta"),
    ],
)
def test_refusals(bank, adapters, gates, error, message):
    with pytest.raises(error, match=message) as caught:
        parse(bank, adapters, gates)
    assert isinstance(caught.value, errors.FusedMergeError)


def test_a_gate_times_its_scaling_must_be_a_float32():
    weights = kit.make_weights([(6, 5)], torch.float32)
    bank = kit.make_bank(weights, scaling=100.0)
    with pytest.raises(errors.InvalidValueError, match="gate of 'a1' times its scaling: expected a finite float32, got 9.99"):
        parse(bank, {"a0": 1.0, "a1": 1e38}, None)
    bank.remove("a1")
    bank.add("a1", {"w0": (torch.ones(1, 5), torch.ones(6, 1))}, 0.5)
    parse(bank, {"a1": 1e38}, None)


def test_to_float32_rounds_as_numpy():
    rng = np.random.default_rng(0)
    values = [
        *(rng.standard_normal(500) * 10.0 ** rng.uniform(-50, 40, 500)),
        0.1,
        -0.0,
        3.4028235677973366e38,
        3.4028235677973362e38,
        INF,
        7,
    ]
    with np.errstate(over="ignore"):
        assert [to_float32(value).hex() for value in values] == [float(np.float32(value)).hex() for value in values]
    assert np.isnan(to_float32(NAN)) and to_float32(10**400) == INF
