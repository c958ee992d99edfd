"""The JIT path as far as no GPU is needed: compiling, the cache, and what the extension shares with it (planner, struct layouts)."""

import ctypes
import shutil
import subprocess
import sys

import pytest

from fusedmerge import errors
from fusedmerge.backend import compiler, cuda, jit, params

nvrtc = pytest.importorskip("cupy").cuda.nvrtc

EXACT = jit.switch_kernel((params.BF16, params.BF16, params.BF16), inplace=False, resident_chunks=1)
SMALL = jit.switch_kernel((params.FLOAT32, params.FLOAT32, params.FLOAT32), inplace=False, resident_chunks=1)
HOPPER = (9, 0)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDMERGE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def headers(tmp_path, monkeypatch):
    """A copy of the headers that a test may edit."""
    root = tmp_path / "include"
    shutil.copytree(compiler.header_root(), root)
    monkeypatch.setattr(compiler, "header_root", lambda: root)
    return root / "fusedmerge/kernel"


@pytest.fixture
def compilations(monkeypatch):
    """The flags of every compilation from here on."""
    seen = []
    compile_program = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda kernel, flags: (seen.append(flags), compile_program(kernel, flags))[1])
    return seen


@pytest.mark.parametrize("capability", [HOPPER, *(pytest.param(c, marks=pytest.mark.slow) for c in ((8, 0), (10, 0), (12, 0)))])
def test_every_architecture_gets_machine_code(cache, capability):
    path = compiler.compiled(EXACT, capability)
    code = path.read_bytes()
    assert path.parent == cache and path.suffix == ".cubin" and code[:4] == b"\x7fELF" and compiler.ENTRY.encode() in code


@pytest.mark.slow
@pytest.mark.parametrize("live", [params.BF16, params.FP16, params.FLOAT32])
def test_every_combination_compiles(cache, live):
    sources = {live, params.FLOAT32, params.FP8} | ({params.BF16, params.FP16} if live == params.FLOAT32 else set())
    for source in sources:
        for factor in {live, params.FLOAT32}:
            for inplace in (False, True) if source == live else (False,):
                assert compiler.compiled(jit.switch_kernel((live, source, factor), inplace, 2), HOPPER).is_file()


