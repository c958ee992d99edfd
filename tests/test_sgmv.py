"""SGMV through the backends, as ops calls it: sim here, jit and aot on a GPU; graphs and sizes that only a GPU can show."""

from dataclasses import replace

import mixtures
import numpy as np
import pytest
import torch

from fusedmerge.backend import compiler, params, sgmv, sgmv_params
from fusedmerge.backend.kernels import launcher
from tests.conftest import ON_GPU, ON_HOST, use_gpu, use_host
from tests.test_gpu_linear import Plain

DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=[*ON_HOST, *ON_GPU])
def name(request, monkeypatch):
    """Every backend that runs the kernels."""
    if request.param in ("sim", "ptx"):
        use_host(request.param, request, monkeypatch)
        return "sim"
    use_gpu(request.param, request, monkeypatch)
    return request.param


def make_batch(rng, *shape, **options):
    """On the default device."""
    batch = mixtures.make_batch(rng, *shape, **options)
    return mixtures.Batch(
        **{field: None if value is None else value.to(torch.get_default_device()) for field, value in vars(batch).items()}
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(name, rng, dtype):
    batch = make_batch(rng, 60, 200, 130, 20, dtype=dtype)
    mixtures.check(batch, batch.run(name))


def test_one_call_for_one_matrix(name, rng):
    batch = make_batch(rng, 20, 100, 90, 12)
    y = batch.y.clone()
    sgmv.add_adapters(name, y, batch.x, batch.a, batch.b, batch.ids, batch.gates, batch.scaling)
    mixtures.check(batch, y)


@pytest.mark.parametrize("off", ["gates", "scaling"])
def test_a_gate_or_scaling_of_zero_is_no_adapter(name, rng, off):
    """Whatever the factors hold."""
    spoilt, without = mixtures.switched_off(make_batch(rng, 20, 70, 50, 20, adapters=3), off)
    assert torch.equal(spoilt.run(name), without.run(name))


def test_kernels_are_named_as_the_library_names_them(rng, monkeypatch, sim_library):
    """A Kernel that is not in the table, or that takes another struct, is an error of the simulator's."""
    monkeypatch.setenv("FUSEDMERGE_SIM_LIB", sim_library)
    with pytest.raises(Exception, match=r"no such kernel: sgmv_none"):
        sgmv.launcher("sim", torch.device("cpu")).launch(sgmv._kernel("sgmv_none"), sgmv_params.SgmvParams(), 1, 0)
    with pytest.raises(Exception, match=r"params of another size: sgmv_sum_fp16"):
        sgmv.launcher("sim", torch.device("cpu")).launch(sgmv._kernel("sgmv_sum", torch.float16), sgmv_params.GroupParams(), 1, 0)


def test_the_headers_constants_are_the_mirrors():
    text = (compiler.header_root() / "fusedmerge/kernel/sgmv_params.cuh").read_text()
    stated = {"kShrinkPairs": sgmv_params.SHRINK_PAIRS, "kPartCols": sgmv_params.PART_COLS}
    stated |= {
        "kExpandCols": sgmv_params.EXPAND_COLS,
        "kFewRanks": sgmv_params.FEW_RANKS,
        "kManyRanks": sgmv_params.MANY_RANKS,
        "kSgmvTargets": sgmv_params.MAX_TARGETS,
    }
    for constant, value in stated.items():
        assert f"constexpr int {constant} = {value};" in text
    assert sgmv_params.GROUP_TOKENS == params.THREADS and "kGroupTokens = kThreads;" in text
    flags = sgmv_params.Y_ALIGNED, sgmv_params.SHRINK_ALIGNED, sgmv_params.EXPAND_ALIGNED
    assert "kYAligned = {}, kShrinkAligned = {}, kExpandAligned = {}".format(*flags) in text


@pytest.mark.slow
def test_kernels_compile_just_in_time(tmp_path, monkeypatch):
    pytest.importorskip("cupy")
    monkeypatch.setenv("FUSEDMERGE_CACHE_DIR", str(tmp_path))
    named = (("group_scatter", None), ("sgmv_shrink", torch.bfloat16, 16), ("sgmv_expand", torch.float16, 64))
    for kernel in (sgmv._kernel(*name) for name in named):
        assert compiler.compiled(kernel, (9, 0)).read_bytes()[:4] == b"\x7fELF"


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("popularity", mixtures.POPULARITIES)
def test_a_prefill(on_gpu, rng, popularity):
    batch = make_batch(rng, 2000, 1000, 1400, 64, adapters=64, popularity=popularity)
    mixtures.check(batch, batch.run(on_gpu))


@pytest.mark.parametrize(("tokens", "slots", "adapters"), [(16384, 8, 4096), (5000, 2, 8), (17, 32, 4096), (256, 4, 64)])
def test_groups(on_gpu, rng, tokens, slots, adapters):
    ids = mixtures.choose_ids(rng, "zipf", tokens, slots, adapters).cuda()
    gates = torch.from_numpy(rng.standard_normal(ids.shape)).float().cuda()
    mixtures.check_groups(sgmv.group_tokens(on_gpu, ids, gates, adapters), ids.cpu(), gates.cpu())


def test_a_graph_groups_and_adds_whatever_the_ids_then_are(on_gpu, rng):
    batch = make_batch(rng, 300, 520, 264, 33, adapters=9)
    y = torch.empty_like(batch.y)

    def step():
        y.copy_(batch.y)
        sgmv.add_adapters(on_gpu, y, batch.x, batch.a, batch.b, batch.ids, batch.gates, batch.scaling)

    step()  # everything is loaded before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for popularity in mixtures.POPULARITIES:
        batch.ids.copy_(mixtures.choose_ids(rng, popularity, 300, 2, 9))
        graph.replay()
        mixtures.check(batch, y)
    batch.ids.fill_(-1)
    graph.replay()
    assert torch.equal(y, batch.y)


def test_nothing_waits_for_the_device(on_gpu, rng):
    batch = make_batch(rng, 300, 520, 264, 33)
    batch.run(on_gpu)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = batch.run(on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().synchronize()
    mixtures.check(batch, y)


@pytest.mark.parametrize("tokens", [17, 64, 300, 2000])
def test_long_chains_have_the_same_bits_with_and_without_edges(on_gpu, rng, tokens):
    """Each layer groups anew, by other ids, in memory that the last one used, and reads what the last one wrote."""
    layers = [make_batch(rng, tokens, 512, 512, 40, adapters=1 + 7 * (i % 3)) for i in range(6)] * 8
    where = launcher(on_gpu, torch.device("cuda"))

    def chain(how):
        x = layers[0].x
        for layer in layers:
            x = replace(layer, x=x / x.abs().max()).run(how)
        return x

    expected = chain(Plain(where))
    assert torch.isfinite(expected).all()
    for _ in range(20):
        assert torch.equal(chain(where), expected)


def test_the_same_bits_every_time(on_gpu, rng):
    """Any order in which the device runs warps; and a token alone."""
    batch = make_batch(rng, 700, 1100, 520, 40, slots=3, adapters=11)
    first = batch.run(on_gpu)
    for _ in range(20):
        assert torch.equal(batch.run(on_gpu), first)
    for t in (0, 350, 699):
        alone = mixtures.Batch(*(field[t : t + 1] if i in (0, 1, 4, 5) else field for i, field in enumerate(vars(batch).values())))
        assert torch.equal(alone.run(on_gpu), first[t : t + 1])


def test_the_simulator_is_near(on_gpu, rng, monkeypatch, sim_library):
    """Its twin of mma stands for these tensor cores: nearly every bit is the same."""
    monkeypatch.setenv("FUSEDMERGE_SIM_LIB", sim_library)
    batch = make_batch(rng, 60, 1100, 200, 40)
    ours = batch.run(on_gpu).cpu()
    theirs = batch.to("cpu").run()
    assert np.mean((ours == theirs).numpy()) > 0.999
