"""The accuracy experiment: `python -m perf.accuracy --setting cpu` from the repository's root (docs/accuracy.md).

Writes perf/results/<device>/accuracy.json. Every finished run is kept in build/accuracy, so that an interrupted experiment goes on.
The gate's two methods run first. Without headroom for routing the experiment stops there, says so in the file, and looks at no method.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fusedmerge.commands.accuracy import accuracy_markdown, accuracy_pictures
from perf.accuracy import report
from perf.accuracy.data import Data, build
from perf.accuracy.methods import BACKBONE, GATE, METHODS, Method, ablations, rank_of
from perf.accuracy.run import Job, backbone_alone, one_thread, pretrain, run
from perf.accuracy.settings import BUILD, SETTINGS, Setting, key_of
from perf.evidence import begin, head, write_content

ROOT = Path(__file__).resolve().parents[2]
# A change in any of these begins anew: runs of different code are never mixed.
SOURCES = ["perf/accuracy/data.py", "perf/accuracy/methods.py", "perf/accuracy/run.py", "fusedmerge/ops", "fusedmerge/moe"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.accuracy", description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument("--ablations", action="store_true", help="variants of lora_switch, 3 seeds, into accuracy_ablations.json")
    parser.add_argument("--results", type=Path, default=ROOT / "perf" / "results")
    arguments = parser.parse_args()
    setting = SETTINGS[arguments.setting]
    if arguments.ablations:
        setting = replace(setting, seeds=min(3, setting.seeds))
    if (setting.device == "cuda") != torch.cuda.is_available():  # the file goes to the device's folder
        parser.error(f"--setting {arguments.setting} is for {setting.device} (CUDA_VISIBLE_DEVICES= hides a GPU)")
    began = begin()
    if not (setting.data.folder / "data.json").is_file():
        build(setting.data, setting.data.folder)
    data = Data(setting.data.folder)
    # The number of seeds is no part of the key: more of them add to what is there.
    folder = BUILD / f"runs-{key_of(asdict(replace(setting, seeds=0)), data.domains, _digest(SOURCES))}"
    folder.mkdir(parents=True, exist_ok=True)
    pretrain(setting, folder)

    suite = "accuracy" + arguments.setting.removeprefix("cpu").removeprefix("gpu") + ("_ablations" if arguments.ablations else "")
    results: dict[str, Any] = {**head(suite, began), "notices": data.notices, "cases": [], "methods": {}}
    results["setting"] = {"text": setting.text(len(data.domains)), "domains": data.domains, "tokens": data.sizes, **asdict(setting)}
    with ProcessPoolExecutor(setting.processes, get_context("spawn"), one_thread) as pool:
        if arguments.ablations:
            results["methods"] = judge(pool, setting, folder, ablations(setting), len(data.token_bytes))
        else:
            results["methods"] = {BACKBONE: _backbone(setting, folder)}
            results["methods"] |= judge(pool, setting, folder, {name: METHODS[name] for name in GATE}, len(data.token_bytes))
            results["gate"] = report.gate(results["methods"]["oracle"]["seeds"], results["methods"]["lora_equal_total"]["seeds"])
            print(f"gate: {results['gate']['text']}", file=sys.stderr)
            if results["gate"]["passed"] or setting.despite_gate:
                results["methods"] |= judge(pool, setting, folder, METHODS, len(data.token_bytes))
                results["criteria"] = report.conclude({name: entry["seeds"] for name, entry in results["methods"].items()})
    order = [name for name in (BACKBONE, *METHODS, *ablations(setting)) if name in results["methods"]]
    results["methods"] = {name: results["methods"][name] for name in order}
    print(accuracy_markdown(results))
    path = write_content(results, folder if setting.despite_gate else arguments.results)
    pictures = accuracy_pictures(results, folder)
    print("wrote", path, *pictures.values(), file=sys.stderr)
    return 0


def judge(
    pool: ProcessPoolExecutor, setting: Setting, folder: Path, methods: Mapping[str, Method], vocabulary: int
) -> dict[str, dict[str, Any]]:
    """Every method's entry for the results file. The first seed is run with each learning rate, and the best on its validation windows is
    kept for all seeds."""
    ranks = {name: rank_of(setting, method, vocabulary) for name, method in methods.items()}

    def job(name: str, lr: float, seed: int) -> Job:
        return Job(setting, str(folder), name, methods[name], ranks[name], lr, seed)

    searched = _all(pool, [job(name, lr, 0) for name in methods for lr in setting.learning_rates], "learning rates")
    validation = {name: {lr: searched[job(name, lr, 0).path]["validation"] for lr in setting.learning_rates} for name in methods}
    best = {name: min((lr for lr in tried if tried[lr] is not None), key=tried.__getitem__) for name, tried in validation.items()}
    _all(pool, [job(name, best[name], seed) for name in methods for seed in range(1, setting.seeds)], "seeds")
    found = {}
    for name, method in methods.items():
        runs = [run(job(name, best[name], seed)) for seed in range(setting.seeds)]
        found[name] = {
            "title": method.title,
            "seeds": [one["bits_per_byte"] for one in runs],
            "params": runs[0]["params"],
            "lr": best[name],
            "r": ranks[name],
            "config": dict(method.config),
            "validation": {f"{lr:g}": value for lr, value in validation[name].items()},
            "per_domain": {domain: [one["per_domain"][domain] for one in runs] for domain in runs[0]["per_domain"]},
            "routers": [report.router_figures(one["routers"]) if "routers" in one else None for one in runs],
            "seconds": [round(one["seconds"], 1) for one in runs],
            "cpu_seconds": [round(one["cpu_seconds"], 1) for one in runs],
        }
    return found


def _all(pool: ProcessPoolExecutor, jobs: Iterable[Job], title: str) -> dict[Path, dict[str, Any]]:
    jobs = list(jobs)
    return {job.path: found for job, found in zip(jobs, tqdm(pool.map(run, jobs), total=len(jobs), desc=title, unit="run"), strict=True)}


def _backbone(setting: Setting, folder: Path) -> dict[str, Any]:
    runs = [backbone_alone(setting, folder, seed) for seed in range(setting.seeds)]
    per_domain = {domain: [one["per_domain"][domain] for one in runs] for domain in runs[0]["per_domain"]}
    return {"title": "backbone", "seeds": [one["bits_per_byte"] for one in runs], "params": 0, "lr": None, "per_domain": per_domain}


def _digest(names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
