"""The kernels of fused application on the host simulator: the same bits in every order of things; programmatic launches."""

from __future__ import annotations

import ctypes
import os

import numpy as np
import pytest
import torch

from fusedmerge.backend import linear
from fusedmerge.backend.kernels import SimLauncher
from fusedmerge.backend.linear import Norm, Router, Silu
from fusedmerge.backend.linear_params import LinearParams
from fusedmerge.backend.params import SimOptions
from tests import linear_kit as kit
from tests.conftest import ON_HOST, use_host


@pytest.fixture(autouse=True, params=ON_HOST)
def on_host(request, monkeypatch):
    use_host(request.param, request, monkeypatch)
    kit.poison(monkeypatch)


class Machine(SimLauncher):
    """A simulator of its own size and order of things."""

    def __init__(self, multiprocessors=2, thread_order=0, tensor_core=1, async_copies=0, resident_blocks=2, seed=1):
        super().__init__(SimOptions(thread_order, tensor_core, async_copies, resident_blocks, seed))
        self.num_multiprocessors = multiprocessors


def images(machine, problem, routing=None, source=None):
    applied = linear.decode_group(machine, problem.x, problem.targets, routing or problem.known, source)
    taken = [part.numpy().tobytes() for known in applied.routings if known is not None for part in (known.ids, known.gates)]
    return [kit.bits(y).tobytes() for y in applied.ys] + taken


# Copies as late as the wait and as early as the issue; blocks one after the other and three at once.
ORDERS = [
    (order, copies, blocks) for order, copies, blocks in ((0, 0, 1), (0, 1, 3), (1, 0, 2), (1, 2, 3), (2, 0, 3), (2, 1, 2), (2, 2, 1))
]


@pytest.mark.parametrize("tensor_core", [0, 1], ids=["a100", "h100"])
@pytest.mark.parametrize("num_tokens", [pytest.param(3, marks=pytest.mark.slow), 11])
def test_same_bits_whatever_runs_it(num_tokens, tensor_core):
    problem = kit.make(num_tokens, 2060, rows=(70, 20), ranks=(20, 33))
    seen = set()
    for i, (order, copies, blocks) in enumerate(ORDERS):
        machine = Machine(1 + i % 3, order, tensor_core, copies, blocks, seed=i)
        seen.add(tuple(images(machine, problem)))
    assert len(seen) == 1
    applied = linear.decode_group(Machine(tensor_core=tensor_core), problem.x, problem.targets, problem.known)
    for y, target in zip(applied.ys, problem.targets, strict=True):
        kit.check(y, problem.x, target, problem.known)


def test_long_rows_of_one_sign_with_the_least_accurate_tensor_cores():
    """fp16 on an A100: with two chains a warp the error comes to 0.8 of the bound."""
    problem = kit.cancelled(kit.make(2, 16384, rows=(32,), dtype=torch.float16, positive=True, extras=False), None)
    y = linear.decode_group(Machine(tensor_core=0), problem.x, problem.targets).ys[0]
    kit.check(y, problem.x, problem.targets[0], None)


@pytest.mark.parametrize(("source", "num_routers"), [("norm", 1), ("silu", 1), ("norm", 3)])
def test_same_bits_of_routers_and_source(source, num_routers):
    problem = kit.make(9, 300, rows=(40, 9, 33)[:num_routers], ranks=(20, 8, 5)[:num_routers], adapters=9)
    router = [Router(weight.to(torch.bfloat16), 2) for weight in torch.randn(num_routers, 9, 300)]
    second = torch.randn(9, 300).to(torch.bfloat16)
    given = Norm(torch.rand(300).to(torch.bfloat16), 1e-5, second) if source == "norm" else Silu(second)
    seen = {
        tuple(images(Machine(1 + i % 4, *how, seed=i), problem, router, given)) for i, how in enumerate((a, 1, b, c) for a, b, c in ORDERS)
    }
    assert len(seen) == 1


@pytest.mark.parametrize("order", [0, 1, 2])
def test_route_in_every_order(order):
    x, weight = torch.randn(5, 300).to(torch.bfloat16), torch.randn(50, 300).to(torch.bfloat16)
    ids, gates = linear.route(Machine(thread_order=order, resident_blocks=1 + order), x, weight, 3)
    expected = torch.nn.functional.linear(x.double(), weight.double()).topk(3)
    assert torch.equal(ids, expected.indices.int()) and torch.allclose(gates.double(), expected.values.softmax(-1), atol=1e-4)


