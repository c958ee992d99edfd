"""AdapterBank: stacking, padding, casting, capacity, files, and every way to be refused."""

import pytest
import torch
from torch import nn

import fusedmerge as fm
from fusedmerge import errors, memory
from fusedmerge.formats.lora import Adapter, Factors
from tests import kit


def _factors(r, rows, cols, scaling=1.0, dtype=torch.float32, **kwargs):
    return Factors(torch.randn(r, cols, dtype=dtype), torch.randn(rows, r, dtype=dtype), scaling, **kwargs)


def test_ranks_differ_per_adapter_and_target_and_are_padded_with_zeros():
    weights = {"q": torch.zeros(6, 5), "v": torch.zeros(3, 5)}
    one = Adapter("one", {"q": _factors(3, 6, 5, 2.0)})
    two = Adapter("two", {"q": _factors(17, 6, 5, 0.5), "v": _factors(1, 3, 5)})
    bank = fm.AdapterBank.from_adapters([one, two], weights)
    assert bank.names == ("one", "two") and len(bank) == 2 and bank.targets == ("q", "v")
    q, v = bank.target("q"), bank.target("v")
    assert q.a.shape == (2, 32, 5) and q.b.shape == (2, 6, 32) and q.ranks == [3, 17]
    assert v.a.shape == (2, 16, 5) and v.ranks == [0, 1]
    assert torch.equal(q.a[0, :3], one.targets["q"].a) and not q.a[0, 3:].any() and not q.b[0, :, 3:].any()
    assert not v.a[0].any() and not v.b[0].any()
    assert q.scaling.tolist() == [2.0, 0.5] and q.scaling.dtype == torch.float32
    assert bank.nbytes == 4 * (2 * 32 * 11 + 2 * 16 * 8 + 2 * 2 + 2 * 2)


def test_factors_take_the_weight_s_dtype_and_the_loss_is_told():
    weights = {"q": torch.zeros(64, 48, dtype=torch.bfloat16), "v": torch.zeros(8, 48, dtype=torch.float32)}
    adapter = Adapter("one", {"q": _factors(4, 64, 48), "v": _factors(4, 8, 48)})
    bank = fm.AdapterBank.from_adapters([adapter], weights)
    assert bank.target("q").a.dtype == torch.bfloat16 and bank.target("v").a.dtype == torch.float32
    assert 2e-4 < bank.cast_error["one"] < 4e-3  # bfloat16 keeps 8 bits: about 2^-9 relative, root mean square 1.6e-3
    wide = fm.AdapterBank.from_adapters([adapter], weights, dtype=torch.float32)
    assert wide.target("q").a.dtype == torch.float32 and wide.cast_error == {"one": 0.0}


def test_conv1d_and_embeddings_are_stored_as_the_weight_is():
    """delta of a [in, out] weight is the transpose: s A^T B^T."""
    factors = _factors(2, 6, 5, 3.0, transposed=True)
    bank = fm.AdapterBank.from_adapters([Adapter("one", {"w": factors})], {"w": torch.zeros(5, 6)})
    target = bank.target("w")
    assert torch.allclose(target.b[0] @ target.a[0] * 3, (factors.b @ factors.a * 3).t(), atol=1e-6)


@pytest.mark.parametrize(("module", "flag", "flipped"), [(None, True, True), (None, False, False), (nn.Linear(4, 4), True, False)])
def test_a_square_weight_is_read_as_its_module_says_or_else_as_the_file_says(module, flag, flipped):
    factors = _factors(2, 4, 4, transposed=flag)
    weights = {"weight": torch.zeros(4, 4)} if module is None else module
    target = fm.AdapterBank.from_adapters([Adapter("one", {"weight": factors})], weights).target("weight")
    delta = factors.b @ factors.a
    assert torch.allclose(target.b[0] @ target.a[0], delta.t() if flipped else delta, atol=1e-6)


def test_from_tensors():
    a, b = torch.randn(3, 5, 7), torch.randn(3, 9, 5)
    bank = fm.AdapterBank.from_tensors({"base_model.model.w": (a, b)}, torch.tensor([1.0, 2.0, 3.0]), ["x", "y", "z"])
    assert bank.names == ("x", "y", "z") and bank.targets == ("w",)
    assert torch.equal(bank.target("w").b[:, :, :5], b) and bank.target("w").scaling.tolist() == [1, 2, 3]
    by_target = fm.AdapterBank.from_tensors({"w": (a, b)}, {"w": [4, 5, 6]})
    assert by_target.names == ("0", "1", "2") and by_target.target("w").scaling.tolist() == [4, 5, 6]
    a.zero_()
    assert bank.target("w").a.any()  # a copy


