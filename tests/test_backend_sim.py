"""The `sim` backend: its library and struct layouts, what it refuses, what the device reports, failures and interruptions.

What its switches put into the weights: tests/test_switcher.py (engine "sim"). The kernels themselves: tests/test_sim_switch.py.
"""

import ctypes
import ctypes.util

import pytest
import torch

import fusedmerge as fm
from fusedmerge import backend, errors
from fusedmerge.backend import params, sim
from tests import kit

SHAPES = [(9, 31), (67, 131)]


@pytest.fixture
def on_sim(sim_library, monkeypatch):
    """The backend is chosen as a user chooses it."""
    monkeypatch.setenv("FUSEDMERGE_SIM_LIB", sim_library)
    monkeypatch.setenv("FUSEDMERGE_BACKEND", "sim")


@pytest.fixture
def mixed(on_sim):
    """Weights of two dtypes, so two launches for a switch; with their bank."""
    weights = kit.make_weights(SHAPES) | {"wide": kit.make_weights([(20, 40)], torch.float32)["w0"]}
    return weights, kit.make_bank(weights)


def make_switcher(weights, bank, mode="exact"):
    switcher = fm.Switcher(weights, bank, mode)
    assert isinstance(switcher._engine, sim.SimSwitch)
    return switcher


def versions(weights):
    return [tensor._version for tensor in weights.values()]


def patch_launch(monkeypatch, engine, at, before=None, after=None):
    """Call `before(params)` ahead of the at-th launch from now, and `after()` behind it."""
    launch, count = engine.launch, iter(range(1000))

    def patched(group, launch_params):
        mine = next(count) == at
        if mine and before:
            before(launch_params)
        launch(group, launch_params)
        if mine and after:
            after()

    monkeypatch.setattr(engine, "launch", patched)


def raising(error):
    def call(*_):
        raise error

    return call


# ---- the library -----------------------------------------------------------------------------------------------------


def test_struct_layouts_agree_with_c(sim_library):
    lib = ctypes.CDLL(sim_library)
    lib.fm_sim_layout.restype = lib.fm_sim_version.restype = ctypes.c_char_p
    stated = lib.fm_sim_layout().decode()
    assert stated.splitlines() == params.layout().splitlines()
    assert lib.fm_sim_version().decode() == fm.__version__
    for struct in (params.SwitchSegment, params.SwitchState, params.SwitchParams, params.PlanRequest, params.PlanResult, params.SimOptions):
        assert stated.count(f"{struct.__name__}.") == len(struct._fields_)


def test_the_library_is_found_and_named(on_sim, sim_library):
    status = fm.backends()["sim"]
    assert status and status.reason.endswith(sim_library)


def test_without_a_library_the_reason_is_given(tmp_path, monkeypatch):
    weights = kit.make_weights(SHAPES)
    bank = kit.make_bank(weights)
    text = tmp_path / "text.so"
    text.write_text("no library")
    other = ctypes.util.find_library("m")
    missing = tmp_path / "missing.so"
    cases = {missing: "is missing: run `make sim`", text: "cannot be loaded", **({_path_of(other): "is no simulator of"} if other else {})}
    for path, words in cases.items():
        monkeypatch.setenv("FUSEDMERGE_BACKEND", "sim")
        monkeypatch.setenv("FUSEDMERGE_SIM_LIB", str(path))
        status = fm.backends()["sim"]
        assert not status and words in status.reason and str(path) in status.reason and "make sim" in status.reason
        with pytest.raises(errors.BackendError, match=r"make sim"):
            fm.Switcher(weights, bank)
        monkeypatch.setenv("FUSEDMERGE_BACKEND", "cpu")
        fm.Switcher(weights, bank)


def _path_of(name):
    """Where a system library lies: its own symbols tell (dladdr through /proc)."""
    ctypes.CDLL(name)
    with open("/proc/self/maps") as maps:
        return next(line.split()[-1] for line in maps if line.rstrip().endswith(name))


def test_the_default_library_is_the_one_that_make_sim_builds(sim_library, monkeypatch):
    monkeypatch.delenv("FUSEDMERGE_SIM_LIB", raising=False)
    assert sim.library_path().parts[-3:] == ("build", "sim", "libfusedmerge_sim.so")
    assert (sim.library_path().parents[2] / "fusedmerge" / "backend").is_dir()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("fusedmerge.__version__", "9.9.9", rf'it says "fusedmerge {fm.__version__}", this package "fusedmerge 9.9.9"'),
        ("fusedmerge.backend.sim.layout", lambda: params.layout().replace("rank 128 4", "rank 132 4"), r"SwitchSegment.rank 128 4"),
        ("fusedmerge.backend.sim.layout", lambda: params.layout() + "More.field 0 4\n", r'it says "end", this package "More.field 0 4"'),
    ],
)
def test_a_library_of_other_sources_is_refused(on_sim, monkeypatch, name, value, words):
    sim._load.cache_clear()
    monkeypatch.setattr(name, value)
    status = fm.backends()["sim"]
    assert not status and words in status.reason and "make sim" in status.reason
    sim._load.cache_clear()


