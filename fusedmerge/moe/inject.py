"""inject: adapt a model's linears in place. eject: take that back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fusedmerge.errors import InvalidTypeError, StateError
from fusedmerge.moe.config import LoRAMoEConfig
from fusedmerge.moe.layers import MoELinear
from fusedmerge.moe.routing import Router
from fusedmerge.moe.structure import _ATTRIBUTE, Structure, structure
from fusedmerge.moe.targets import Plan, Site, make_plan

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
    if isinstance(model, nn.Module) and hasattr(model, _ATTRIBUTE):
        raise StateError("inject", "model", "a model without adapters (eject it first)", "one that inject has adapted")
    plan = make_plan(model, config, "inject")
    made = Structure(model, config)
    groups = {_group(site, config): site for site in reversed(plan.sites) if _group(site, config)}
    made.places.update(_find_places(model, plan, config))
    generator = torch.Generator().manual_seed(seed)
    parts = _build(made, plan, generator)
    shared = {name.replace(".", "/"): _shared_router(made, name, plan, seed) for name in reversed(groups)}
    return _install(model, made, parts, shared)


def eject(model: nn.Module) -> nn.Module:
    """Give the model back as it was before `inject`: its own linears, and which of its parameters wanted gradients. Raises StateError."""
    structure(model).detach()
    return model


def _group(site: Site, config: LoRAMoEConfig) -> str:
    """The name of the shared router that serves a site; "": none."""
    if site.static or config.traits.place not in ("model", "layer"):
        return ""
    return "router" if config.traits.place == "model" or not site.layer else site.layer


def _router(config: LoRAMoEConfig, num_experts: int, in_features: int | None, seed: int, device: torch.device) -> Router:
    assert config.gating is not None
    return Router(num_experts, in_features, config.top_k, config.gating, config.router_init_std, seed, device)


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (1,), generator=generator, device="cpu"))


def _build(made: Structure, plan: Plan, generator: torch.Generator) -> dict[str, MoELinear]:
    config, parts = made.config, {}
    for site in plan.sites:
        name = site.name.removesuffix(".weight")
        own = None
        if config.traits.place == "linear" and not site.static:
            own = _router(config, site.num_experts, site.linear.in_features, _draw_seed(generator), site.linear.weight.device)
        parts[site.path] = MoELinear(made, name, site.linear, site.num_experts, own, _group(site, config) or None, generator)
        made._experts[name] = parts[site.path]
    return parts


def _shared_router(made: Structure, name: str, plan: Plan, seed: int) -> nn.Module:
    members = [site for site in plan.sites if _group(site, made.config) == name]
    place = made.places.get(name)
    at = next((site for site in members if site.name.removesuffix(".weight") == place), members[0])
    widths = {site.linear.in_features for site in members}
    in_features = at.linear.in_features if place is not None or len(widths) == 1 else None
    number = sum(ord(letter) * (index + 1) for index, letter in enumerate(name))
    return _router(made.config, at.num_experts, in_features, seed + number, at.linear.weight.device)


def _install(model: nn.Module, made: Structure, parts: dict[str, MoELinear], shared: dict[str, nn.Module]) -> nn.Module:
    """From here on nothing raises."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            made._undo.append(_call(parameter.requires_grad_, True))
    originals = {id(part.base_layer): part for part in parts.values()}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in originals:
            parent, _, leaf = path.rpartition(".")
            where = model.get_submodule(parent)
            part = originals[id(module)]
            part.train(module.training)
            setattr(where, leaf, part)
            made._undo.append(_call(setattr, where, leaf, module))
    if shared:
        model.add_module("lora_routers", nn.ModuleDict(shared))
        made._undo.append(_call(delattr, model, "lora_routers"))
    made.attach()
    return model


def _call(function: Callable[..., Any], *args: Any) -> Callable[[], None]:
    from functools import partial

    return partial(function, *args)


class _Found(Exception):
    """Ends the probing forward."""


def _find_places(model: nn.Module, plan: Plan, config: LoRAMoEConfig) -> dict[str, str]:
    """Shared router -> the linear of its group that a forward of one token reaches first; what no forward could show is left out."""
    groups = {_group(site, config) for site in plan.sites} - {""}
    embedding = model.get_input_embeddings() if groups and hasattr(model, "get_input_embeddings") else None
    if not isinstance(embedding, nn.Embedding):
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
