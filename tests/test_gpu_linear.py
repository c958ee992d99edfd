"""What only a GPU can show of fused application: graphs, programmatic launches, and results that do not depend on either."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fusedmerge.backend import linear
from fusedmerge.backend.kernels import launcher
from tests import linear_kit as kit

pytestmark = pytest.mark.gpu


class Plain:
    """A launcher without programmatic edges."""

    def __init__(self, inner):
        self.inner = inner
        self.num_multiprocessors, self.shared_bytes_limit = inner.num_multiprocessors, inner.shared_bytes_limit

    def launch(self, kernel, params, grid, shared_bytes, programmatic=False):
        self.inner.launch(kernel, params, grid, shared_bytes)


def chain(where, problems, x):
    """Each group's first y, made x again, is the next one's input: 2 launches a group, each dependent on the last."""
    for i, problem in enumerate(problems):
        routers = [linear.Router(target.a[:, 0].contiguous(), 2) for target in problem.targets]
        norm = linear.Norm(torch.ones_like(x[0]), 1e-6, x)
        applied = linear.decode_group(where, x, problem.targets, (problem.known, routers[0], routers)[i % 3], norm)
        x = applied.ys[0]
    return x


@pytest.mark.parametrize("num_tokens", [1, 7, 16])
def test_long_chains_have_the_same_bits_with_and_without_the_edge(on_gpu, num_tokens):
    problems = [kit.make(num_tokens, 512, rows=(512, 256)[: 1 + i % 2], ranks=(16,), seed=i, extras=False) for i in range(8)] * 8
    where, x = launcher(on_gpu, torch.device("cuda")), problems[0].x
    expected = chain(Plain(where), problems, x)
    assert torch.isfinite(expected).all()
    for _ in range(20):
        assert torch.equal(chain(where, problems, x), expected)


@pytest.mark.parametrize("cols", [512, 515])
def test_weights_that_were_just_written_are_read(on_gpu, cols):
    """The GEMV fetches W before it waits for the prologue. What came before the prologue must be there, in L1 too (rows not aligned)."""
    problem = kit.make(2, cols, rows=(4096,), extras=False)
    where, weight = launcher(on_gpu, torch.device("cuda")), problem.targets[0].weight
    versions = [weight.clone(), weight.flip(0), weight.neg()]
    found = {Plain: [], type(where): []}
    for i in range(60):
        for kind, ys in found.items():
            weight.copy_(versions[i % 3])
            ys.append(linear.decode_group(Plain(where) if kind is Plain else where, problem.x, problem.targets, problem.known).ys[0])
            weight.fill_(torch.nan)
    assert all(torch.equal(y, same) and y.isfinite().all() for y, same in zip(*found.values(), strict=True))


def test_a_graph_follows_ids_and_x(on_gpu):
    problem = kit.make(3, 264, rows=(70, 33), ranks=(20,))
    linear.decode_group(on_gpu, problem.x, problem.targets, problem.known)  # warm: everything is loaded before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        applied = linear.decode_group(on_gpu, problem.x, problem.targets, problem.known)
    for seed in range(5):
        other = kit.make(3, 264, rows=(70, 33), ranks=(20,), seed=seed)
        for tensor, value in ((problem.x, other.x), (problem.ids, other.ids), (problem.gates, other.gates)):
            tensor.copy_(value)
        graph.replay()
        expected = linear.decode_group(on_gpu, problem.x, problem.targets, problem.known)
        assert all(torch.equal(y, same) for y, same in zip(applied.ys, expected.ys, strict=True))


def test_the_two_compilers_agree(on_gpu):
    problem = kit.make(9, 2100, rows=(70, 33), ranks=(20,))
    first, second = (linear.decode_group(name, problem.x, problem.targets, problem.known) for name in ("jit", "aot"))
    assert all(torch.equal(y, same) for y, same in zip(first.ys, second.ys, strict=True))


def test_a_new_thread_may_begin_with_a_launch(on_gpu):
    """It has no current context yet."""
    problem = kit.make(3, 264)

    def apply():
        return linear.decode_group(on_gpu, problem.x, problem.targets, problem.known).ys[0]

    expected = apply()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(apply).result(), expected)


def test_nothing_waits_for_the_host(on_gpu):
    problem = kit.make(2, 264)
    linear.decode_group(on_gpu, problem.x, problem.targets, problem.known)
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear.decode_group(on_gpu, problem.x, problem.targets, problem.known)
        linear.route(on_gpu, problem.x, problem.targets[0].a[:, 0].contiguous(), 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
