"""Small checkpoints and adapters, and comparisons, for the tests of the offline merge."""

from __future__ import annotations

import json

import numpy as np
import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from fusedmerge import reference
from fusedmerge.checkpoint import merge
from fusedmerge.formats.peft import read_peft
from tests.kit import CORRECT_SHARE, bits

Q0 = "model.layers.0.self_attn.q_proj.weight"
SIZES = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 96, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(kind, dtype=torch.float32, **config):
    torch.manual_seed(0)
    model = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **config)),
        "headless": lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZES, **config)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, **config)),
        "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=3, **config)),
        "llava": lambda: transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                text_config=transformers.LlamaConfig(**SIZES),
                vision_config=transformers.CLIPVisionConfig(
                    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
                ),
            )
        ),
    }[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # norms and biases, too, are then told apart
    return model.to(dtype).eval()


def save(model, directory, **kwargs):
    model.save_pretrained(directory, **kwargs)
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def write_adapter(directory, shapes, r=4, alpha=6, seed=0, scale=0.1, extra=None, dtype=torch.float32, **config):
    """A PEFT directory by hand: {module: (out, in)}; signed factors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(extra or {})
    for module, (rows, cols) in shapes.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = (torch.randn(r, cols, generator=generator) * scale).to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = (torch.randn(rows, r, generator=generator) * scale).to(dtype)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in shapes})
    fields = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": targets, **config}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


def q0_adapter(directory, prefix="model.", **kwargs):
    return write_adapter(directory, {f"{prefix}layers.0.self_attn.q_proj": (48, 48)}, **kwargs)


def peft_adapters(model, directory, configs):
    """Adapters by PEFT itself, both factors random: {name: directory}."""
    names = list(configs)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**configs[names[0]]), adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, peft.LoraConfig(**configs[name]))
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    wrapped.save_pretrained(directory)
    return {name: directory / name for name in names}


def peft_merged(kind_directory, auto, paths, gates):
    """PEFT's own merge, in float32."""
    model = auto.from_pretrained(kind_directory, dtype=torch.float32)
    first, *others = paths
    model = peft.PeftModel.from_pretrained(model, paths[first], adapter_name=first)
    for name in others:
        model.load_adapter(paths[name], adapter_name=name)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for name, gate in gates.items():
                module.set_scale(name, gate)
    return model.merge_and_unload(adapter_names=list(gates)).eval()


def tensors_of(directory):
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def partial_of(out):
    return out.with_name(f".{out.name}.partial")


def assert_tensors(base, out, adapters, disk_name=lambda target: target, dtype=None):
    """Every adapted tensor is the mixture's truth rounded once; every other one has the base's bits."""
    before, after = tensors_of(base), tensors_of(out)
    assert before.keys() == after.keys()
    experts = {}
    for directory, gate in adapters:
        for target, factors in read_peft(directory).targets.items():
            name = disk_name(target)
            stored = factors.oriented(tuple(before[name].shape), None, "test", name)
            a, b = reference.to_float64(stored.a), reference.to_float64(stored.b)
            experts.setdefault(name, []).append(reference.Member(a, b, stored.scaling, gate))
    for name, tensor in after.items():
        if name not in experts:
            wanted = before[name] if dtype is None or not tensor.is_floating_point() else before[name].to(dtype)
            assert tensor.dtype == wanted.dtype and bits(tensor) == bits(wanted), name
            continue
        assert tensor.dtype == (dtype or before[name].dtype)
        kind = str(tensor.dtype).removeprefix("torch.")
        base64, got = reference.to_float64(before[name]), reference.to_float64(tensor)
        truth = reference.merged(base64, experts[name])
        assert np.abs(truth - base64).max() > 1e-4
        assert np.all(np.abs(got - truth) <= reference.error_bound(base64, experts[name], kind)), name
        correct = np.mean(got == reference.round_to(truth, kind))
        assert correct >= CORRECT_SHARE[tensor.dtype], (name, correct)
    return experts


def ids(vocab=96):
    return torch.randint(0, vocab, (2, 12), generator=torch.Generator().manual_seed(3))


def assert_same_logits(out, expected, auto=transformers.AutoModelForCausalLM):
    model = auto.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        got, wanted = model(ids()).logits, expected(ids()).logits
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


def written(monkeypatch):
    """The shards that a merge writes from now on."""
    names = []
    work = merge._write_shard

    def noting(header, layouts, jobs, path, *rest):
        names.append(path.name)
        work(header, layouts, jobs, path, *rest)

    monkeypatch.setattr(merge, "_write_shard", noting)
    return names


def shard_names(directory):
    return sorted(path.name for path in directory.glob("*.safetensors"))
