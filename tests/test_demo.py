"""The demo at a reduced size: what it claims is asserted, on adapters that PEFT wrote."""

from __future__ import annotations

import itertools
import json
import warnings

import pytest
import torch

from fusedmerge.commands import demo, demo_checks
from fusedmerge.commands.demo_report import render
from fusedmerge.commands.demo_setup import ModelSize, PeftSwitch, build_llama, clone, peft_load, weights_of
from fusedmerge.errors import FusedMergeError
from fusedmerge.moe.config import METHODS

pytestmark = pytest.mark.slow

CONFIG = demo.DemoConfig(model=ModelSize(hidden=64, intermediate=96, layers=1, heads=2, vocab=64), switches=25, tokens=6)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def report(out):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return demo.run(out, CONFIG, progress=False)


def rows(report):
    return {(row["method"], row["truth"]): row for row in report["accuracy"]["rows"]}


def test_adapters_are_varied_and_of_the_stated_size(report, out):
    from fusedmerge.commands.inspect import inspect_adapter

    found = report["model"]["adapters"]
    assert len(found) >= 4
    assert len({tuple(entry["ranks"]) for entry in found.values()}) >= 4
    assert len({entry["targets"] for entry in found.values()}) >= 2
    configs = [json.loads((out / "adapters" / name / "adapter_config.json").read_text()) for name in found]
    assert any(config["use_rslora"] for config in configs)
    assert any(config["rank_pattern"] for config in configs)
    for name in found:
        for group in inspect_adapter(out / "adapters" / name, out / "base").groups:
            assert 0.05 < group.ratio < 0.09


def test_exact_never_drifts_and_the_others_do(report):
    methods = report["drift"]["methods"]
    assert [value for _, value in methods["exact"]["drift"]] == [0.0] * len(demo.milestones(25))
    assert methods["exact"]["changed"] == 0.0
    assert methods["exact"]["restored_bitwise"]
    assert report["drift"]["merged_bitwise_as_first"]
    for name in ("peft", "inplace"):
        values = dict(methods[name]["drift"])
        assert values[25] > values[1] > 0.0
        assert not methods[name]["restored_bitwise"]
    assert all(entry["pointers_stable"] for entry in methods.values())
    assert all(len(entry["samples_ms"]) == 25 and entry["median_ms"] > 0 for entry in methods.values())


def test_the_switch_is_within_its_bound_and_peft_misrounds(report):
    found = rows(report)
    for method, truth in (("Switcher, float32 bank", "files"), ("fusedmerge merge (files)", "files"), ("Switcher, bfloat16 bank", "bank")):
        row = found[method, truth]
        assert row["of_bound"] <= 1.0
        assert row["misrounded"] <= 0.001
        assert row["of_rounding"] < 1.0001
    peft = found["PEFT merge_adapter", "files"]
    assert peft["misrounded"] > 0.1
    assert peft["of_bound"] > 1.0
    backbone = found["(the backbone, nothing merged)", "files"]
    assert 0 < found["Switcher, float32 bank", "files"]["logits"] <= peft["logits"] < backbone["logits"]
    assert report["accuracy"]["files_as_switcher"]


def test_a_live_merged_model_is_saved_and_loaded(report):
    saved = report["checkpoint"]
    assert saved["loaded_equals_live"]
    assert saved["restored_bitwise"]


def test_every_method_decodes(report):
    found = report["decode"]
    rows = {(row["engine"], row["method"], row["strategy"]): row for row in found["rows"]}
    assert {row["strategy"] for row in found["rows"]} == {"backbone", "unfused", "merged-simple", "merged", "fused"}
    assert {row["method"] for row in found["rows"]} >= set(METHODS)
    for engine in ("decoder", "transformers"):
        backbone = rows[engine, "(no experts)", "backbone"]
        assert rows[engine, "lora_switch", "merged"]["launches"] == backbone["launches"] + 1 + found["router_launches"]
        for row in (row for row in found["rows"] if row["engine"] == engine):
            assert len(row["samples_ms"]) == 6
            assert row["median_ms"] > 0
            assert 0 < row["mean_error"] < 2 * backbone["mean_error"]
            assert row["restored_bitwise"]
            in_groups = (engine, row["strategy"]) == ("decoder", "fused") and row["method"] != "mixlora"  # norms, SiLU and sums included
            assert row["launches"] < backbone["launches"] if in_groups else row["launches"] >= backbone["launches"]
    copied = report["model"]["adapted"] * 2  # bytes of the pristine copy
    merged, fused = rows["decoder", "lora_switch", "merged"], rows["decoder", "lora_switch", "fused"]
    assert merged["peak_bytes"] > fused["peak_bytes"] + copied / 2
    assert rows["decoder", "(no experts)", "backbone"]["over_backbone"] == 0


