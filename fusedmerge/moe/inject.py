"""inject: adapt a model's linears in place. eject: take that back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fusedmerge.errors import InvalidTypeError, StateError
from fusedmerge.moe.blocks import MixLoRABlock, PESCBlock
from fusedmerge.moe.config import LoRAMoEConfig
from fusedmerge.moe.layers import MoELinear
from fusedmerge.moe.routing import Router, TableRouter
from fusedmerge.moe.structure import Structure, find, injected
from fusedmerge.moe.targets import Plan, Site, make_plan, token_embedding
from fusedmerge.moe.xlora import XLoRAClassifier, XLoRAOptions, hidden_size_of
from fusedmerge.weights import canonical_name

__all__ = ["eject", "inject"]


def inject(model: nn.Module, config: LoRAMoEConfig, seed: int = 0) -> nn.Module:
    """Adapt `model` in place, and return it: its own parameters are frozen, and each chosen linear becomes a MoELinear (docs/moe.md).

    model: any nn.Module with nn.Linear inside. A transformers model is run on one token, up to the first adapted linear, to see which
    that is; of any other model the first forward tells. seed: of all new parameters; the global generators are left alone.

    Raises InvalidTypeError, InvalidValueError (targets that match nothing), StateError (adapted already), DtypeError (quantised weights),
    DeviceError (meta). A call that raises has changed nothing.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InvalidTypeError("inject", "seed", "an int", repr(seed))
    if isinstance(model, nn.Module) and find(model) is not None:
        raise StateError("inject", "model", "a model without adapters (eject it first)", "one that inject has adapted")
    plan = make_plan(model, config, "inject")
    made = Structure(model, config)
    made.places.update(_find_places(model, plan, config))
    generator = torch.Generator().manual_seed(seed)
    parts = _build(made, plan, generator)
    shared = _shared_routers(made, plan, generator)
    return _install(model, made, parts, shared)


def eject(model: nn.Module) -> nn.Module:
    """Give the model back as it was before `inject`: its own linears, and which of its parameters wanted gradients. Raises StateError."""
    injected(model, "eject").detach()
    return model


def _group(site: Site, config: LoRAMoEConfig) -> str:
    """The name of the shared router that serves a site; "": none."""
    if site.static or config.traits.place not in ("model", "layer"):
        return ""
    if config.method == "xlora" and XLoRAOptions.of(config, "inject").layerwise:
        return site.name.removesuffix(".weight")
    return "router" if config.traits.place == "model" or not site.layer else site.layer


def _router(config: LoRAMoEConfig, num_experts: int, in_features: int | None, seed: int, device: torch.device) -> Router:
    assert config.gating is not None
    return Router(num_experts, in_features, config.top_k, config.gating, config.router_init_std, seed, device)


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (1,), generator=generator, device="cpu"))


def _build(made: Structure, plan: Plan, generator: torch.Generator) -> dict[str, nn.Module]:
    """What stands for each adapted module, by its path: linears first, then the MLPs around them."""
    config = made.config
    parts: dict[str, nn.Module] = {}
    for site in plan.sites:
        name = site.name.removesuffix(".weight")
        own = None
        if config.traits.place == "linear" and not site.static:
            own = _router(config, site.num_experts, site.linear.in_features, _draw_seed(generator), site.linear.weight.device)
        shared = _group(site, config) or (canonical_name(site.block) if site.block else None)
        parts[site.path] = made._experts[name] = MoELinear(made, name, site.linear, site.num_experts, own, shared, generator)
    for block in plan.blocks:
        name = canonical_name(block.path)
        router = _router(config, block.num_experts, block.in_features, _draw_seed(generator), block.device)
        if config.method == "pesc":
            parts[block.path] = made._experts[name] = PESCBlock(made, block, name, router, generator)
        else:
            parts[block.path] = made._blocks[name] = MixLoRABlock(made, name, block.module, router)
    return parts