A, B = torch.ones(2, 3, 5), torch.ones(2, 4, 3)


@pytest.mark.parametrize(
    ("tensors", "scaling", "names", "error", "message"),
    [
        ({}, 1.0, None, errors.InvalidValueError, "an empty bank"),
        ({"w": (A[:0], B[:0])}, 1.0, None, errors.InvalidValueError, "an empty bank"),
        ([(A, B)], 1.0, None, errors.InvalidTypeError, "weight name: "),
        ({"w": A}, 1.0, None, errors.InvalidTypeError, "a pair of tensors"),
        ({"w": (A, B[:1])}, 1.0, None, errors.ShapeError, r"a \[2, 3, 5\] and b \[1, 4, 3\]"),
        ({"w": (A, B[:, :, :2])}, 1.0, None, errors.ShapeError, r"b \[2, 4, 2\]"),
        ({"w": (A[0], B[0])}, 1.0, None, errors.ShapeError, r"a \[N, r, in\]"),
        ({"w": (A, B), "v": (A[:1], B[:1])}, 1.0, None, errors.ShapeError, "2 adapters, as the other targets have"),
        ({"w": (A, B.half())}, 1.0, None, errors.DtypeError, "float16"),
        ({"w": (A.int(), B.int())}, 1.0, None, errors.DtypeError, "int32"),
        ({"w": (A.to("meta"), B.to("meta"))}, 1.0, None, errors.DeviceError, "with storage"),
        ({"w": (A * float("nan"), B)}, 1.0, None, errors.FormatError, "a: expected factors that are finite"),
        ({"w": (A, B * float("inf"))}, 1.0, None, errors.FormatError, "b: expected factors that are finite"),
        ({"w": (A, B)}, [1.0, float("nan")], None, errors.FormatError, "scaling: expected a finite"),
        ({"w": (A, B)}, 1e39, None, errors.FormatError, "scaling: expected a finite float32"),
        ({"w": (A, B)}, [1.0], None, errors.ShapeError, r"expected \[2\], got \[1\]"),
        ({"w": (A, B)}, "one", None, errors.InvalidTypeError, "scaling of w"),
        ({"w": (A, B)}, {"v": [1, 1]}, None, errors.UnknownNameError, "an entry for w"),
        ({"w": (A, B)}, 10**400, None, errors.FormatError, "scaling: expected a finite float32"),
        ({"w": (A.to_sparse(), B)}, 1.0, None, errors.ShapeError, "dense tensors"),
        ({"w": (A, B)}, torch.ones(2, device="meta"), None, errors.DeviceError, "scaling of w"),
        ({5: (A, B)}, 1.0, None, errors.InvalidTypeError, "weight names"),
        ({"w": (A[:0], B[:0]), "v": (A, B)}, 1.0, None, errors.ShapeError, "0 adapters"),
        ({"w": (A, B)}, 1.0, "xy", errors.InvalidTypeError, "a sequence of str"),
        ({"w": (A, B)}, 1.0, ["x"], errors.InvalidValueError, "2 names"),
        ({"w": (A, B)}, 1.0, ["x", "x"], errors.InvalidValueError, '"x" 2 times'),
        ({"w": (A, B)}, 1.0, ["x", 3], errors.InvalidTypeError, "non-empty strings"),
        ({"w": (A, B), "module.w": (A, B)}, 1.0, None, errors.InvalidValueError, "each target once"),
    ],
)
def test_from_tensors_refuses(tensors, scaling, names, error, message):
    with pytest.raises(error, match=message):
        fm.AdapterBank.from_tensors(tensors, scaling, names)


def test_from_tensors_for_weights_stored_as_in_out():
    """a [N, r, in] and b [N, out, r] are the adapter's own; the model says how its weight is stored."""
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "square": nn.Embedding(4, 4), "linear": nn.Linear(9, 4)})
    stacks = {"embed.weight": (A[..., :1].expand(2, 3, 9), B), "square.weight": (torch.randn(2, 3, 4), torch.randn(2, 4, 3))}
    bank = fm.AdapterBank.from_tensors(stacks, 0.5, weights=model)
    a, b = stacks["square.weight"]
    target = bank.target("square.weight")
    assert torch.allclose(target.b[1] @ target.a[1], (b[1] @ a[1]).t(), atol=1e-6)
    assert bank.target("embed.weight").spec.shape == (9, 4)
    fm.Switcher(model, bank).switch("0")
    with pytest.raises(errors.ShapeError, match=r"stored as \[in, out\] \(build the bank with this model"):
        fm.Switcher(model, fm.AdapterBank.from_tensors({"square.weight": (a, b)}, 0.5))
    with pytest.raises(errors.UnknownNameError, match="no nobody"):
        fm.AdapterBank.from_tensors({"nobody": (A, B)}, 1.0, weights=model)


