"""The reference is checked against arithmetic done by hand and against torch's own rounding."""

import numpy as np
import pytest
import torch

from fusedmerge import reference
from tests import kit


def test_merged_by_hand():
    member = reference.Member(a=np.array([[1.0, 2.0]]), b=np.array([[3.0], [-1.0]]), scaling=0.5, gate=4.0)
    assert reference.merged(np.ones((2, 2)), [member]).tolist() == [[7.0, 13.0], [-1.0, -3.0]]
    assert reference.magnitude(-np.ones((2, 2)), [member]).tolist() == [[7.0, 13.0], [3.0, 5.0]]


@pytest.mark.parametrize("dtype", kit.DTYPES)
def test_round_to_is_torch_s_rounding(dtype):
    generator = np.random.default_rng(0)
    with np.errstate(over="ignore"):
        values = (generator.standard_normal(40_000) * 2.0 ** generator.integers(-150, 129, 40_000)).astype(np.float32)
    ties = torch.randn(2_000).to(dtype).double().numpy()
    ties = (ties + 0.5 * reference.ulp(ties, kit.name_of(dtype))).astype(np.float32)  # exactly half way, where float32 can hold it
    values = np.concatenate([values, ties, np.float32([0.0, -0.0, 65504.0, 65519.9, 65520.0, -3.4e38, 2.0**-24, 2.0**-25, 2.0**-133])])
    ours = reference.round_to(values.astype(np.float64), kit.name_of(dtype))
    assert np.array_equal(ours, torch.from_numpy(values).to(dtype).double().numpy())


def test_round_to_rounds_once():
    """Through float32 this value would become a tie, and round to even; rounded once it goes up."""
    value = np.float64(1 + 2.0**-8 + 2.0**-40)
    assert reference.round_to(value, "bfloat16") == 1 + 2.0**-7
    assert torch.tensor(float(np.float32(value))).bfloat16().item() == 1.0


@pytest.mark.parametrize(
    ("value", "dtype", "expected"), [(1.0, "bfloat16", 2**-7), (1.99, "float16", 2**-10), (2.0**-130, "float32", 2**-149)]
)
def test_ulp(value, dtype, expected):
    assert reference.ulp(np.float64(value), dtype) == expected


def test_error_bound_grows_with_depth():
    def bound(rank, dtype):
        member = reference.Member(np.zeros((rank, 1)), np.zeros((1, rank)), 1.0, 1.0)
        return float(reference.error_bound(np.ones((1, 1)), [member], dtype)[0, 0])

    assert bound(1, "bfloat16") == 2**-8 + 2.0**-18
    assert bound(1024, "bfloat16") == 2**-8 + 1024 * 2.0**-27
    assert bound(17, "float32") == 2**-24 + 2.0**-20
