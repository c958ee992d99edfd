"""perf/accuracy: what turns text into tokens and runs into statements."""

from __future__ import annotations

import gzip
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusedmerge.commands.accuracy import accuracy_markdown, accuracy_pictures
from fusedmerge.commands.plot import render_results
from perf.accuracy import __main__ as experiment
from perf.accuracy import data as data_module
from perf.accuracy import report
from perf.accuracy.data import END, SPLITS, Data, Source, collect, roff_to_text, split_of
from perf.accuracy.methods import METHODS, SLACK, ablations, backbone, build, rank_of, trainable
from perf.accuracy.run import Batches, Job, evaluate, pretrain, run
from perf.accuracy.settings import DataSetting, Setting

TINY = Setting(
    DataSetting(("de", "python"), vocabulary=300, domain_bytes=4000, pretraining_bytes=4000, least_domains=2),
    device="cpu", hidden=32, intermediate=64, layers=4, heads=2, context=16, windows=4,
    pretraining_steps=2, pretraining_lr=1e-3, steps=2, r=16, seeds=2, learning_rates=(5e-3,), judged_windows=3,
)  # fmt: skip


def test_the_code_that_runs_depend_on_is_where_it_is_said_to_be() -> None:
    assert [len(experiment._digest([name])) for name in experiment.SOURCES] == [64] * len(experiment.SOURCES)


# ---------------------------------------------------------------------- statements


@pytest.mark.parametrize("freedom", sorted(report.T975))
def test_quantiles_are_students(freedom: int) -> None:
    """P(T <= t) by integrating the density."""
    t = report.T975[freedom]
    x = np.linspace(0, t, 200_001)
    density = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    below = 0.5 + float(np.trapezoid(density * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x))
    assert below == pytest.approx(0.975, abs=2e-5)


def test_interval_is_paired() -> None:
    found = report.interval([1.0, 2.0, 3.0], [1.5, 2.4, 3.6])
    assert found["mean"] == pytest.approx(-0.5)
    assert found["sd"] == pytest.approx(0.1)
    half = 4.303 * 0.1 / math.sqrt(3)
    assert found["interval"] == pytest.approx([-0.5 - half, -0.5 + half])


def test_the_gate_can_say_inconclusive() -> None:
    total = [3.0, 3.2, 3.1, 3.3]
    clear = report.gate([x - d for x, d in zip(total, (0.10, 0.12, 0.11, 0.10), strict=True)], total)
    assert clear["passed"]
    for differences in ((0.1, -0.1, 0.1, 0.02), (-0.1, -0.1, -0.1, -0.11), (0.02, 0.01, 0.001, 0.03)):
        noisy = report.gate([x - d for x, d in zip(total, differences, strict=True)], total)
        assert not noisy["passed"]
        assert noisy["text"] == report.INCONCLUSIVE


def test_criteria() -> None:
    """Margin 5 % of a gain of 2: 0.1."""
    rng = np.random.default_rng(0)
    base = 3 + 0.1 * rng.standard_normal(5)
    seeds = {"backbone": base + 2, "lora_equal_active": base, "lora_equal_total": base - 0.3, "random_table": base - 0.2}

    def judged(mola: float, noise: float = 0.005) -> dict[str, Any]:
        switch = base - 0.25 + noise * np.array([1, -1, 0, 1, -1])
        return report.conclude({name: list(v) for name, v in {**seeds, "lora_switch": switch, "mola": base - 0.25 + mola}.items()})

    assert {name: entry["holds"] for name, entry in judged(0.05).items()} == {
        "as_accurate": True, "router_learns": True, "better_than_lora_equal_active": True, "better_than_lora_equal_total": False,
    }  # fmt: skip
    assert judged(0.05)["as_accurate"]["margin"] == pytest.approx(0.1)
    assert not judged(0.12)["as_accurate"]["holds"]  # better by more than the margin: not "as accurate" either
    assert not judged(-0.12)["as_accurate"]["holds"]
    assert not judged(0.0, noise=0.2)["as_accurate"]["holds"]  # too wide to say
    assert not judged(0.0, noise=0.2)["router_learns"]["holds"]