def test_a_gpu_newer_than_nvrtc_gets_ptx_and_one_too_old_is_refused(cache):
    newest = max(nvrtc.getSupportedArchs())
    path = compiler.compiled(SMALL, (newest // 10 + 9, 0))
    assert path.suffix == ".ptx" and f".target sm_{newest}" in path.read_text() and compiler.ENTRY in path.read_text()
    with pytest.raises(errors.BackendError, match=r"compute capability 8.0 or later, got 7.0"):
        compiler.compiled(SMALL, (7, 0))


@pytest.mark.slow
def test_the_second_time_nothing_is_compiled(cache, compilations):
    first = compiler.compiled(SMALL, HOPPER)
    assert compiler.compiled(SMALL, HOPPER) == first and len(compilations) == 1
    other = jit.switch_kernel((params.FLOAT32, params.FLOAT32, params.FLOAT32), inplace=True, resident_chunks=1)
    assert len({first, compiler.compiled(other, HOPPER), compiler.compiled(SMALL, (8, 0))}) == 3
    assert len(compilations) == 3


def test_every_included_header_and_no_other_is_in_the_key(cache, headers, compilations):
    compiler.compiled(SMALL, HOPPER)
    (headers / "unrelated.cuh").write_text("#error never included\n")
    compiler.compiled(SMALL, HOPPER)
    assert len(compilations) == 1
    included = [header.name for header in compiler._closure("switch.cuh")]
    assert {"switch.cuh", "platform.cuh", "ptx.cuh", "params.cuh", "tile.cuh", "scheduler.cuh"} <= set(included)
    keys = set()
    for name in included:
        keys.add(compiler._key(SMALL, (), ""))
        (headers / name).write_text((headers / name).read_text() + "// edited\n")
    keys |= {compiler._key(*of) for of in ((SMALL, (), ""), (SMALL, ("-G",), ""), (SMALL, (), (13, 0)), (EXACT, (), ""))}
    assert len(keys) == len(included) + 4


def test_a_damaged_file_is_compiled_again(cache, compilations, caplog):
    path = compiler.compiled(SMALL, HOPPER)
    code = path.read_bytes()
    path.write_bytes(code[:-1])
    assert compiler.compiled(SMALL, HOPPER) == path and path.read_bytes() == code and len(compilations) == 2
    assert "is damaged" in caplog.text


def test_a_cache_that_cannot_be_written_is_reported_and_gone_without(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSEDMERGE_CACHE_DIR", str(tmp_path / "file/cache"))
    assert compiler.compiled(SMALL, HOPPER).read_bytes()[:4] == b"\x7fELF"
    assert "cannot be written" in caplog.text and (tmp_path / "file").read_text() == ""


def test_an_interrupted_write_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(compiler.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compiler.compiled(SMALL, HOPPER)
    assert not list(cache.iterdir())


@pytest.mark.slow
def test_processes_that_compile_at_once_agree(cache):
    code = (
        "from fusedmerge.backend import compiler, jit\n"
        "path = compiler.compiled(jit.switch_kernel((2, 2, 2), False, 1), (9, 0))\n"
        "assert path.read_bytes()[:4] == b'\\x7fELF'; print(path)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {process.communicate()[0].strip() for process in processes}
    assert all(process.returncode == 0 for process in processes)
    assert len(printed) == 1 and [str(path) for path in cache.iterdir()] == list(printed)


def test_a_source_that_does_not_compile_shows_the_compiler_s_words(cache):
    with pytest.raises(errors.BackendError, match=r"(?s)kernel: expected source that NVRTC compiles.*no_such_type"):
        compiler.compiled(compiler.Kernel("switch.cuh", "SwitchParams", "run_switch<no_such_type, float, float>"), HOPPER)
    with pytest.raises(errors.BackendError, match=r"kernel headers: expected none.cuh in the installation"):
        compiler.compiled(compiler.Kernel("none.cuh", "SwitchParams", "f"), HOPPER)
    assert not cache.exists()


def test_headers_of_an_installation_are_found(tmp_path, monkeypatch):
    package = tmp_path / "site/fusedmerge"
    (package / "backend").mkdir(parents=True)
    monkeypatch.setattr(compiler, "__file__", str(package / "backend/compiler.py"))
    assert compiler.header_root() == package / "include"


# ---- the extension ---------------------------------------------------------------------------------------------------


def test_the_extension_reads_the_structs_as_python_writes_them():
    assert cuda.load_extension().describe_structs() == params.layout(params.SHARED_STRUCTS)


def test_the_extension_and_the_simulator_plan_alike(sim_library):
    def planned(plan, request):
        table = (params.SwitchSegment * 2)(*(params.SwitchSegment(live=256, source=256, a=256, b=256, scaling=4) for _ in range(2)))
        for segment, (rows, cols) in zip(table, ((4096, 11008), (67, 131)), strict=True):
            segment.rows, segment.cols, segment.rank = rows, cols, 16
            segment.live_stride = segment.source_stride = segment.a_row_stride = cols
            segment.a_adapter_stride, segment.b_adapter_stride, segment.b_row_stride = 16 * cols, 16 * rows, 16
        result = params.PlanResult()
        answer = bool(plan(ctypes.addressof(request), ctypes.addressof(table), ctypes.addressof(result)))
        return answer, bytes(table), bytes(result)

    for request in (params.PlanRequest(0, 0, 0, 0, 2, 8, 2, 132, 232448, 0), params.PlanRequest(0, 0, 0, 0, 2, 8, 99, 132, 232448, 0)):
        theirs = planned(lambda *args: ctypes.CDLL(sim_library).fm_sim_plan(*map(ctypes.c_void_p, args)) == 0, request)
        assert planned(cuda.load_extension().plan_switch, request) == theirs


def test_an_extension_without_kernels_says_so():
    extension = cuda.load_extension()
    if extension.has_cuda():
        with pytest.raises(RuntimeError, match=r"switch: kernel: expected one for dtypes 0, 1 and 0, got none"):
            extension.prepare_switch((0, 1, 0), 1, 1)
    else:
        with pytest.raises(RuntimeError, match=r"switch: library: expected one with CUDA, got one that was built without nvcc"):
            extension.query_device(0)