class LateMachine(Machine):
    """What a launch reads of earlier kernels' work is not there before the launch waits for it: inputs, routing, x, z, the residual."""

    def launch(self, kernel, params, grid, shared_bytes, programmatic=False):
        from fusedmerge.backend.sim import library

        hide = library().fm_sim_hide
        hide.argtypes = [ctypes.c_void_p, ctypes.c_longlong]
        if isinstance(params, LinearParams):
            for address, num_bytes in _read_by(params, kernel.name.startswith("gemv")):
                if address:
                    hide(address, num_bytes)
        super().launch(kernel, params, grid, shared_bytes, programmatic)


def _read_by(params, is_gemv):
    rows = params.tokens - 1
    slots = params.tokens * params.num_slots
    if not params.logits:
        yield params.ids, 4 * slots
        yield params.gates, 4 * slots
    if not is_gemv:
        yield params.input, 2 * (rows * params.input_stride + params.cols)
        yield params.second, 2 * (rows * params.second_stride + params.cols)
        return
    yield params.x, 2 * (rows * params.x_stride + params.cols)
    yield params.logits, 4 * params.num_routings * params.tokens * params.num_adapters
    places = params.num_splits * params.tokens * (params.num_adapters if params.logits else params.num_slots)
    for target in params.targets[: params.num_targets]:
        yield target.residual, 2 * (rows * target.residual_stride + target.rows)
        yield target.z, 4 * places * target.z_pitch


@pytest.mark.parametrize("num_tokens", [2, 9])
@pytest.mark.parametrize("kind", ["known", "router", "routers"])
def test_nothing_is_read_before_the_wait_but_weights(request, num_tokens, kind):
    if "ptx" in request.node.name and os.environ.get("FUSEDMERGE_PTX_ARCH") == "compute_80":
        pytest.skip("there launches are plain, and no kernel waits")
    problem = kit.make(num_tokens, 300, rows=(40, 9), ranks=(20,))
    router, other = (Router(weight, 2) for weight in torch.randn(2, 5, 300).to(torch.bfloat16))
    routing = {"known": problem.known, "router": router, "routers": [router, other]}[kind]
    source = Norm(torch.rand(300).to(torch.bfloat16), 1e-5, torch.randn(num_tokens, 300).to(torch.bfloat16))
    assert images(LateMachine(), problem, routing, source) == images(Machine(), problem, routing, source)
    assert images(LateMachine(), problem) == images(Machine(), problem)


def test_the_gemv_alone_is_one_launch_and_a_group_two():
    class Counting(Machine):
        launches: list[tuple[str, bool]] = []  # noqa: RUF012 (one test's)

        def launch(self, kernel, params, grid, shared_bytes, programmatic=False):
            self.launches.append((kernel.name, programmatic))
            super().launch(kernel, params, grid, shared_bytes, programmatic)

    problem, machine = kit.make(9, 40, rows=(16, 16, 16)), Counting()
    linear.decode_group(machine, problem.x, problem.targets)
    images(machine, problem)
    assert machine.launches == [("gemv_bf16_16", False), ("prologue_bf16_16", True), ("gemv_bf16_16", True)]


def test_offsets_past_2_to_the_31_elements():
    """Huge strides over address space that is reserved, not used: only the touched pages exist."""
    import mmap

    problem = kit.make(2, 40, rows=(3,), ranks=(3,), adapters=3, extras=False)
    target = problem.targets[0]

    def spread(tensor, stride):
        """The same values, the first dimension's steps `stride` elements apart."""
        try:
            area = mmap.mmap(-1, 2 * stride * len(tensor), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
        except OSError:
            pytest.skip("no address space for the reservation")
        whole = torch.frombuffer(area, dtype=tensor.dtype)
        return whole.as_strided(tensor.shape, (stride, *tensor.stride()[1:])).copy_(tensor)

    step = 2**31 + 64
    moved = linear.Target(spread(target.weight, step), spread(target.a, step), spread(target.b, step))
    expected, got = (linear.decode_group(Machine(), problem.x, [t], problem.known).ys[0] for t in (target, moved))
    assert np.array_equal(kit.bits(got), kit.bits(expected))