def test_weights_elsewhere_are_refused(on_sim):
    with pytest.raises(errors.BackendError, match=r'backend "sim": expected weights on the CPU, got cuda:0'):
        backend.choose(torch.device("cuda", 0), "Switcher")


# ---- switches --------------------------------------------------------------------------------------------------------


def test_dtypes_are_launched_apart_and_each_once(mixed, monkeypatch):
    weights, bank = mixed
    base = {name: tensor.clone() for name, tensor in weights.items()}
    before = kit.snapshot(weights)
    switcher = make_switcher(weights, bank)
    launches = []
    launch = switcher._engine.launch
    monkeypatch.setattr(switcher._engine, "launch", lambda *args: (launches.append(args), launch(*args)))
    switcher.switch({"a0": 0.7, "a2": 0.3})
    assert [len(group.segments) for group, _ in launches] == [2, 1]
    for name, live in weights.items():
        kit.assert_merged(live, base[name], bank.target(name), [(0, 0.7), (2, 0.3)], share=None if name == "w1" else 0)
    switcher.switch(["a2", "a0"], [0.3, 0.7])
    assert len(launches) == 2  # unchanged: not even launched
    switcher.restore()
    assert len(launches) == 4 and kit.snapshot(weights) == before


@pytest.mark.parametrize("mode", ["exact", "inplace"])
def test_a_mixture_of_more_than_32_is_refused(on_sim, mode):
    weights = kit.make_weights(SHAPES)
    bank = fm.AdapterBank.random(weights, 33, 2)
    switcher = make_switcher(weights, bank, mode)
    switcher.switch(list(range(32)), [0.1] * 32)
    held, written, active = kit.snapshot(weights), versions(weights), switcher.active
    with pytest.raises(errors.InvalidValueError, match=r"switch: adapters: expected at most 32 in one mixture .*, got 33"):
        switcher.switch(list(range(33)), [0.1] * 33)
    assert (kit.snapshot(weights), versions(weights), switcher.active) == (held, written, active)


def test_what_the_planner_refuses_is_a_typed_error_with_the_target_s_name(on_sim):
    weights = kit.make_weights(SHAPES)
    bank = kit.make_bank(weights)
    bank.target("w1").a = bank.target("w1").a[:, :40].contiguous()
    with pytest.raises(errors.InvalidValueError, match=r"^switch: w1: expected a rank padded to a multiple of 16, got 40$"):
        fm.Switcher(weights, bank)


def test_adapters_that_come_later_have_their_ranks(on_sim):
    weights = kit.make_weights(SHAPES)
    base = {name: tensor.clone() for name, tensor in weights.items()}
    factors = {name: fm.AdapterBank.random(weights, 2, 40).target(name) for name in weights}
    first = {name: (f.a[:, :4], f.b[:, :, :4]) for name, f in factors.items()}
    bank = fm.AdapterBank.from_tensors(first, 1.0, capacity=3, max_rank=40)
    switcher = make_switcher(weights, bank)
    switcher.switch("0")
    switcher.switch("1")
    bank.remove("0")  # its slot's rank is on the device already
    for slot, rank in enumerate((24, 40)):
        bank.add(f"later_{rank}", {name: (f.a[slot, :rank], f.b[slot, :, :rank]) for name, f in factors.items()}, 0.5)
    for name in weights:
        bank.target(name).a[bank.slot("later_24"), 32:] = float("nan")  # beyond its rank, padded to 16s, nothing is read
    switcher.switch({"later_24": 0.5, "later_40": -0.25})
    for name, live in weights.items():
        mixture = [(bank.slot("later_24"), 0.5), (bank.slot("later_40"), -0.25)]
        kit.assert_merged(live, base[name], bank.target(name), mixture, share=0.99)


# ---- what the device reports -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: setattr(ctypes.c_int.from_address(p.ids), "value", 99), "ids: expected -1"),
        (lambda p: setattr(ctypes.c_float.from_address(p.gates), "value", float("nan")), "gates: expected finite"),
    ],
)
def test_values_that_only_the_device_sees_are_reported(on_sim, monkeypatch, spoil, words):
    weights = kit.make_weights(SHAPES)
    switcher = make_switcher(weights, kit.make_bank(weights))
    switcher.switch("a0")
    held = kit.snapshot(weights)
    with monkeypatch.context() as patch:
        patch_launch(patch, switcher._engine, 0, before=spoil)
        switcher.switch("a1")
    with pytest.raises(errors.InvalidValueError, match=words):
        switcher.check()
    assert kit.snapshot(weights) == held and switcher.active == (("a0", 1.0),)
    switcher.switch("a1")
    assert kit.snapshot(weights) != held and switcher.active == (("a1", 1.0),)