def test_router_figures() -> None:
    own = np.eye(4).tolist()
    found = report.router_figures({"router": own})
    assert found["mutual_information_bits"] == pytest.approx(2.0)
    assert found["dead_experts"] == 0
    assert found["shares"] == own
    alike = report.router_figures({"a": [[0.5, 0.5, 0.0, 0.0]] * 4, "b": [[0.25] * 4] * 4})
    assert alike["mutual_information_bits"] == pytest.approx(0.0)
    assert alike["dead_experts"] == 2
    assert alike["experts"] == 8
    assert alike["load"] == {"a": [0.5, 0.5, 0.0, 0.0], "b": [0.25] * 4}


def results() -> dict[str, Any]:
    entry = {"seeds": [3.0, 3.1], "params": 10, "lr": 0.005, "r": 4}
    methods: dict[str, Any] = {name: {"title": method.title, **entry} for name, method in METHODS.items()}
    methods["lora_switch"] |= {"seeds": [2.9, 3.05], "cpu_seconds": [20.0, 22.0]}
    methods["lora_switch"]["routers"] = [report.router_figures({"router": [[0.9, 0.1], [0.2, 0.8]]})] * 2
    methods = {"backbone": {"title": "backbone", "seeds": [5.0, 5.1], "params": 0, "lr": None}, **methods}
    seeds = {name: entry["seeds"] for name, entry in methods.items()}
    return {
        "suite": "accuracy", "device": "cpu-2core", "driver": None, "versions": {"torch": "2"}, "git_commit": "0123456789abcdef",
        "date": "2026-01-02T03:04:05+00:00",
        "setting": {"text": "a setting", "domains": ["de", "c"]}, "notices": ["fr is left out"], "methods": methods,
        "gate": report.gate([2.0, 2.0], [3.0, 3.1]), "criteria": report.conclude(seeds),
    }  # fmt: skip


def test_report(tmp_path: Path) -> None:
    given = results()
    text = accuracy_markdown(given)
    assert "Notice: fr is left out." in text
    assert "| LoRA-Switch, token-wise | 2.9750 ± 0.1061 | 2.900 3.050 |  |" in text
    assert "| MixLoRA, per block | 3.0500 ± 0.0707 | 3.000 3.100 | +0.0750 ± 0.0354 |" in text
    assert text.count("**no**") == sum(not entry["holds"] for entry in given["criteria"].values()) > 0
    failed = {**given, "gate": report.gate([3.0, 3.2], [3.0, 3.1])}
    del failed["criteria"]
    assert report.INCONCLUSIVE in accuracy_markdown(failed)
    assert set(accuracy_pictures(given, tmp_path)) == {"seeds", "experts"}
    gate_only = {**failed, "methods": {name: given["methods"][name] for name in ("backbone", "oracle", "lora_equal_total")}}
    assert set(accuracy_pictures(gate_only, tmp_path)) == {"seeds"}


def test_plot_renders_the_experiment(tmp_path: Path) -> None:
    """`fusedmerge plot` writes its table and pictures, also into marked blocks of documents."""
    given = {**results(), "cases": []}
    (tmp_path / "results" / "cpu-2core").mkdir(parents=True)
    (tmp_path / "results" / "cpu-2core" / "accuracy.json").write_text(json.dumps(given))
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "accuracy.md"
    page.write_text("Before\n<!-- results: cpu-2core/accuracy -->\n<!-- /results -->\nAfter\n")
    readme = tmp_path / "README.md"
    readme.write_text('<!-- results: cpu-2core/accuracy, group "criteria" -->\n<!-- /results -->\n')
    written = render_results(tmp_path / "results", tmp_path / "docs", readme)
    assert {path.name for path in written} == {
        "cpu-2core-accuracy-seeds.png", "cpu-2core-accuracy-experts.png", "results.md", "accuracy.md", "README.md",
    }  # fmt: skip
    statements = accuracy_markdown(given, methods=False)
    assert statements in readme.read_text() and accuracy_markdown(given) not in readme.read_text()
    assert all(path.stat().st_size > 0 for path in written)
    assert accuracy_markdown(given) in page.read_text()
    assert accuracy_markdown(given) in (tmp_path / "docs" / "results.md").read_text()