def test_a_bank_made_under_inference_mode_can_be_used_outside_it():
    weights = kit.make_weights([(6, 5)])
    with torch.inference_mode():
        bank = kit.make_bank(weights)
        switcher = fm.Switcher(weights, bank)
    switcher.switch("a0")
    switcher.restore()
    switcher.refresh()
    bank.remove("a0")
    assert bank.names == ("a1", "a2", "a3")


def test_bad_arguments_of_builders():
    weights = {"w": torch.zeros(4, 5), "cube": torch.zeros(2, 2, 2)}
    one = Adapter("one", {"w": _factors(2, 4, 5)})
    for device in ("cuda:99", "nonsense", "meta"):
        with pytest.raises(errors.DeviceError, match="device"):
            fm.AdapterBank.from_adapters([one], weights, device=device)
    for options in ({"capacity": True}, {"capacity": "3"}, {"max_rank": -1}, {"max_rank": "3"}):
        with pytest.raises(errors.InvalidValueError, match="a whole number"):
            fm.AdapterBank.from_adapters([one], weights, **options)
    with pytest.raises(errors.ShapeError, match="a matrix"):
        fm.AdapterBank.random(weights, 1, 2, targets="cube")
    with pytest.raises(errors.InvalidValueError, match="whole numbers"):
        fm.AdapterBank.random(weights, "1", 2)
    with pytest.raises(errors.UnknownNameError, match="targets"):
        fm.AdapterBank.from_adapters([one], weights).target(5)
    with pytest.raises(errors.MissingFileError, match="a file in a directory"):
        fm.AdapterBank.from_adapters([one], weights).save("/nonexistent/bank.safetensors")


def test_from_adapters_refuses():
    weights = {"w": torch.zeros(4, 5), "f8": torch.zeros(4, 5, dtype=torch.float8_e4m3fn), "bias": torch.zeros(5)}
    with pytest.raises(errors.UnknownNameError, match="no a, b, c, d, e and 1 more"):
        fm.AdapterBank.from_adapters([Adapter("one", {n: _factors(1, 4, 5) for n in "abcdef"})], weights)
    with pytest.raises(errors.ShapeError, match=r'"one" on w: expected delta B A of shape \[4, 5\], got \[6, 5\] \(rank 2\)'):
        fm.AdapterBank.from_adapters([Adapter("one", {"w": _factors(2, 6, 5)})], weights)
    with pytest.raises(errors.DtypeError, match="unquantised"):
        fm.AdapterBank.from_adapters([Adapter("one", {"f8": _factors(2, 4, 5)})], weights)
    with pytest.raises(errors.ShapeError, match="a matrix"):
        fm.AdapterBank.from_adapters([Adapter("one", {"bias": _factors(2, 4, 5)})], weights)
    with pytest.raises(errors.DtypeError, match="int8"):
        fm.AdapterBank.from_adapters([Adapter("one", {"w": _factors(2, 4, 5)})], weights, dtype=torch.int8)
    with pytest.raises(errors.InvalidValueError, match="capacity"):
        fm.AdapterBank.from_adapters([Adapter("one", {"w": _factors(2, 4, 5)})], weights, capacity=0)
    with pytest.raises(errors.InvalidTypeError, match="a list of directories"):
        fm.AdapterBank.from_peft("one/directory", weights)
    with pytest.raises(errors.InvalidValueError, match="an empty bank"):
        fm.AdapterBank.from_peft([], weights)


def test_factors_that_overflow_when_narrowed_are_refused():
    big = Factors(torch.full((1, 5), 1e5), torch.ones(4, 1), 1.0)
    with pytest.raises(errors.FormatError, match=r"finite in torch.float16"):
        fm.AdapterBank.from_adapters([Adapter("one", {"w": big})], {"w": torch.zeros(4, 5, dtype=torch.float16)})


