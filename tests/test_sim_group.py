"""Grouping on the host simulator: what a plain sort gives, by four launches or one; and SGMV's programmatic launches."""

from __future__ import annotations

import ctypes
import os

import mixtures
import pytest
import torch
from mixtures import POPULARITIES, Device, choose_ids, make_batch

from fusedmerge.backend import sgmv

pytestmark = pytest.mark.usefixtures("on_host")


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(("popularity", "tokens", "slots", "adapters"), [*((p, 70, 2, 5) for p in POPULARITIES), ("zipf", 600, 3, 300)])
def test_groups(rng, popularity, tokens, slots, adapters, order):
    batch = make_batch(rng, tokens, 1, 1, 1, slots=slots, adapters=adapters, popularity=popularity)
    batch.gates[5] = 0.0
    groups = sgmv.group_tokens(Device(order, seed=order), batch.ids, batch.gates, adapters)
    mixtures.check_groups(groups, batch.ids, batch.gates)


def test_groups_of_unusual_slots():
    """Duplicates add in slot order; ids that do not exist, and sums of zero, are no pairs; a gate that is not finite is one."""
    big = 2**31 - 1
    ids = [[1, 1, 2], [2, -1, 2], [3, 0, 0], [-1, -1, -1], [4, -7, big], [0, 1, 0], [2, 2, 2], [1, 0, 3]]
    gates = [[0.5, 0.25, 1], [1, 9, -1], [1, 1, 2], [1, 1, 1], [1, 1, 1], [2, 0, -2], [3, 1, -2], [torch.nan, torch.inf, 1]]
    given = torch.tensor(ids, dtype=torch.int32), torch.tensor(gates, dtype=torch.float32)
    groups = sgmv.group_tokens("sim", *given, 4)
    mixtures.check_groups(groups, *given)
    assert mixtures.read(groups, "totals", 4)[:2].tolist() == [8, 4]


@pytest.mark.parametrize(("tokens", "slots", "adapters"), [(1, 1, 1), (256, 1, 1), (257, 32, 4096), (3000, 8, 4096)])
def test_groups_of_every_size(rng, tokens, slots, adapters):
    ids = choose_ids(rng, "zipf", tokens, slots, adapters)
    gates = torch.from_numpy(rng.standard_normal(ids.shape)).float()
    mixtures.check_groups(sgmv.group_tokens("sim", ids, gates, adapters), ids, gates)


@pytest.mark.parametrize(
    ("popularity", "tokens", "slots", "adapters"),
    [
        *((p, 70, 2, 5) for p in POPULARITIES),
        ("uniform", 1, 1, 1),
        ("uniform", 17, 2, 8),
        ("skewed", 128, 8, 64),
        ("uniform", 255, 3, 300),
        ("zipf", 256, 4, 4096),
        ("uniform", 32, 32, 4096),
    ],
)
def test_one_block_groups_as_four_launches_do(rng, monkeypatch, popularity, tokens, slots, adapters):
    """Bit for bit, their own tables too. Among the ids: equal ones, none, and some that do not exist."""
    ids = choose_ids(rng, popularity, tokens, slots, adapters)
    for other in (-1, adapters, 2**31 - 1):
        ids[torch.from_numpy(rng.random(ids.shape) < 0.1)] = other
    gates = torch.from_numpy(rng.choice([-1.5, -0.5, 0.0, 0.5, 0.75], ids.shape)).float()
    found, launches = [], []
    for few in (sgmv._SMALL_PAIRS, 0):
        monkeypatch.setattr(sgmv, "_SMALL_PAIRS", few)
        device = Device(len(found), blocks=3, seed=tokens, shared=227 << 10)
        found.append(sgmv.group_tokens(device, ids, gates, adapters))
        launches.append(device.launches)
    mixtures.check_groups(found[0], ids, gates)
    assert torch.equal(found[0].memory, found[1].memory)
    assert launches == [["group_small"], ["group_histogram", "group_scan", "group_scatter", "group_tiles"]]


@pytest.mark.parametrize(("tokens", "slots", "launches"), [(256, 4, 1), (257, 1, 4), (256, 5, 4), (128, 8, 1), (16, 32, 1), (33, 32, 4)])
def test_few_pairs_are_grouped_by_one_launch(tokens, slots, launches):
    device = Device()
    ids, gates = torch.zeros(tokens, slots, dtype=torch.int32), torch.ones(tokens, slots)
    sgmv.group_tokens(device, ids, gates, 2)
    assert len(device.launches) == launches


@pytest.mark.slow
def test_groups_of_a_long_prefill(rng):
    ids = choose_ids(rng, "zipf", 16384, 8, 4096)
    gates = torch.from_numpy(rng.standard_normal(ids.shape)).float()
    mixtures.check_groups(sgmv.group_tokens("sim", ids, gates, 4096), ids, gates)


# ---- programmatic launches -------------------------------------------------------------------------------------------


class LateDevice(Device):
    """What the kernel before has yet to write is not there before a launch waits for it, and every thread must have waited."""

    def launch(self, kernel, params, grid, shared_bytes, programmatic=False):
        from fusedmerge.backend.sim import library

        hide = library().fm_sim_hide
        hide.argtypes = [ctypes.c_void_p, ctypes.c_longlong]
        for address, num_bytes in _written_before(kernel.name, params) if programmatic else ():
            if num_bytes:
                hide(address, num_bytes)
        super().launch(kernel, params, grid, shared_bytes, programmatic)


def _written_before(name, params):
    """What the launches since the last plain one have written for this one."""
    groups = params.groups
    if name.startswith("group"):
        chunks = -(-params.num_tokens // 256)
        yield params.counts, 8 * chunks * params.num_indices
        if name != "group_scan":
            yield params.starts, 16 * params.num_indices
            yield groups.totals, 16
        if name == "group_tiles":
            yield params.positions, 4 * params.num_tokens * groups.num_slots
            yield groups.tile_tokens, 4 * params.num_tokens
            yield groups.pairs, 16 * params.num_tokens * groups.num_slots
        return
    for target in params.targets[: params.num_targets]:
        if params.num_parts > 1:
            yield target.parts, 4 * params.num_parts * params.num_pairs * target.z_stride
        if name.startswith("sgmv_expand"):
            yield target.z, 4 * params.num_places * target.z_stride
            yield target.inverses, 4 * params.num_places * -(-target.z_stride // 64)


@pytest.mark.parametrize(
    ("tokens", "slots", "multiprocessors", "edges"),
    [(17, 2, 132, [0, 0, 1, 1]), (40, 3, 1, [0, 0, 1]), (260, 2, 4, [0, 1, 1, 1, 0, 1])],
)
def test_what_an_earlier_kernel_writes_is_not_read_before_the_wait(request, rng, tokens, slots, multiprocessors, edges):
    """Groups and factors alone are; a launch of which any thread ends without a wait could end before the launch before it."""
    if "ptx" in request.node.name and os.environ.get("FUSEDMERGE_PTX_ARCH") == "compute_80":
        pytest.skip("there launches are plain, and no kernel waits")
    batch = make_batch(rng, tokens, 1100, 300, 70, slots=slots)
    late = LateDevice(multiprocessors=multiprocessors)
    assert torch.equal(batch.run(late), batch.run(Device(multiprocessors=multiprocessors)))
    assert late.edges == edges
    batch.ids[:] = -1
    assert torch.equal(batch.run(LateDevice(multiprocessors=multiprocessors)), batch.y)