RESULTS = sorted((Path(__file__).parents[1] / "perf" / "results").glob("*/accuracy*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_document_holds_the_committed_results(path: Path) -> None:
    """Table and statements follow from the seeds in the file."""
    found = json.loads(path.read_text())
    assert accuracy_markdown(found) in (Path(__file__).parents[1] / "docs" / "accuracy.md").read_text()
    seeds = {name: entry["seeds"] for name, entry in found["methods"].items()}
    if found.get("gate"):
        assert found["gate"] == report.gate(seeds["oracle"], seeds["lora_equal_total"])
    if found.get("criteria"):
        assert found["criteria"] == report.conclude(seeds)


# ---------------------------------------------------------------------- data


def test_roff_to_text() -> None:
    page = '.\\" comment\n.TH LS 1\n.SH "SEE ALSO"\n.TP\n\\fB\\-a\\fR, \\fI\\-\\-all\\fP\nText \\(bu and\\& more\n'
    assert roff_to_text(page) == "SEE ALSO\n-a, --all\nText   and more\n"


def test_splits_are_by_page_and_lines_are_dropped_once_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is in the same split in every language, and a line of an earlier domain is not in a later one."""
    for language in ("xx", "yy"):
        folder = tmp_path / "man" / language / "man1"
        folder.mkdir(parents=True)
        for number in range(60):
            own = f"line {number} of {language}, long enough"
            text = f"a line that every page repeats\n{own}\nshort\n"
            (folder / f"page{number}x.1.gz").write_bytes(gzip.compress(text.encode()))
        source = Source((), (str(tmp_path / "man" / language),), "man*/*.gz", manual=True)
        monkeypatch.setitem(data_module.SOURCES, language, source)
    seen: set[bytes] = set()
    found = {language: collect(language, tmp_path / "none", seen, dict.fromkeys(SPLITS, 10**6)) for language in ("xx", "yy")}
    pages = {language: {s: {d.split()[1] for d in found[language][s] if "of" in d} for s in SPLITS} for language in found}
    assert pages["yy"]["train"] and pages["yy"]["test"] and pages["yy"]["validation"]
    for split in SPLITS:
        assert pages["yy"][split] == {str(n) for n in range(60) if split_of(f"page{n}x.1") == split}
    everything = "".join("".join(found[language][split]) for language in found for split in SPLITS)
    assert everything.count("a line that every page repeats") == 1
    assert everything.count("short") == 120


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Random tokens in the form that `build` writes."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(1)
    names = ("english", "de", "python")
    for name in names:
        for split in SPLITS:
            np.save(folder / f"{name}-{split}.npy", rng.integers(0, 300, 200).astype(np.uint16))
    content = {
        "domains": ["de", "python"],
        "token_bytes": [0, *rng.integers(1, 5, 299).tolist()],
        "tokens": {name: dict.fromkeys(SPLITS, 200) for name in names},
        "notices": [],
    }
    (folder / "data.json").write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataSetting, "folder", property(lambda self: folder))
        yield folder


def test_build_writes_bytes_per_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every document's bytes are the sum of its tokens' bytes, whatever its script."""
    from tokenizers import Tokenizer

    texts = {"english": "plain words in a row", "de": "größer als früher", "python": "def f(x):\n    return 'ж' + x\n"}
    monkeypatch.setattr(data_module, "LEAST_BYTES", 0)
    monkeypatch.setattr(data_module, "unpack", lambda *arguments: None)
    monkeypatch.setattr(data_module, "collect", lambda domain, *rest: {split: [texts[domain]] for split in SPLITS})
    data_module.build(TINY.data, tmp_path)
    found, tokenizer = Data(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert found.domains == ["de", "python"]
    assert tokenizer.token_to_id(END) == 0
    for name, text in texts.items():
        ids = np.load(tmp_path / f"{name}-test.npy")
        assert ids[-1] == 0
        assert int(found.token_bytes[ids].sum()) == len(text.encode())
        assert tokenizer.decode(ids[:-1].tolist()) == text


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize("name", [*METHODS, *ablations(TINY)])
def test_sizes(name: str) -> None:
    """Every method but the smaller LoRA is within SLACK of lora_switch, routers included; a control has no router to train."""
    method = (METHODS | ablations(TINY))[name]
    state = backbone(TINY, 300).state_dict()
    sizes = {}
    for key, one in (("own", method), ("lora_switch", METHODS["lora_switch"])):
        sizes[key] = trainable(build(TINY, one, rank_of(TINY, one, 300), state, 2, 0))
    if (name in METHODS and name != "lora_equal_active") or method.rank == "matched":
        assert abs(sizes["own"] / sizes["lora_switch"] - 1) <= SLACK
    if method.table:
        assert sizes["own"] == sizes["lora_switch"] - TINY.num_experts * TINY.hidden
    if name == "lora_equal_active":
        assert sizes["own"] == pytest.approx((sizes["lora_switch"] - TINY.num_experts * TINY.hidden) * TINY.top_k / TINY.num_experts)


def test_a_run_is_repeatable_and_kept(tokens: Path, tmp_path: Path) -> None:
    pretrain(TINY, tmp_path)
    job = Job(TINY, str(tmp_path), "lora_switch", METHODS["lora_switch"], TINY.r, 5e-3, 1)
    first = run(job)
    assert set(first["routers"]) == {"router"}
    assert [sum(row) for row in first["routers"]["router"]] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert first["bits_per_byte"] == pytest.approx(statistics.fmean(first["per_domain"].values()))
    assert run(job)["cpu_seconds"] == first["cpu_seconds"]  # read, not run
    job.path.unlink()
    again = run(job)
    assert {k: v for k, v in again.items() if "seconds" not in k} == {k: v for k, v in first.items() if "seconds" not in k}


def test_a_rate_that_diverges_is_not_chosen(tokens: Path, tmp_path: Path) -> None:
    pretrain(TINY, tmp_path)
    found = run(Job(TINY, str(tmp_path), "lora", METHODS["lora_equal_active"], 4, 1e30, 0))
    assert found["validation"] is None
    assert "finite" in found["diverged"]


def test_methods_share_batches_and_windows(tokens: Path) -> None:
    """Seeds differ; validation and test differ; every domain comes equally often."""
    data = Data(TINY.data.folder)
    first, same, other = (next(iter(Batches(TINY, data, seed))) for seed in (3, 3, 4))
    assert torch.equal(first["input_ids"], same["input_ids"])
    assert not torch.equal(first["input_ids"], other["input_ids"])
    assert first["domain"].tolist() == [0, 1, 0, 1]
    model = backbone(TINY, 300)
    scores = [evaluate(TINY, data, model, seed, which)["bits_per_byte"] for seed, which in ((0, 1), (0, 2), (1, 2), (1, 2))]
    assert len(set(scores)) == 3
    assert scores[2] == scores[3]


def test_bits_per_byte_of_a_model_that_knows_nothing(tokens: Path) -> None:
    """Uniform over V tokens: log2(V) bits per token, over the bytes of the tokens that were predicted."""
    data = Data(TINY.data.folder)
    model = backbone(TINY, 300)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = evaluate(TINY, data, model, 0, 2)
    generator = np.random.default_rng([0, 2])
    for name in data.domains:
        windows = data.windows(name, "test", TINY.judged_windows, TINY.context, generator)
        expected = math.log2(300) * windows[:, 1:].size / data.token_bytes[windows[:, 1:]].sum()
        assert found["per_domain"][name] == pytest.approx(expected, rel=1e-5)


def test_controls_route_as_their_tables_say() -> None:
    """Oracle: disjoint first experts by domain, wherever the token. Random table: the token alone, the same on every call of a seed."""
    state = backbone(TINY, 300).state_dict()
    ids = torch.tensor([[5, 7, 5], [7, 7, 5]])
    domain = torch.tensor([0, 1])
    oracle = build(TINY, METHODS["oracle"], TINY.r, state, 2, 0).given(ids, domain)[0]
    assert oracle.ids[0].tolist() == [[0, 1]] * 3
    assert oracle.ids[1].tolist() == [[1, 2]] * 3
    table = build(TINY, METHODS["random_table"], TINY.r, state, 2, 0)
    chosen = table.given(ids, domain)[0].ids
    assert torch.equal(chosen[0, 0], chosen[1, 2])
    assert torch.equal(chosen[0, 1], chosen[1, 0])
    assert (chosen[..., 0] != chosen[..., 1]).all()
    others = [build(TINY, METHODS["random_table"], TINY.r, state, 2, seed) for seed in (0, 1)]
    assert torch.equal(others[0].ids, table.ids)
    assert not torch.equal(others[1].ids, table.ids)


def test_controls_change_the_output(tokens: Path) -> None:
    """The oracle's experts are used: another domain, another output, once B is not zero."""
    model = build(TINY, METHODS["oracle"], TINY.r, backbone(TINY, 300).state_dict(), 2, 0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
        ids = torch.arange(12)[None]
        first, second = (model(ids, torch.tensor([d])).logits for d in (0, 1))
    assert float((first - second).abs().max()) > 1e-2