def _shared_routers(made: Structure, plan: Plan, generator: torch.Generator) -> dict[str, nn.Module]:
    config, groups = made.config, dict.fromkeys(_group(site, made.config) for site in plan.sites)
    if config.method == "xlora":
        names = [site.name.removesuffix(".weight") for site in plan.sites]
        return {
            "router": XLoRAClassifier(config, names, hidden_size_of(made.model, "inject"), generator, plan.sites[0].linear.weight.device)
        }
    if config.router != "learned":
        return {"router": _random_table(made, generator)}
    routers: dict[str, nn.Module] = {}
    for name in groups:
        members = [site for site in plan.sites if name and _group(site, config) == name]
        place = made.places.get(name)
        at = next((site for site in members if site.name.removesuffix(".weight") == place), members[0] if members else None)
        if at is not None:
            known = place is not None or len({site.linear.in_features for site in members}) == 1
            width = at.linear.in_features if known else None
            routers[name.replace(".", "/")] = _router(config, at.num_experts, width, _draw_seed(generator), at.linear.weight.device)
    return routers


def _random_table(made: Structure, generator: torch.Generator) -> TableRouter:
    """k distinct experts for each token id, at random, with equal gates (`compose` sets other tables)."""
    embedding = token_embedding(made.model)
    if embedding is None:
        embedding = next((module for module in made.model.modules() if isinstance(module, nn.Embedding)), None)
    if embedding is None:
        raise InvalidTypeError(
            "inject", "model", "a model with an nn.Embedding of token ids (for a table router)", type(made.model).__name__
        )
    k, shape = int(made.config.top_k or 1), (embedding.num_embeddings, made.config.max_experts)
    ids = torch.rand(shape, generator=generator, device="cpu").argsort(dim=-1)[:, :k]
    device = embedding.weight.device
    return TableRouter(ids.to(device), torch.full(ids.shape, 1 / k, device=device), made.config.router == "control")


def _install(model: nn.Module, made: Structure, parts: dict[str, nn.Module], shared: dict[str, nn.Module]) -> nn.Module:
    """From here on nothing raises."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            made._undo.append(partial(setattr, parameter, "requires_grad", True))
    replacements: dict[int, nn.Module] = {id(part.base_layer): part for part in parts.values()}
    places = [  # found before anything moves: a block's linears are replaced as well as the block
        (model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], module)
        for path, module in model.named_modules(remove_duplicate=False)
        if id(module) in replacements
    ]
    for where, leaf, module in places:
        part = replacements[id(module)]
        part.training = module.training
        setattr(where, leaf, part)
        made._undo.append(partial(setattr, where, leaf, module))
    for where, attribute in _shortcuts(model):
        made._undo.append(partial(setattr, where, attribute, getattr(where, attribute)))
        setattr(where, attribute, False)
    if shared:
        model.add_module("lora_routers", _Routers(shared).train(model.training))
        made._undo.append(partial(delattr, model, "lora_routers"))
    made.attach()
    return model


def _shortcuts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """What lets torch's own encoder compute with its linears' weights in evaluation, without calling them."""
    kinds = ((nn.TransformerEncoderLayer, "activation_relu_or_gelu"), (nn.TransformerEncoder, "use_nested_tensor"))
    return [(module, name) for module in model.modules() for kind, name in kinds if isinstance(module, kind)]


class _Routers(nn.ModuleDict):
    """The shared routers, a child of the model. A Sequential calls each of its children."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class _Found(Exception):
    """Ends the probing forward."""


def _find_places(model: nn.Module, plan: Plan, config: LoRAMoEConfig) -> dict[str, str]:
    """Shared router -> the linear of its group that a forward of one token reaches first; what no forward could show is left out."""
    groups = {_group(site, config) for site in plan.sites} - {""}
    embedding = token_embedding(model) if groups else None
    if embedding is None:
        return {}
    places: dict[str, str] = {}

    def reached(site: Site) -> Callable[..., None]:
        def hook(*_: object) -> None:
            places.setdefault(_group(site, config), site.name.removesuffix(".weight"))
            if len(places) == len(groups):
                raise _Found

        return hook

    handles = [site.linear.register_forward_pre_hook(reached(site)) for site in plan.sites if _group(site, config)]
    was_training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=embedding.weight.device))
    except Exception:  # a model with inputs of its own: its first forward tells
        pass
    finally:
        for handle in handles:
            handle.remove()
        for module in was_training:
            module.training = True
    return places