def test_files_and_text(report, out):
    for name in ("drift.png", "decode.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "demo.json").read_text())["drift"]["switches"] == 25
    text = render(report)
    assert "NO " not in text
    assert text.count("yes  ") == 8
    for name in demo.ADAPTERS:
        assert name in text


def test_a_failed_check_is_shown(report):
    changed = json.loads(json.dumps(report))
    changed["drift"]["methods"]["exact"]["restored_bitwise"] = False
    changed["decode"]["router_launches"] += 1
    changed["decode"]["rows"][3]["max_error"] = 1.0
    text = render(changed)
    assert "NO   exact: restore()" in text
    assert "NO   decoding: merged adds 1 launch" in text
    assert "NO   decoding: every method's error" in text


def test_errors_of_known_weights():
    exact = torch.tensor([[1.0, 1.0 + 2.0**-9, -2.0, 0.5]], dtype=torch.float64).numpy()
    truth = {"w": demo_checks.Truth(exact, exact * 0 + 2.0**-7)}
    right = torch.tensor([[1.0, 1.0, -2.0, 0.5]], dtype=torch.bfloat16)
    found = demo_checks.weight_errors({"w": right}, truth)
    assert found == {"misrounded": 0.0, "of_bound": 0.25, "of_rounding": 1.0}
    wrong = torch.tensor([[1.0, 1.0 + 2.0**-7, -2.0, 0.5]], dtype=torch.bfloat16)
    found = demo_checks.weight_errors({"w": wrong}, truth)
    assert found == {"misrounded": 0.25, "of_bound": 0.75, "of_rounding": 3.0}


def test_same_bits_tells_signed_zeros_and_dtypes_apart():
    zero = torch.zeros(2, 2)
    assert demo_checks.same_bits({"w": zero}, {"w": zero.clone()})
    assert not demo_checks.same_bits({"w": zero}, {"w": -zero})
    assert not demo_checks.same_bits({"w": zero}, {"w": zero.int()})
    assert not demo_checks.same_bits({"w": zero}, {})


def test_peft_switch_sets_the_mixture_it_is_given(report, out):
    """Its second mixture must equal its first one on fresh weights: gates are set, and the old mixture is out."""
    base = build_llama(CONFIG.model).float()
    paths = {name: out / "adapters" / name for name in demo.ADAPTERS}
    merged = []
    for earlier in ([], [{"code": 0.9, "legal": -0.4}]):
        model = peft_load(base, paths)
        switch = PeftSwitch(model)
        for mixture in [*earlier, dict(CONFIG.shown)]:
            switch.switch(mixture)
        merged.append(clone(weights_of(model, ["model.layers.0.self_attn.q_proj.weight"])))
    assert demo.distance(merged[1], merged[0]) < 1e-6
    switch.restore()
    assert demo.distance(weights_of(model, list(merged[0])), weights_of(base, list(merged[0]))) < 1e-6


def test_schedule_and_milestones():
    plan = demo.schedule(["a", "b", "c"], 50, seed=3)
    assert plan == demo.schedule(["a", "b", "c"], 50, seed=3)
    assert all(len(mixture) == 2 and sum(mixture.values()) == pytest.approx(1.0) for mixture in plan)
    assert all(left != right for left, right in itertools.pairwise(plan))
    assert demo.milestones(1000) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert demo.milestones(25) == [1, 2, 5, 10, 20, 25]
    assert demo.milestones(1) == [1]


def test_out_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("kept")
    with pytest.raises(FusedMergeError, match="demo: --out: expected a directory"):
        demo.run(path, CONFIG, progress=False)
    assert path.read_text() == "kept"


def test_threads_are_as_before(report):
    before = torch.get_num_threads()
    with demo._threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
