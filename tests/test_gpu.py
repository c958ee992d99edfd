"""What only a GPU can show of the switch: graphs, streams, devices, memory past 2^31 elements, and the same bits from every compiler."""

import contextlib

import numpy as np
import pytest
import torch

import fusedmerge as fm
from fusedmerge import backend, errors
from fusedmerge.backend import params
from tests import kit

pytestmark = pytest.mark.gpu

SHAPES = [(1, 1), (67, 131), (257, 130), (300, 1000), (512, 2048)]
MIXTURES = ({"a0": 0.7, "a2": 0.3}, {"a1": -1.3}, {}, {"a0": 0.4, "a1": 0.3, "a2": 0.2, "a3": 0.1}, {"a3": 1e-3})


def slots(bank, mixture, count=4):
    """Ids and gates of a fixed length, on the GPU."""
    pairs = [(bank.slot(name), gate) for name, gate in mixture.items()] + [(-1, 0.0)] * (count - len(mixture))
    return torch.tensor([i for i, _ in pairs], dtype=torch.int32), torch.tensor([g for _, g in pairs], dtype=torch.float32)


def expected(bank, mixture, dtype=torch.bfloat16, mode="exact"):
    """The weights' bits after a switch from the host."""
    weights = kit.make_weights(SHAPES, dtype)
    fm.Switcher(weights, bank, mode).switch(mixture)
    return kit.snapshot(weights)


@pytest.mark.parametrize("mode", ["exact", "inplace"])
def test_a_graph_switches_to_whatever_the_ids_then_are(on_gpu, mode):
    weights = kit.make_weights(SHAPES)
    bank = kit.make_bank(weights)
    before = kit.snapshot(weights)
    switcher = fm.Switcher(weights, bank, mode)
    ids, gates = slots(bank, {})
    switcher.switch(ids, gates)  # warm: everything is loaded before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        switcher.switch(ids, gates)
    for mixture in MIXTURES:
        for target, value in zip((ids, gates), slots(bank, mixture), strict=True):
            target.copy_(value)
        graph.replay()
        assert dict(switcher.active) == pytest.approx(mixture)
        if mode == "exact":
            assert kit.snapshot(weights) == expected(bank, mixture)
    assert switcher.active != ()
    switcher.restore()
    if mode == "exact":
        assert kit.snapshot(weights) == before
    ids.fill_(99)
    graph.replay()
    with pytest.raises(errors.InvalidValueError, match="ids"):
        switcher.check()