def test_base_weights_in_a_file_must_equal_the_model_s_bits():
    weights = {"w": torch.zeros(4, 5), "embed": torch.randn(3, 2)}
    same = Adapter("one", {"w": _factors(2, 4, 5)}, base_weights={"embed": weights["embed"].clone()})
    fm.AdapterBank.from_adapters([same], weights)
    for carried in (weights["embed"] + 1e-7, weights["embed"].bfloat16(), weights["embed"][:2]):
        other = Adapter("one", {"w": _factors(2, 4, 5)}, base_weights={"embed": carried})
        with pytest.raises(errors.FormatError, match="changes the base"):
            fm.AdapterBank.from_adapters([other], weights)
    with pytest.raises(errors.FormatError, match="none of that name"):
        fm.AdapterBank.from_adapters([Adapter("one", {"w": _factors(2, 4, 5)}, base_weights={"x": torch.ones(1)})], weights)


def test_a_listed_target_module_without_factors_is_refused_if_the_model_has_it():
    weights = {"l.0.q.weight": torch.zeros(4, 5), "l.0.v.weight": torch.zeros(4, 5)}
    factors = {"l.0.q.weight": _factors(2, 4, 5)}
    fm.AdapterBank.from_adapters([Adapter("one", factors, {"target_modules": ["q", "no_such_module"]})], weights)
    fm.AdapterBank.from_adapters([Adapter("one", factors, {"target_modules": ["q", "v"], "exclude_modules": ["v"]})], weights)
    with pytest.raises(errors.FormatError, match="target_modules: expected factors for the entry 'v', got none"):
        fm.AdapterBank.from_adapters([Adapter("one", factors, {"target_modules": ["q", "v"]})], weights)


def test_memory_is_estimated_before_anything_is_allocated(monkeypatch):
    weights = kit.make_weights([(64, 32)])
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    with pytest.raises(errors.BankMemoryError, match=r"bank of 1 x 1 targets: expected at most 0 MiB available on cpu"):
        fm.AdapterBank.random(weights, 1, 4)
    monkeypatch.undo()
    bank = fm.AdapterBank.random(weights, 1, 4)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    with pytest.raises(errors.BankMemoryError, match="pristine copy"):
        fm.Switcher(weights, bank)


def test_available_memory_is_read():
    assert memory.available_bytes(torch.device("cpu")) > 2**20


def _pointers(bank):
    return [t.data_ptr() for target in map(bank.target, bank.targets) for t in (target.a, target.b, target.scaling)]


def test_adapters_come_and_go_and_nothing_moves():
    weights = kit.make_weights([(6, 5), (3, 5)], torch.float32)
    one = Adapter("one", {"w0": _factors(3, 6, 5), "w1": _factors(3, 3, 5)})
    bank = fm.AdapterBank.from_adapters([one], weights, capacity=2, max_rank=20)
    pointers = _pointers(bank)
    a, b = torch.randn(20, 5), torch.randn(6, 20)
    assert bank.add("two", {"w0": (a, b)}, 0.25) == 1
    assert bank.names == ("one", "two") and bank.target("w0").ranks == [3, 20] and bank.target("w1").ranks == [3, 0]
    assert torch.equal(bank.target("w0").a[1, :20], a) and bank.target("w0").scaling[1] == 0.25
    bank.remove("one")
    assert bank.names == ("two",) and bank.slots == (None, "two") and bank.slot("two") == 1
    assert not bank.target("w0").a[0].any() and not bank.target("w0").b[0].any()
    assert bank.add("three", Adapter("x", {"w1": _factors(2, 3, 5)})) == 0
    assert bank.names == ("three", "two")
    assert _pointers(bank) == pointers


