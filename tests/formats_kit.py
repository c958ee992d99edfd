"""What the tests of fusedmerge.formats share: a small model with adapters by PEFT, files written by hand, and deltas in float64."""

from __future__ import annotations

import json
import warnings

import peft
import torch
from safetensors.torch import save_file

SAFETENSORS, PICKLE, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(8, 8)  # square: an orientation that is wrong shows in the values only
        self.up = torch.nn.Linear(8, 12, bias=False)
        self.down = torch.nn.Linear(12, 8, bias=False)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(10, 8)
        self.layers = torch.nn.ModuleList([Block(), Block()])
        self.conv = torch.nn.Conv2d(2, 3, 3)


def with_adapter(model, name="default", seed=0, **config):
    """A PeftModel whose factors are all random and signed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], **config})
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key and f".{name}" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def save(model, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)


def peft_deltas(model, name="default"):
    """PEFT's own deltas in float64, by weight name."""
    model = model.double()
    return {
        key.removeprefix("base_model.model.") + ".weight": module.get_delta_weight(name)
        for key, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and (name in module.lora_A or name in module.lora_embedding_A)
    }


def deltas(adapter):
    found = {}
    for target, factors in adapter.targets.items():
        delta = factors.scaling * (factors.b.double() @ factors.a.double())
        found[target] = delta.t() if factors.transposed else delta
    return found


def assert_same_deltas(adapter, expected):
    got = deltas(adapter)
    assert got.keys() == expected.keys()
    for target, delta in expected.items():
        assert delta.abs().max() > 0
        torch.testing.assert_close(got[target], delta, rtol=1e-12, atol=1e-12, msg=lambda text, target=target: f"{target}: {text}")


def plain_config(**fields):
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], **fields}


def plain_tensors(**tensors):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator)
    return {"base_model.model.layer.q.lora_A.weight": a, "base_model.model.layer.q.lora_B.weight": b, **tensors}


def write(directory, config=None, tensors=None, name=SAFETENSORS):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(plain_config() if config is None else config))
    tensors = plain_tensors() if tensors is None else tensors
    if name == PICKLE:
        torch.save(tensors, directory / name)
    else:
        save_file(tensors, directory / name)
    return directory
