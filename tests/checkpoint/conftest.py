"""Checkpoints and adapters that the tests of the offline merge share."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoint.material import (
    EVERYTHING,
    build,
    peft_adapters,
    save,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save(build("llama"), tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A bfloat16 Llama in several shards, with a tokenizer's files beside it."""
    return save(build("llama", torch.bfloat16), tmp_path_factory.mktemp("sharded") / "base", max_shard_size="20KB")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters of PEFT's own making, with rslora, a rank pattern and partial targets."""
    configs = {
        "math": {"r": 8, "lora_alpha": 12, "target_modules": EVERYTHING, "rank_pattern": {"down_proj": 3}},
        "code": {"r": 5, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "o_proj"]},
    }
    return peft_adapters(build("llama"), tmp_path_factory.mktemp("adapters"), configs)


@pytest.fixture
def mixture(adapters):
    return [(adapters["math"], 0.7), (adapters["code"], -0.4)]
