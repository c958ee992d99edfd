"""The PTX machine: what nvcc and NVRTC make of the kernels has the bits of their C++ on the simulator; what it refuses."""

from __future__ import annotations

import ctypes
import functools

import harness
import numpy as np
import pytest
import torch
from harness import BF16, FLOAT32, FP8, FP16, Launch, make_target

from fusedmerge.backend import compiler, linear, sgmv
from fusedmerge.backend.jit import switch_kernel
from fusedmerge.backend.kernels import SimLauncher
from fusedmerge.backend.linear import Norm, Router, Silu
from fusedmerge.backend.params import SimOptions
from tests import linear_kit
from tests.conftest import use_host

ARCHITECTURES = ["compute_90", *(pytest.param(f"compute_{n}", marks=pytest.mark.slow) for n in (80, 100, 120))]
OPTIONS = SimOptions(thread_order=2, tensor_core=1, async_copies=2, resident_blocks=3, seed=5)


@pytest.fixture(autouse=True)
def machine(request, monkeypatch):
    use_host("sim", request, monkeypatch)
    library = ctypes.CDLL(request.getfixturevalue("sim_library"))
    yield library
    library.fm_sim_use_ptx(None, 0)


@functools.cache
def just_in_time(kernel: compiler.Kernel, architecture: str) -> bytes:
    pytest.importorskip("cupy").cuda.nvrtc  # noqa: B018 (skips where there is none)
    return compiler._compile(kernel, (*compiler._FLAGS, f"--gpu-architecture={architecture}"))


class JustInTime(SimLauncher):
    """Each launch executes what NVRTC makes of its kernel."""

    def __init__(self, library, architecture):
        super().__init__(OPTIONS)
        self.library, self.architecture = library, architecture

    def launch(self, kernel, params, grid, shared_bytes, programmatic=False):
        self.library.fm_sim_use_ptx(just_in_time(kernel, self.architecture), 0)
        super().launch(kernel, params, grid, shared_bytes, programmatic)
        self.library.fm_sim_use_ptx(None, 0)


# ---- the same bits as C++ ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("depth", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("numbers", "inplace"),
    [((BF16,) * 3, False), ((BF16,) * 3, True), ((FP16, FP8, FP16), False), ((FLOAT32,) * 3, False), ((FLOAT32,) * 3, True)],
    ids=["bf16-exact", "bf16-inplace", "fp16-from-fp8", "float32-exact", "float32-inplace"],
)
def test_switch(lib, machine, architecture, numbers, inplace, depth):
    live, source, factor = numbers
    images = []
    for text in (None, just_in_time(switch_kernel(numbers, inplace, depth), architecture)):
        rng = np.random.default_rng(3)
        targets = [make_target(rng, *shape, live=live, source=source, factor=factor, rank=64) for shape in ((70, 300), (9, 33))]
        launch = Launch(lib, targets, live, source, factor, inplace=inplace, shared_limit=(99 if depth == 1 else 227) << 10)
        for target in targets:
            target.live[:] = harness.encode(harness.base_values(target, source), live)
        machine.fm_sim_use_ptx(text, 0)
        launch.plan.resident_chunks = min(depth, launch.plan.resident_chunks)
        for ids, gates in (([2, 0, 1], [0.7, 0.3, -0.2]), ([3, 1], [0.5, 0.4])):
            launch.switch(ids, gates, how=OPTIONS)
        images.append([target.live.tobytes() for target in targets])
    assert images[0] == images[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", ["known", "norm", "silu"])
@pytest.mark.parametrize("num_tokens", [pytest.param(3, marks=pytest.mark.slow), 11])
def test_linear(machine, architecture, num_tokens, source):
    problem = linear_kit.make(num_tokens, 300, rows=(70, 20), ranks=(20, 33))
    router = problem.known if source == "known" else Router(torch.randn(5, 300).to(torch.bfloat16), 2)
    second = torch.randn(num_tokens, 300).to(torch.bfloat16)
    given = {"known": None, "norm": Norm(torch.rand(300).to(torch.bfloat16), 1e-5, second), "silu": Silu(second)}[source]
    expected, got = (
        linear.decode_group(where, problem.x, problem.targets, router, given)
        for where in (SimLauncher(OPTIONS), JustInTime(machine, architecture))
    )
    for ours, theirs in zip(got.ys, expected.ys, strict=True):
        if source == "known":
            assert np.array_equal(linear_kit.bits(ours), linear_kit.bits(theirs))
        else:  # the device's expf is its own
            assert torch.allclose(ours.float(), theirs.float(), rtol=2.0**-7, atol=2.0**-9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sgmv(machine, architecture):
    import mixtures

    batch = mixtures.make_batch(np.random.default_rng(4), 60, 200, 130, 20)
    expected, got = (batch.run(where) for where in (SimLauncher(OPTIONS), JustInTime(machine, architecture)))
    assert torch.equal(expected, got)


# ---- what it refuses -------------------------------------------------------------------------------------------------------

PROGRAM = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry tried(.param .align 8 .b8 tried_param_0[128]) .maxntid 256, 1, 1
{{
    .reg .pred %p<9>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    mov.u32 %r1, %tid.x;
    setp.lt.s32 %p1, %r1, 40;
{}
    ret;
}}
"""
REFUSED = {
    "mul.hi.u32 %r2, %r1, %r1;": "PTX instruction mul.hi.u32",
    "bra $L__1;": "without the label",
    "add.sat.s32 %r2, %r1, %r1;": "PTX instruction add.sat.s32",
    "setp.ge.and.u32 %p2, %r1, %r1, %p1;": "PTX instruction setp.ge.and.u32",
    "cp.async.wait_all;": "PTX instruction cp.async.wait_all",
    "mov.u32 %r2, %laneid;": "PTX register %laneid",
    "mov.u32 %r9, 0;": "PTX register %r9",
    "bar.sync 1, 128;": "PTX barrier bar.sync 1, 128",
    "ld.shared.u32 %r2, [%r1+1025];": "misaligned access by",
    "st.shared.u32 [1088], %r1;": "access beyond shared memory",
    "cp.async.cg.shared.global [1040], [1600], 8, 8;": "asynchronous copy",
    "cp.async.cg.shared.global [1040], [1600], 16, 0; cp.async.commit_group;": "ends before its asynchronous copies",
    "@%p1 bar.sync 0; @!%p1 bar.red.or.pred %p2, 0, %p1;": "two kinds of barriers",
    "@%p1 bar.warp.sync -1;": "deadlock in block 0: warp 1, 8 lanes at `@%p1 bar.warp.sync -1`",
    "shfl.sync.bfly.b32 %r2, %r1, 1, 0x1f, 255;": "a shuffle of some lanes",
}


@pytest.mark.parametrize(("code", "message"), REFUSED.items())
def test_refusals(machine, code, message):
    machine.fm_sim_use_ptx(PROGRAM.format(code).encode(), 0)
    with pytest.raises(Exception, match=message.replace("(", r"\(")):
        SimLauncher().launch(sgmv._kernel("group_scan"), sgmv.GroupParams(), 1, 64)
