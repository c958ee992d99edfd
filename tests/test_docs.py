"""README and docs: every Python block runs as written, every link leads somewhere, every name of the package exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

import fusedmerge as fm

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(str(page.relative_to(ROOT)) for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SMALLER = {'device="cuda", ': "", "input_ids, 200": "input_ids, 4", "model.generate(...)": "model.generate(input_ids, max_new_tokens=2)",
           "steps=1000": "steps=2", "warmup_steps=50": "warmup_steps=1"}  # fmt: skip


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_names(page: str) -> None:
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in link or (ROOT / page).parent.joinpath(link).exists(), link
    for name in re.findall(r"`(?:fm|fusedmerge)\.([a-z_]+(?:\.\w+)*)\b", text):
        found: object = fm
        for part in name.split("."):
            if part != "py":
                found = getattr(found, part, None) or importlib.import_module(f"{found.__name__}.{part}")


def tiny() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    """Blocks of a page follow each other, but for the model: each has one of its own, injected where the block does not do that."""
    from peft import LoraConfig, get_peft_model

    monkeypatch.chdir(tmp_path)
    for place in ("base", "path/to/base"):
        tiny().bfloat16().save_pretrained(place)
    for name in ("math", "code"):
        config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(tiny(), config).save_pretrained(f"adapters/{name}")
    tokens = torch.randint(0, 64, (1, 6))
    names = {
        "fm": fm, "input_ids": tokens, "labels": tokens, "loader": [{"input_ids": tokens, "labels": tokens}], "directory": "experts",
        "dir_a": "adapters/math", "dir_b": "adapters/code", "x": torch.randn(3, 32), "weight": torch.randn(16, 32),
        "bias": torch.randn(16), "a": torch.randn(8, 4, 32), "b": torch.randn(8, 16, 4), "scaling": torch.ones(8),
        "router_weight": torch.randn(8, 32), "ids": [1, 2], "gates": [0.5, 0.25],
    }  # fmt: skip
    for block in blocks(page):
        for small in SMALLER.items():
            block = block.replace(*small)  # noqa: PLW2901
        alternatives = block.splitlines() if "fm.moe.compose" in block else [block]
        for code in alternatives:
            model = tiny()
            if "structure(model)" in code:
                fm.moe.inject(model, fm.moe.LoRAMoEConfig(num_experts=4))
            names |= {"model": model, "plain_model": tiny(), "transformers_model": tiny()}
            exec(compile(code, page, "exec"), names)
