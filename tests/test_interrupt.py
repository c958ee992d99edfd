"""A switch that is interrupted anywhere leaves a state that is known, reported, and repaired by the next call."""

import pytest
import torch

import fusedmerge as fm
from fusedmerge import backend, errors
from fusedmerge.backend import cpu, native
from tests import kit

SHAPES = [(9, 31), (400, 1000), (17, 5)]  # the second has two blocks of rows
BLOCKS = 4
MERGE_ROWS = cpu.merge_rows


@pytest.fixture
def interrupted(monkeypatch):
    """The torch engine; interrupted(block, after): the block-th merge raises KeyboardInterrupt, before or after its write."""
    monkeypatch.setattr(backend, "extension", lambda: None)

    def arm(at: int, after: bool, error: type[BaseException] = KeyboardInterrupt) -> None:
        count = -1

        def merge_rows(*args):
            nonlocal count
            count += 1
            if count == at and not after:
                raise error
            MERGE_ROWS(*args)
            if count == at:
                raise error

        monkeypatch.setattr(cpu, "merge_rows", merge_rows)

    return arm


def test_the_shapes_make_the_blocks_that_are_interrupted():
    assert sum(len(cpu.row_blocks(*shape)) for shape in SHAPES) == BLOCKS


@pytest.mark.parametrize("mode", ["exact", "inplace"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(BLOCKS))
@pytest.mark.parametrize("repair", ["same", "other", "restore"])
def test_interruption_is_repaired(interrupted, monkeypatch, mode, after, at, repair):
    first, second, third = {"a0": 0.7, "a2": 0.3}, {"a1": 1.0, "a2": -0.2}, {"a3": 0.5}
    weights, undisturbed = kit.make_weights(SHAPES), kit.make_weights(SHAPES)
    bank = kit.make_bank(weights)
    before = kit.snapshot(weights)
    switcher, twin = fm.Switcher(weights, bank, mode), fm.Switcher(undisturbed, bank, mode)
    switcher.switch(first)
    twin.switch(first)
    interrupted(at, after)
    with pytest.raises(KeyboardInterrupt):
        switcher.switch(second)
    monkeypatch.setattr(cpu, "merge_rows", MERGE_ROWS)
    assert "interrupted" in repr(switcher)
    for call in (lambda: switcher.active, switcher.check, switcher.refresh):
        with pytest.raises(errors.StateError, match="interrupted"):
            call()
    for name in ("a0", "a1"):  # parts of the weights may still hold the first mixture, or already the second
        with pytest.raises(errors.StateError, match="restore its Switcher first"):
            bank.remove(name)
    with pytest.raises(errors.StateError, match="no other Switcher"):
        fm.Switcher(weights, bank)
    mixture = {"same": second, "other": third, "restore": {}}[repair]
    switcher.restore() if repair == "restore" else switcher.switch(mixture)
    assert switcher.active == tuple(mixture.items())
    twin.switch(mixture)
    if mode == "exact":
        assert kit.snapshot(weights) == kit.snapshot(undisturbed)
        assert repair != "restore" or kit.snapshot(weights) == before
    else:  # as right as an undisturbed inplace switch, whose every step rounds once
        for name in weights:
            gap = (weights[name].float() - undisturbed[name].float()).abs().max()
            assert gap <= 2**-7 * undisturbed[name].float().abs().max()
    assert bank.pinned(switcher) == {bank.slot(name) for name in mixture}


def test_an_exception_is_repaired_as_an_interrupt_is(interrupted, monkeypatch):
    weights = kit.make_weights(SHAPES)
    before = kit.snapshot(weights)
    switcher = fm.Switcher(weights, kit.make_bank(weights))
    interrupted(1, False, MemoryError)
    with pytest.raises(MemoryError):
        switcher.switch("a0")
    monkeypatch.setattr(cpu, "merge_rows", MERGE_ROWS)
    switcher.restore()
    assert kit.snapshot(weights) == before and switcher.active == ()


def test_interrupted_repairs_are_repaired(interrupted, monkeypatch):
    weights, undisturbed = kit.make_weights(SHAPES), kit.make_weights(SHAPES)
    bank = kit.make_bank(weights)
    switcher = fm.Switcher(weights, bank, "inplace")
    for at, name in ((2, "a0"), (1, "a1"), (0, "a2"), (1, "a3")):
        interrupted(at, True)
        with pytest.raises(KeyboardInterrupt):
            switcher.switch(name)
        monkeypatch.setattr(cpu, "merge_rows", MERGE_ROWS)
    switcher.switch({"a1": 0.5})
    fm.Switcher(undisturbed, bank).switch({"a1": 0.5})
    for name in weights:
        assert torch.allclose(weights[name].float(), undisturbed[name].float(), atol=2e-3, rtol=2**-6)


class _Interrupting:
    """The extension, with a KeyboardInterrupt before or after its one call."""

    def __init__(self, after: bool) -> None:
        self.after = after
        self.whole = native.extension().merge_cpu

    def merge_cpu(self, *args, **kwargs):
        if self.after:
            self.whole(*args, **kwargs)
        raise KeyboardInterrupt


@pytest.mark.parametrize("mode", ["exact", "inplace"])
@pytest.mark.parametrize("after", [False, True])
def test_the_compiled_kernel_is_never_half_way(monkeypatch, mode, after):
    weights, undisturbed = kit.make_weights(SHAPES), kit.make_weights(SHAPES)
    bank = kit.make_bank(weights)
    switcher, twin = fm.Switcher(weights, bank, mode), fm.Switcher(undisturbed, bank, mode)
    assert isinstance(switcher._engine, native.NativeSwitch)
    switcher.switch("a0")
    twin.switch("a0")
    versions = {name: tensor._version for name, tensor in weights.items()}
    interrupting = _Interrupting(after)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(native, "extension", lambda: interrupting)
        switcher.switch({"a1": 0.5})
    held = {"a1": 0.5} if after else {"a0": 1.0}
    assert switcher.active == tuple(held.items())
    twin.switch(held)
    assert kit.snapshot(weights) == kit.snapshot(undisturbed)
    assert all((tensor._version > versions[name]) == after for name, tensor in weights.items())
    with pytest.raises(errors.StateError, match="restore its Switcher first"):
        bank.remove(next(iter(held)))
    switcher.restore()
    twin.restore()
    assert kit.snapshot(weights) == kit.snapshot(undisturbed) and switcher.active == ()
