"""The GPU backends' Python without a GPU: the driver's calls are stood in for by the simulator, which runs what they would launch.

tests/test_gpu.py is for a GPU, tests/test_device_selection.py for ids and gates that are on the device already.
"""

import contextlib
import ctypes
import types
from pathlib import Path

import cupy
import numpy as np
import pytest
import torch

import fusedmerge as fm
from fusedmerge import backend, errors, switcher
from fusedmerge.backend import aot, compiler, cuda, params, sim
from tests import kit

SHAPES = [(9, 31), (67, 131)]
OPTIONS = params.SimOptions(thread_order=0, tensor_core=1, async_copies=0, resident_blocks=2, seed=1)


class SimExtension:
    """`fusedmerge._ext` as a machine with a GPU has it, on the simulator."""

    def __init__(self):
        self.ready, self.streams = {}, []

    def has_cuda(self):
        return True

    def query_device(self, _ordinal):
        return 4, 99 << 10

    def plan_switch(self, request, segments, result):
        return sim.library().fm_sim_plan(request, segments, result) == 0

    def prepare_switch(self, numbers, grid, shared_bytes):
        self.ready[numbers] = grid, shared_bytes

    def launch_switch(self, numbers, grid, shared_bytes, address, stream):
        assert self.ready[numbers] == (grid, shared_bytes)
        self.streams.append(stream)
        if sim.library().fm_sim_switch(*numbers, address, grid, shared_bytes, ctypes.addressof(OPTIONS)):
            raise RuntimeError(sim.library().fm_sim_error().decode())


class SimKernel:
    """What cupy.RawModule(path=...).get_function(...) gives. `streams`: where it notes the streams of its launches."""

    def __init__(self, path, streams):
        assert compiler.ENTRY.encode() in Path(path).read_bytes()
        self.max_dynamic_shared_size_bytes, self.streams = 0, streams

    def __call__(self, grid, block, arguments, *, shared_mem, stream):
        self.streams.append(stream.ptr)
        assert block == (256,) and shared_mem <= self.max_dynamic_shared_size_bytes
        (argument,) = arguments
        assert isinstance(argument, np.ndarray) and argument.nbytes == ctypes.sizeof(params.SwitchParams)
        mine = params.SwitchParams.from_buffer_copy(argument.tobytes())
        numbers = (params.BF16,) * 3
        assert not sim.library().fm_sim_switch(*numbers, ctypes.addressof(mine), *grid, shared_mem, ctypes.addressof(OPTIONS))


@pytest.fixture
def stand_in(sim_library, monkeypatch):
    """Stand-ins for torch's GPU calls and the extension; returns the extension."""
    monkeypatch.setenv("FUSEDMERGE_SIM_LIB", sim_library)
    extension = SimExtension()
    for module in (cuda, aot):
        monkeypatch.setattr(module, "load_extension", lambda: extension)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return extension


def make_switcher(name, monkeypatch, weights, bank, **options):
    with monkeypatch.context() as patch:
        patch.setattr(switcher, "choose", lambda *_: name)
        return fm.Switcher(weights, bank, **options)


@pytest.fixture(params=["aot", "jit"])
def gpu(request, stand_in, monkeypatch, tmp_path):
    """Makes a Switcher on a GPU backend's Python."""
    if request.param == "jit":
        device = types.SimpleNamespace(
            compute_capability="90", attributes={"MultiProcessorCount": 4, "MaxSharedMemoryPerBlockOptin": 99 << 10}
        )
        monkeypatch.setenv("FUSEDMERGE_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(cupy.cuda, "Device", lambda _: device)
        made = lambda path: types.SimpleNamespace(get_function=lambda _: SimKernel(path, stand_in.streams))  # noqa: E731
        monkeypatch.setattr(cupy, "RawModule", made)
    return lambda *args, **options: make_switcher(request.param, monkeypatch, *args, **options)


@pytest.mark.parametrize("mode", ["exact", "inplace"])
def test_a_switch_through_the_gpu_backends_python(gpu, stand_in, mode):
    weights = kit.make_weights(SHAPES)
    base = {name: tensor.clone() for name, tensor in weights.items()}
    bank = kit.make_bank(weights)
    made = gpu(weights, bank, mode=mode)
    assert isinstance(made._engine, cuda.CudaSwitch)
    made.switch({"a0": 0.7, "a2": 0.3})
    for name, live in weights.items():
        kit.assert_merged(live, base[name], bank.target(name), [(0, 0.7), (2, 0.3)], share=0.99)
    assert stand_in.streams == [77]
    made.switch({"a0": 0.7, "a2": 0.3})
    assert len(stand_in.streams) == 1
    made.check()


def test_a_launch_that_fails_is_a_backend_error(stand_in, monkeypatch):
    weights = kit.make_weights(SHAPES)
    made = make_switcher("aot", monkeypatch, weights, kit.make_bank(weights))
    monkeypatch.setattr(stand_in, "launch_switch", lambda *_: (_ for _ in ()).throw(RuntimeError("switch: CUDA: expected success")))
    with pytest.raises(errors.BackendError, match=r'backend "aot": expected a launch, got switch: CUDA: expected success'):
        made.switch("a0")


def test_why_a_gpu_backend_cannot_be_used(monkeypatch):
    assert backend.backends()["jit"].usable == backend.backends()["aot"].usable == torch.cuda.is_available()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA" in backend.backends()["jit"].reason
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.backends()["jit"].reason == "torch finds no GPU"
    with monkeypatch.context() as patch:
        patch.setattr(aot, "load_extension", lambda: types.SimpleNamespace(has_cuda=lambda: False))
        assert "built without nvcc" in backend.backends()["aot"].reason
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "load_extension", lambda: (_ for _ in ()).throw(ImportError("no _ext")))
        assert all("the extension is not built (no _ext)" in backend.backends()[name].reason for name in ("jit", "aot"))
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "cupy.cuda", None)
        assert "CuPy cannot be imported" in backend.backends()["jit"].reason
    with pytest.raises(errors.BackendError, match=r"backend for cuda:0: expected a usable one of aot, jit, got aot: .*; jit: torch"):
        backend.choose(torch.device("cuda", 0), "Switcher")


def test_aot_comes_before_jit_and_either_may_be_named(monkeypatch):
    monkeypatch.delenv("FUSEDMERGE_BACKEND", raising=False)
    usable = {"aot": True, "jit": True}
    monkeypatch.setattr(backend, "_status", lambda name: backend.BackendStatus(usable.get(name, True), "a reason"))
    gpu = torch.device("cuda", 0)
    assert backend.choose(gpu, "Switcher") == "aot"
    usable["aot"] = False
    assert backend.choose(gpu, "Switcher") == "jit"
    for name, device, words in (("jit", "cpu", "weights on a GPU, got cpu"), ("sim", "cuda:0", "weights on the CPU, got cuda:0")):
        monkeypatch.setenv("FUSEDMERGE_BACKEND", name)
        with pytest.raises(errors.BackendError, match=words):
            backend.choose(torch.device(device), "Switcher")
