"""What kernels move by the PTX machine's count is what perf/model.py says must move; and docs/kernels/traffic.md says what is counted."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import traffic
from harness import FP8

from tests.conftest import use_host

SHEET = Path(__file__).resolve().parents[1] / "docs/kernels/traffic.md"


@pytest.fixture
def machine(request, monkeypatch, lib):
    use_host("sim", request, monkeypatch)
    return lib, request.getfixturevalue("kernels_ptx")


def moved(row):
    return 32 * (row.traffic.touched_read + row.traffic.touched_written) / row.must.bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "through_l2"), [({}, 1.2), ({"source": FP8}, 1.25), ({"inplace": True}, 1.35), ({"k": 0}, 1.01)], ids=str
)
def test_a_switch_moves_what_the_model_says(machine, options, through_l2):
    row = traffic.switch(*machine, 1024, 512, 16, **options)
    found = row.traffic
    assert 1 <= moved(row) < 1.005
    assert 0 <= found.written_sectors - 2 * 1024 * 512 // 32 <= 16  # each sector once, whole; and the selection's state
    assert 32 * (found.read_sectors + found.written_sectors) < through_l2 * row.must.bytes  # the factors, again for each unit


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "r"), [(1, 0), (1, 16), (5, 40), (16, 16)])
def test_a_linear_moves_what_the_model_says(machine, tokens, r):
    *parts, row = traffic.linears(*machine, tokens, r, cols=1024, rows=1056)
    assert 1 <= moved(row) < 1.03  # z and routing are not in the model: they stay in L2
    assert [part.name for part in parts] == (["prologue", "gemv"] if r else [])
    if r == 0:
        assert row.traffic.read_sectors * 32 < row.must.read * (1 + tokens / 32 + 0.02)  # x again for each tile of 32 rows
    assert row.traffic.conflicts < 0.15 * row.traffic.shared


@pytest.mark.slow
def test_the_sheet_says_what_is_counted(machine):
    lines = SHEET.read_text().splitlines()
    for row in (traffic.switch(*machine, 2048, 1024, 16), *traffic.linears(*machine, 8, 16)):
        assert traffic.line(row) in lines


def test_accesses_are_counted_by_sectors_and_banks(machine):
    """Lane i reads 4 bytes at 4 i, then at 128 i; in shared memory the same; then all lanes one word."""
    library, _ = machine
    code = """
    ld.param.u64 %rd1, [tried_param_0];
    mov.u32 %r1, %tid.x;
    and.b32 %r1, %r1, 31;
    mul.lo.u32 %r2, %r1, 4;
    mul.lo.u32 %r3, %r1, 128;
    cvt.u64.u32 %rd2, %r2;
    cvt.u64.u32 %rd3, %r3;
    add.s64 %rd2, %rd1, %rd2;
    add.s64 %rd3, %rd1, %rd3;
    ld.global.u32 %r4, [%rd2];
    ld.global.u32 %r4, [%rd3];
    st.shared.u32 [%r2+1024], %r1;
    st.shared.u32 [%r3+1024], %r1;
    ld.shared.u32 %r4, [1024];
    """
    head = ".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry tried(.param .align 8 .b8 tried_param_0[128])\n"
    registers = "{ .reg .b32 %r<9>; .reg .b64 %rd<9>; "
    from fusedmerge.backend.sgmv import GroupParams, _kernel

    area = ctypes.create_string_buffer(8192)
    aligned = ctypes.c_uint64((ctypes.addressof(area) + 31) // 32 * 32)
    params = GroupParams.from_buffer_copy(bytes(aligned) + bytes(ctypes.sizeof(GroupParams) - 8))
    with traffic.counting(library, (head + registers + code + "ret; }").encode()) as take:
        traffic.SimLauncher().launch(_kernel("group_scan"), params, 1, 8192)
        found = take()
    warps = 8
    assert (found.read, found.read_sectors, found.touched_read) == (warps * 256, warps * (4 + 32), 4 + 31)
    assert (found.shared, found.conflicts) == (warps * 3, warps * 31)
    assert found.instructions == warps * (len(re.findall(";", code)) + 1)