def test_add_and_remove_refuse_and_change_nothing():
    weights = kit.make_weights([(6, 5)], torch.float32)
    bank = fm.AdapterBank.from_adapters([Adapter("one", {"w0": _factors(3, 6, 5)})], weights, capacity=2)
    state = [kit.bits(bank.target("w0").a), bank.slots, list(bank.target("w0").ranks)]
    good = (torch.ones(2, 5), torch.ones(6, 2))
    for name, source, scaling, error, message in [
        ("one", {"w0": good}, 1.0, errors.InvalidValueError, "new, non-empty name"),
        ("", {"w0": good}, 1.0, errors.InvalidValueError, "new, non-empty name"),
        ("two", {"w9": good}, 1.0, errors.UnknownNameError, "one of the bank's 1 targets"),
        ("two", {"w0": (torch.ones(17, 5), torch.ones(6, 17))}, 1.0, errors.ShapeError, "rank at most 16"),
        ("two", {"w0": (torch.ones(2, 4), torch.ones(6, 2))}, 1.0, errors.ShapeError, "delta B A"),
        ("two", {"w0": (good[0] * float("nan"), good[1])}, 1.0, errors.FormatError, "finite"),
        ("two", {"w0": good}, None, errors.InvalidTypeError, "scaling"),
        ("two", {"w0": good[0]}, 1.0, errors.InvalidTypeError, r"weight name: \(a"),
        ("two", {"w0": (1, 2)}, 1.0, errors.InvalidTypeError, "not empty"),
        ("two", {}, 1.0, errors.InvalidTypeError, "not empty"),
        ("two", Adapter("x", {"w0": _factors(1, 6, 5)}, base_weights={"w0": weights["w0"]}), None, errors.FormatError, "from_peft"),
    ]:
        with pytest.raises(error, match=message):
            bank.add(name, source, scaling)
        assert state == [kit.bits(bank.target("w0").a), bank.slots, list(bank.target("w0").ranks)]
    bank.add("two", {"w0": good}, 1.0)
    with pytest.raises(errors.InvalidValueError, match="a full bank"):
        bank.add("three", {"w0": good}, 1.0)
    with pytest.raises(errors.UnknownNameError, match=r'got "on" \(did you mean "one"\?\)'):
        bank.remove("on")


def test_an_active_adapter_cannot_be_removed():
    weights = kit.make_weights([(6, 5)])
    bank = kit.make_bank(weights)
    switcher = fm.Switcher(weights, bank)
    switcher.switch({"a0": 1.0})
    with pytest.raises(errors.StateError, match="restore its Switcher first"):
        bank.remove("a0")
    bank.remove("a1")
    switcher.restore()
    bank.remove("a0")
    assert bank.names == ("a2", "a3")


def test_save_and_load_give_the_same_bits(tmp_path):
    weights = kit.make_weights([(6, 5), (7, 9)])
    bank = kit.make_bank(weights)
    bank.remove("a1")
    bank.save(tmp_path / "bank.safetensors")
    again = fm.AdapterBank.load(tmp_path / "bank.safetensors")
    assert again.slots == bank.slots and again.targets == bank.targets and again.cast_error == bank.cast_error
    for name in bank.targets:
        old, new = bank.target(name), again.target(name)
        assert old.spec == new.spec and old.ranks == new.ranks
        assert [kit.bits(t) for t in (old.a, old.b, old.scaling)] == [kit.bits(t) for t in (new.a, new.b, new.scaling)]
    assert [p.name for p in tmp_path.iterdir()] == ["bank.safetensors"]
    again.add("a4", {"w0": (torch.ones(1, 5), torch.ones(6, 1))}, 1.0)


def test_loading_a_damaged_bank_is_refused(tmp_path):
    path = tmp_path / "bank.safetensors"
    with pytest.raises(errors.MissingFileError, match="a bank file"):
        fm.AdapterBank.load(path)
    kit.make_bank(kit.make_weights([(6, 5)])).save(path)
    whole = path.read_bytes()
    for changed in (b'"a0", "a0", "a2"', b'"a0", "a1", "a2"'):
        path.write_bytes(whole.replace(b'\\"a0\\", \\"a1\\", \\"a2\\"', changed.replace(b'"', b'\\"')))
        if changed.count(b"a0") == 1:
            fm.AdapterBank.load(path)
            continue
        with pytest.raises(errors.FormatError, match="slots"):
            fm.AdapterBank.load(path)
    for damaged in (whole[: len(whole) // 2], b"not a bank", b""):
        path.write_bytes(damaged)
        with pytest.raises(errors.FormatError, match="load"):
            fm.AdapterBank.load(path)
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(errors.FormatError, match=r"format fusedmerge.bank.v1"):
        fm.AdapterBank.load(path)


def test_random_bank_has_the_asked_size_of_delta():
    weights = {"w": torch.randn(300, 200) * 0.02}
    bank = fm.AdapterBank.random(weights, 2, 8, delta=0.07)
    target = bank.target("w")
    ratios = [((target.b[i] @ target.a[i]).norm() / weights["w"].norm()).item() for i in range(2)]
    assert all(0.05 < ratio < 0.09 for ratio in ratios) and bank.target("w").ranks == [8, 8]
    again = fm.AdapterBank.random(weights, 2, 8, delta=0.07)
    assert torch.equal(again.target("w").a, target.a)
    with pytest.raises(errors.UnknownNameError, match="weights that the model has"):
        fm.AdapterBank.random(weights, 1, 2, targets=["x"])
    with pytest.raises(errors.InvalidValueError, match="at least 1"):
        fm.AdapterBank.random(weights, 0, 2)
