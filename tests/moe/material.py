"""Tiny models and their adapted forms, shared by the tests of fusedmerge.moe."""

import warnings

import numpy as np
import torch
from torch import nn

import fusedmerge as fm
from tests.moe import reference

VOCABULARY = 40
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}


def tiny(family="Llama", dtype=torch.float32, **sizes):
    """A randomly initialised model whose logits are of the order of 1, always the same one."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**(SIZES | sizes))
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(1)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):  # ones and zeros would hide a missing factor or term
                nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    return model.to(dtype).eval()


def tokens(batch=2, length=5, seed=0):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def config(method="lora_switch", **fields):
    """Random experts and a router that separates tokens."""
    small = {"num_experts": 4, "r": 3, "lora_alpha": 4.5, "init_lora_weights": False, "router_init_std": 1.0, "lora_dropout": 0.0}
    return fm.moe.LoRAMoEConfig(method=method, **(small | fields))


def adapted(method="lora_switch", family="Llama", dtype=torch.float32, seed=3, **fields):
    model = fm.moe.inject(tiny(family, dtype), config(method, **fields), seed)
    return model.to(dtype)


def float64(tensor):
    return tensor.detach().double().numpy()


def backbone(model):
    """The NumPy twin of a model from `tiny`."""
    c = model.config
    weights = {name: float64(tensor) for name, tensor in model.state_dict().items()}
    theta = c.rope_parameters["rope_theta"]
    return reference.Llama(weights, c.num_attention_heads, c.num_key_value_heads, c.num_hidden_layers, c.rms_norm_eps, theta)


def twin(model):
    """The NumPy twin of an adapted model's method: the formula is the reference's, the factors are the model's."""
    made = fm.moe.structure(model)
    c = made.config
    experts = {name: tuple(map(float64, (part.lora_A, part.lora_B, part.scaling))) for name, part in made.parts.items()}
    if c.method == "xlora":
        classifier = made.routers["router"]
        layers = [(float64(layer.weight), float64(layer.bias)) for layer in classifier.layers]
        options = classifier.options
        return reference.XLoRA(experts, layers, c.top_k, options.temperature, options.layerwise)
    routers = {name: float64(router.weight) for name, router in made.routers.items()}
    kinds = {
        "lora_switch": reference.Switch,
        "mola": reference.PerLinear,
        "moral": reference.PerLayer,
        "pesc": reference.PESC,
        "mixlora": reference.MixLoRA,
        "loramoe": reference.Dense,
        "molora": reference.Dense if c.top_k is None else reference.PerLinear,
        "lora": reference.Static,
    }
    return kinds[c.method](experts, routers, c.top_k, c.gating)


def truth(base, model, ids):
    """The reference's logits [B, T, V] for `model`, which was made of a model like `base`."""
    plain, method = backbone(base), twin(model)
    return np.stack([plain.logits(row, method) for row in ids.numpy()])


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
