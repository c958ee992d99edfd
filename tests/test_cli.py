"""The command: exit status and messages of each subcommand, doctor on broken installs and inspect."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fusedmerge
from fusedmerge import cli
from fusedmerge.commands.inspect import inspect_adapter
from tests import kit

ROOT = Path(fusedmerge.__file__).parent.parent


def run(*arguments, path=(), env=None, cwd=None):
    """`python -m fusedmerge` in a process of its own, with directories placed first on its path."""
    places = os.pathsep.join([*map(str, path), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "fusedmerge", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": places, **(env or {})}, capture_output=True, text=True, cwd=cwd, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """base/ (a small Llama), adapters/plain (float32, rank 4 and 8 by pattern), adapters/dora."""
    from peft import LoraConfig, get_peft_model

    from fusedmerge.commands.demo_setup import ModelSize, build_llama, write_adapters

    root = tmp_path_factory.mktemp("made")
    base = build_llama(ModelSize(hidden=32, intermediate=48, layers=2, heads=2, vocab=64))
    base.save_pretrained(str(root / "base"))
    plain = {"r": 4, "lora_alpha": 8, "rank_pattern": {"v_proj": 8}, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    write_adapters(base, root / "adapters", {"plain": plain}, delta=0.1)
    dora = get_peft_model(base, LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]))
    dora.save_pretrained(str(root / "adapters" / "dora"))
    return root


# ---------------------------------------------------------------------- usage


def test_help_is_quick_and_needs_no_torch():
    script = "import sys; from fusedmerge.cli import main\ntry: main(['--help'])\nexcept SystemExit as e: assert e.code == 0\n"
    script += "heavy = {'torch', 'transformers', 'peft', 'cupy', 'matplotlib', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("merge", "demo", "inspect", "doctor", "bench", "plot"):
        assert command in done.stdout


@pytest.mark.parametrize("arguments", [[], ["swap"], ["merge"], ["merge", "--base", "x"], ["inspect"], ["demo", "--switches", "0"]])
def test_wrong_usage_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: fusedmerge" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"fusedmerge {fusedmerge.__version__}\n"


def test_an_error_is_one_line_and_exit_1(tmp_path):
    done = run("inspect", tmp_path / "nowhere")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("fusedmerge: ")
    assert done.stderr.count("\n") == 1
    assert "nowhere" in done.stderr


def test_interrupt_exits_130(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fusedmerge.commands.doctor.diagnose", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "fusedmerge: interrupted\n"


@pytest.mark.parametrize("name", ["peft", "matplotlib.figure"])
def test_a_missing_extra_is_named(name, monkeypatch, capsys):
    def missing(*_):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("fusedmerge.commands.doctor.diagnose", missing)
    assert cli.main(["doctor"]) == 1
    assert "pip install 'fusedmerge[demo]'" in capsys.readouterr().err


def test_a_missing_module_of_our_own_is_not_hidden(monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'fusedmerge.x'", name="fusedmerge.x")

    monkeypatch.setattr("fusedmerge.commands.doctor.diagnose", missing)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["doctor"])


# ---------------------------------------------------------------------- merge


def test_merge_passes_everything_on(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("fusedmerge.checkpoint.merge_checkpoint", lambda *args, **kwargs: calls.append((args, kwargs)))
    words = "merge --base b --adapter x:0.5 C:/y --adapter z:-1e-1 --out o --dtype float16 --device cpu --overwrite --quiet"
    assert cli.main(words.split()) == 0
    adapters = [("x", 0.5), ("C:/y", 1.0), ("z", -0.1)]
    options = {"dtype": "float16", "device": "cpu", "overwrite": True, "progress": False}
    assert calls == [(("b", adapters, "o"), options)]
    assert capsys.readouterr().out == "merged 3 adapters into o\n"


def test_merge_for_real(made, tmp_path):
    out, adapter = tmp_path / "merged", made / "adapters" / "plain"
    assert cli.main(["merge", "--base", str(made / "base"), "--adapter", f"{adapter}:0.5", "--out", str(out), "--quiet"]) == 0
    before, after = load_file(made / "base" / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj", "down_proj"}
    assert len(changed) == 6


def test_merge_refuses_an_existing_output(made, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    arguments = ["merge", "--base", str(made / "base"), "--adapter", str(made / "adapters" / "plain"), "--out", str(tmp_path), "--quiet"]
    assert cli.main(arguments) == 1
    assert "overwrite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# ---------------------------------------------------------------------- inspect


def test_inspect_against_a_base_equals_a_plain_computation(made):
    found = inspect_adapter(made / "adapters" / "plain", made / "base")
    base = load_file(made / "base" / "model.safetensors")
    factors = load_file(made / "adapters" / "plain" / "adapter_model.safetensors")
    groups = {group.name: group for group in found.groups}
    assert set(groups) == {"q_proj", "v_proj", "down_proj"}
    for name, group in groups.items():
        rank = 8 if name == "v_proj" else 4
        assert (group.num_targets, group.ranks, group.scalings) == (2, [rank], [8 / rank])
        square, norm, lost, count = 0.0, 0.0, 0, 0
        for key in [key for key in base if f".{name}." in key]:
            stem = f"base_model.model.{key.removesuffix('.weight')}"
            delta = 8 / rank * factors[f"{stem}.lora_B.weight"].double() @ factors[f"{stem}.lora_A.weight"].double()
            merged = (base[key].double() + delta).to(torch.bfloat16)
            lost += int(((merged == base[key]) & (delta != 0)).sum())
            square += float(delta.square().sum())
            norm += float(base[key].double().square().sum())
            count += delta.numel()
        assert group.delta_norm == pytest.approx(square**0.5, rel=1e-5)
        assert group.ratio == pytest.approx((square / norm) ** 0.5, rel=1e-5)
        assert group.num_elements == count
        assert abs(group.num_lost - lost) <= 2  # float32 against float64
        assert 0 < group.lost < 0.1
    assert found.rounding == "bfloat16"
    assert found.total.num_elements == sum(group.num_elements for group in found.groups)


def test_inspect_counts_what_rounding_takes(made, tmp_path):
    """A delta of a quarter ulp everywhere is lost everywhere, one of an ulp nowhere, and no delta is no loss."""
    adapter = tmp_path / "tiny"
    adapter.mkdir()
    config = json.loads((made / "adapters" / "plain" / "adapter_config.json").read_text())
    config |= {"r": 1, "lora_alpha": 1, "rank_pattern": {}, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file({"layer.q_proj.weight": torch.ones(3, 4, dtype=torch.bfloat16)}, base / "model.safetensors", metadata={"format": "pt"})
    b = torch.tensor([[2.0**-9], [2.0**-7], [0.0]])
    factors = {"base_model.model.layer.q_proj.lora_A.weight": torch.ones(1, 4), "base_model.model.layer.q_proj.lora_B.weight": b}
    save_file(factors, adapter / "adapter_model.safetensors")
    group = inspect_adapter(adapter, base).groups[0]
    assert (group.num_lost, group.num_elements) == (4, 12)


def test_inspect_text_and_json(made, capsys):
    directory, base = str(made / "adapters" / "plain"), str(made / "base")
    assert cli.main(["inspect", directory]) == 0
    text = capsys.readouterr().out
    assert 'adapter "plain"' in text
    assert "|W|" not in text
    assert cli.main(["inspect", directory, "--base", base]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^all +6 +4-8 +1-2 ", text, re.MULTILINE)
    assert "|delta|/|W|" in text
    assert cli.main(["inspect", directory, "--base", base, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"]["num_targets"] == 6
    assert 0.08 < found["total"]["delta_over_base"] < 0.12


def test_inspect_says_why_an_adapter_is_refused(made, capsys):
    directory = str(made / "adapters" / "dora")
    assert cli.main(["inspect", directory]) == 1
    assert "use_dora" in capsys.readouterr().err
    assert cli.main(["inspect", directory, "--json"]) == 1
    assert "use_dora" in json.loads(capsys.readouterr().out)["refused"]


def test_inspect_against_another_base(made, tmp_path, capsys):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file({"other.weight": torch.ones(2, 2)}, base / "model.safetensors", metadata={"format": "pt"})
    assert cli.main(["inspect", str(made / "adapters" / "plain"), "--base", str(base)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("fusedmerge: inspect: ")
    assert "q_proj" in message
    assert cli.main(["inspect", str(made / "adapters" / "plain"), "--base", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("fusedmerge: inspect: base: ")


def test_inspect_misses_what_the_base_shows_to_be_missing(made, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    shutil.copytree(made / "adapters" / "plain", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = [*config["target_modules"], "lm_head"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert cli.main(["inspect", str(adapter)]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", str(adapter), "--base", str(made / "base")]) == 1
    assert "target_modules: expected factors for the entry 'lm_head'" in capsys.readouterr().err


# ---------------------------------------------------------------------- doctor


def test_doctor_text(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", text, re.MULTILINE)
    assert re.search(r"^backend cpu +usable: ", text, re.MULTILINE)


@pytest.mark.parametrize(
    "failure",
    kit.fast_first(
        [
            "raise OSError('libcudart.so.13: cannot open shared object file')",
            "raise RuntimeError('no\\nluck')",
            "import sys; sys.exit('gone')",
            "x =",
        ]
    ),
)
def test_doctor_with_broken_torch_and_cupy(failure, tmp_path):
    for name in ("torch", "cupy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(failure)
    done = run("doctor", "--json", path=[tmp_path])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name in ("torch", "cupy"):
        assert "error" in found["packages"][name]
    assert found["fusedmerge"]["version"] == fusedmerge.__version__
    assert found["packages"]["numpy"]["version"]
    if "OSError" in failure:
        text = run("doctor", path=[tmp_path])
        assert text.returncode == 0
        assert re.search(r"^torch +BROKEN .*OSError: libcudart.so.13", text.stdout, re.MULTILINE)
        assert re.search(r"^backend cpu +unusable: .*libcudart", text.stdout, re.MULTILINE)


def test_doctor_finds_tools_and_the_environment(tmp_path, monkeypatch):
    from fusedmerge.commands.doctor import diagnose, render

    for name, body in {
        "nvcc": "echo 'nvcc: NVIDIA'; echo 'Cuda compilation tools, release 13.0, V13.0.88'",
        "nvidia-smi": "echo 'NVIDIA H200, 580.65.06, 143771 MiB, 9.0'",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FUSEDMERGE_CACHE_DIR", str(tmp_path / "cache"))
    found = diagnose()
    assert found["compiler"] == {"nvcc": str(tmp_path / "nvcc"), "version": "13.0, V13.0.88"}
    gpu = {"name": "NVIDIA H200", "driver_version": "580.65.06", "memory.total": "143771 MiB", "compute_cap": "9.0"}
    assert found["gpu"]["gpus"] == [gpu]
    assert found["cache"] == {"path": str(tmp_path / "cache"), "exists": False, "writable": True}
    assert found["environment"]["FUSEDMERGE_CACHE_DIR"] == str(tmp_path / "cache")
    assert "NVIDIA H200, driver_version 580.65.06" in render(found)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'Failed to initialize NVML'; exit 9\n")
    assert "Failed to initialize NVML" in render(diagnose())