def test_values_on_the_host_cannot_be_captured(on_gpu):
    weights = kit.make_weights([(67, 131)])
    switcher = fm.Switcher(weights, kit.make_bank(weights))
    switcher.switch("a0")
    with pytest.raises(errors.StateError, match="while a CUDA graph is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        switcher.switch("a1")
    assert switcher.active == (("a0", 1.0),)


def test_a_device_selection_makes_no_synchronisation(on_gpu):
    weights = kit.make_weights(SHAPES)
    bank = kit.make_bank(weights)
    switcher = fm.Switcher(weights, bank)
    ids, gates = slots(bank, {"a1": 0.5})
    switcher.switch(ids, gates)
    torch.cuda.set_sync_debug_mode("error")
    try:
        switcher.switch(ids, gates)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert kit.snapshot(weights) == expected(bank, {"a1": 0.5})


def test_the_current_stream_is_used_and_order_is_kept(on_gpu):
    weights = kit.make_weights([(2048, 2048)])
    bank = kit.make_bank(weights)
    switcher = fm.Switcher(weights, bank)
    stream = torch.cuda.Stream()
    seen = []
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for mixture in ("a0", "a1", "a0"):
            torch.cuda._sleep(10_000_000)  # whatever ran on another stream would overtake
            switcher.switch(mixture)
            seen.append(weights["w0"].clone())
    stream.synchronize()
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    kit.assert_merged(seen[1], switcher._segments[0].base, bank.target("w0"), [(1, 1.0)])


def test_another_current_device_does_not_matter(on_gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    torch.set_default_device("cuda:1")
    weights = kit.make_weights(SHAPES)
    bank = kit.make_bank(weights)
    with torch.cuda.device(0):
        switcher = fm.Switcher(weights, bank)
        switcher.switch({"a0": 0.7})
        switcher.check()
        assert torch.cuda.current_device() == 0
    here = kit.snapshot(weights)
    torch.set_default_device("cuda:0")
    first = kit.make_weights(SHAPES)
    fm.Switcher(first, kit.make_bank(first)).switch({"a0": 0.7})
    assert kit.snapshot(first) == here


@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize("bank_dtype", [None, torch.float32])
@pytest.mark.parametrize("mode", ["exact", "inplace"])
def test_jit_and_aot_give_the_same_bits(monkeypatch, request, dtype, bank_dtype, mode):
    torch.set_default_device("cuda")
    request.addfinalizer(lambda: torch.set_default_device(None))
    found = []
    for name in ("jit", "aot"):
        monkeypatch.setenv("FUSEDMERGE_BACKEND", name)
        weights = kit.make_weights(SHAPES, dtype)
        switcher = fm.Switcher(weights, kit.make_bank(weights, dtype=bank_dtype), mode)
        for mixture in MIXTURES:
            switcher.switch(mixture)
            found.append(kit.snapshot(weights))
    half = len(found) // 2
    assert found[:half] == found[half:]


def replan(switcher, unit_rows=0, shared_bytes_limit=232448, num_multiprocessors=132):
    """Give a Switcher's engine another plan of the same work."""
    engine = switcher._engine
    for group in engine._groups:
        table = group.describe()
        sizes = len(group.segments), group.num_adapters, params.MAX_SLOTS, num_multiprocessors, shared_bytes_limit
        request = params.PlanRequest(*group.numbers, group.inplace, *sizes, unit_rows)
        assert engine.plan(request, table, group.plan), group.plan.error
        group.place(table)
        engine.prepare(group)


@pytest.mark.parametrize("ranks", [(4, 7, 16, 33), (64, 128, 100, 128)])
def test_every_plan_gives_the_same_bits(on_gpu, ranks):
    found = []
    for options in ({}, {"unit_rows": 64}, {"unit_rows": 512}, {"num_multiprocessors": 7}, {"shared_bytes_limit": 99 << 10}):
        weights = kit.make_weights(SHAPES)
        switcher = fm.Switcher(weights, kit.make_bank(weights, ranks=ranks))
        replan(switcher, **options)
        switcher.switch({"a0": 0.4, "a1": -0.3, "a2": 0.2, "a3": 0.1})
        found.append(kit.snapshot(weights))
    assert all(other == found[0] for other in found)


def test_the_simulator_is_near(on_gpu, monkeypatch, sim_library):
    """Both within the bound; how many bits differ is printed, for the simulator's twin of the tensor core."""
    weights = kit.make_weights([(67, 131), (257, 300)])
    bank = kit.make_bank(weights)
    base = {name: weight.clone() for name, weight in weights.items()}
    fm.Switcher(weights, bank).switch(MIXTURES[0])
    torch.set_default_device(None)
    monkeypatch.setenv("FUSEDMERGE_BACKEND", "sim")
    monkeypatch.setenv("FUSEDMERGE_SIM_LIB", sim_library)
    simulated = {name: weight.cpu() for name, weight in base.items()}
    cpu_bank = kit.make_bank(simulated)
    fm.Switcher(simulated, cpu_bank).switch(MIXTURES[0])
    for name, live in weights.items():
        kit.assert_merged(live, base[name], bank.target(name), [(0, 0.7), (2, 0.3)], share=0.99)
        kit.assert_merged(simulated[name], base[name], cpu_bank.target(name), [(0, 0.7), (2, 0.3)], share=0.99)
        print(name, "share of weights with other bits than the simulator's:", (live.cpu() != simulated[name]).float().mean().item())


@pytest.mark.slow
def test_offsets_past_2_to_the_31(on_gpu):
    free, _ = torch.cuda.mem_get_info()
    rows, cols = 70_000, 32_768  # 2.3e9 elements
    if free < 4 * 2 * rows * cols:
        pytest.skip("needs 18 GB of GPU memory")
    weight = torch.randn(rows, cols, dtype=torch.bfloat16).mul_(0.05)
    bank = fm.AdapterBank.random({"w": weight}, 2, 16)
    edge = slice(rows - 100, rows)
    base = weight[edge].clone()
    fm.Switcher({"w": weight}, bank, "inplace").switch({"random_0": 0.7, "random_1": 0.3})
    target = bank.target("w")
    cut = fm.AdapterBank.from_tensors({"w": (target.a[:, :16], target.b[:, edge, :16])}, target.scaling).target("w")
    kit.assert_merged(weight[edge], base, cut, [(0, 0.7), (1, 0.3)], share=0.99)


def test_nothing_is_allocated_by_a_switch(on_gpu):
    weights = kit.make_weights(SHAPES)
    bank = kit.make_bank(weights)
    switcher = fm.Switcher(weights, bank)
    ids, gates = slots(bank, {"a1": 0.5})
    switcher.switch(ids, gates)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    switcher.switch(ids, gates)
    switcher.switch("a0")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_other_libraries_arrays_as_selections(on_gpu):
    cupy = pytest.importorskip("cupy")
    weights = kit.make_weights([(67, 131)])
    bank = kit.make_bank(weights)
    merged = kit.make_weights([(67, 131)])
    fm.Switcher(merged, bank).switch({"a1": 0.5})
    switcher = fm.Switcher(weights, bank)
    switcher.switch(cupy.asarray([1, -1], dtype=np.int32), cupy.asarray([0.5, 1.0], dtype=np.float32))
    assert kit.snapshot(weights) == kit.snapshot(merged)
    with pytest.raises(errors.DeviceError, match="values on the host"):
        switcher.switch(torch.zeros(1, dtype=torch.int32), [0.5])


def test_the_device_says_what_it_can_run():
    statuses = backend.backends()
    assert statuses["jit"] and statuses["aot"], statuses
    with contextlib.suppress(ImportError):
        import cupy

        assert cupy.cuda.runtime.getDeviceCount() == torch.cuda.device_count()