@pytest.mark.parametrize("flag", [params.BAD_ID, params.BAD_GATE, params.NON_FINITE, params.BAD_ID | params.BAD_GATE])
def test_every_flag_is_raised_once(on_sim, flag):
    weights = kit.make_weights(SHAPES)
    engine = make_switcher(weights, kit.make_bank(weights))._engine
    offset = params.SwitchState.status.offset
    engine._groups[0]._state[offset] = flag
    with pytest.raises(errors.InvalidValueError, match=r"^switch: (ids|gates|weights): expected "):
        engine.check()
    engine.check()


# ---- failures and interruptions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1])
def test_a_failed_launch_is_repaired_from_the_base(mixed, monkeypatch, at):
    weights, bank = mixed
    before = kit.snapshot(weights)
    switcher = make_switcher(weights, bank)
    switcher.switch("a0")
    merged = kit.snapshot(weights)
    plan = switcher._engine._groups[at].plan
    enough = plan.shared_bytes
    with monkeypatch.context() as patch, pytest.raises(errors.BackendError, match="simulator: expected a launch without faults"):
        patch_launch(patch, switcher._engine, at, before=lambda _: setattr(plan, "shared_bytes", 1024))
        switcher.switch("a1")
    plan.shared_bytes = enough
    weights["wide" if at else "w0"].fill_(7)  # whatever a broken kernel leaves
    with pytest.raises(errors.StateError, match="interrupted"):
        _ = switcher.active
    switcher.switch("a0")
    assert kit.snapshot(weights) == merged
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch_launch(patch, switcher._engine, 0, before=raising(KeyboardInterrupt()))
        switcher.switch("a2")
    assert switcher.active == (("a0", 1.0),)  # the device is trusted again
    switcher.restore()
    assert kit.snapshot(weights) == before


def test_a_failed_launch_in_place_cannot_be_repaired_and_says_so(on_sim, monkeypatch):
    weights = kit.make_weights(SHAPES)
    switcher = make_switcher(weights, kit.make_bank(weights), "inplace")
    with monkeypatch.context() as patch, pytest.raises(errors.BackendError):
        patch.setattr(switcher._engine, "launch", raising(errors.BackendError("switch", "simulator", "", "")))
        switcher.switch("a1")
    for call in (lambda: switcher.switch("a0"), switcher.restore):
        with pytest.raises(errors.StateError, match=r"switch: w0: expected weights that hold a known mixture, got a launch that failed"):
            call()


@pytest.mark.parametrize("mode", ["exact", "inplace"])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("repair", ["same", "other", "restore"])
def test_interruption_is_known_from_the_device_and_repaired(mixed, monkeypatch, mode, at, after, repair):
    weights, bank = mixed
    twins = {name: tensor.clone() for name, tensor in weights.items()}
    switcher, twin = make_switcher(weights, bank, mode), make_switcher(twins, bank, mode)
    first, second, third = {"a0": 0.7, "a2": 0.3}, {"a1": 1.0, "a2": -0.2}, {"a3": 0.5}
    switcher.switch(first)
    twin.switch(first)
    held, written = kit.snapshot(weights), versions(weights)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch_launch(patch, switcher._engine, at, **{"after" if after else "before": raising(KeyboardInterrupt())})
        switcher.switch(second)
    now = kit.snapshot(weights)
    assert all(b > a for a, b, name in zip(written, versions(weights), weights, strict=True) if now[name] != held[name])
    done = at + after  # of two launches
    if done == 1:
        with pytest.raises(errors.StateError, match="interrupted"):
            _ = switcher.active
    else:
        assert switcher.active == tuple((second if done else first).items())
    mixture = {"same": second, "other": third, "restore": {}}[repair]
    switcher.restore() if repair == "restore" else switcher.switch(mixture)
    assert switcher.active == tuple(mixture.items())
    twin.switch(mixture)
    for name, live in weights.items():
        if mode == "exact":
            assert kit.bits(live) == kit.bits(twins[name])
        else:  # each way rounds once more than the other may
            assert (live.float() - twins[name].float()).abs().max() <= 2**-7 * live.float().abs().max()


def test_invalidate_reaches_every_launch(mixed):
    weights, bank = mixed
    switcher = make_switcher(weights, bank)
    switcher.switch("a1")
    merged = kit.snapshot(weights)
    for tensor in weights.values():
        tensor.zero_()
    switcher.invalidate()
    switcher.switch("a1")
    assert kit.snapshot(weights) == merged
