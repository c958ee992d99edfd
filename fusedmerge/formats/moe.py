"""Checkpoints of LoRA-MoE projects: experts, routers, and the plain LoRA beside them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusedmerge.checks import shorten
from fusedmerge.errors import FormatError
from fusedmerge.formats.lora import Adapter, Factors
from fusedmerge.formats.peft_config import LoraRule, check_fields, flag
from fusedmerge.formats.tensors import adapter_directory, check_matrix, make_factors, read_config, read_tensors

if TYPE_CHECKING:
    import torch

    from fusedmerge.formats.tensors import PathLike

__all__ = ["Layout", "MoECheckpoint", "layout_of", "read_moe"]

_OPERATION = "read_moe"


@dataclass(frozen=True)
class MoECheckpoint:
    """A mixture of LoRA experts as one of the projects below saved it.

    Module names are canonical (fusedmerge.weights). A router routes the target of its own name (MoLA, LoRAMoE), or all targets
    directly inside the module of its name, with one choice for the block (MixLoRA). Its number of rows is the number of experts
    there; expert e has targets only where there are more than e. Routing: softmax, then the top k, normalised to a sum of 1.
    """

    method: str  # "mixlora", "loramoe" or "mola"
    experts: tuple[Adapter, ...]
    static: Adapter | None  # plain LoRA on targets that have no experts
    routers: Mapping[str, torch.Tensor]  # module name -> [N, in]
    num_experts: int  # the largest N
    top_k: int | None  # experts per token; None where the files do not say (MoLA: a command-line argument, one per layer)
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """How a project names its tensors; the groups are `module`, `expert` and `side`."""

    method: str
    title: str
    peft_type: str | None  # as its configuration says; None: only the tensors' names tell it from plain LoRA
    prefix: str  # put before `module` to make a canonical name
    expert: re.Pattern[str]
    router: re.Pattern[str]
    static: re.Pattern[str] | None


def _moe_peft(method: str, experts_in: str, router_at: str, static_in: str | None) -> Layout:
    def pattern(blocks: str, rest: str) -> re.Pattern[str]:
        return re.compile(rf"{method}\.(?P<module>layers\.\d+\.{blocks}){rest}")

    factor = r"\.lora_(?P<side>[AB])\.weight"
    return Layout(
        method,
        f"MoE-PEFT, {method}",
        method.upper(),
        "model.",
        expert=pattern(experts_in, r"\.experts\.(?P<expert>\d+)" + factor),
        router=pattern(router_at, r"\.moe_gate\.weight"),
        static=pattern(static_in, factor) if static_in else None,
    )


# Sources. MoE-PEFT: TUDB-Labs/MoE-PEFT, moe_peft/model.py (get_lora_layer_weight), moe_peft/trainer.py (save_adapter_weight) and
# moe_peft/adapters/*/config.py (export). TUDB-Labs/MixLoRA reads the very same files: mixlora/model.py (_inject_attn_module,
# _inject_mlp_module). MoLA: GCYZSL/MoLA, src/mola_peft_model_hacked.py (get_peft_model_state_dict_moe: ".default" is cut out of
# "lora_A.default_0.weight") and src/mola_lora_hacked.py (LoraMoE_Layer.update_layer: one rank per layer in the list `r`).
_LAYOUTS = (
    _moe_peft("mixlora", experts_in=r"mlp\.\w+", router_at="mlp", static_in=r"self_attn\.\w+"),
    _moe_peft("loramoe", experts_in=r"mlp\.\w+", router_at=r"mlp\.\w+", static_in=r"self_attn\.\w+"),
    _moe_peft("mola", experts_in=r"(?:self_attn|mlp)\.\w+", router_at=r"(?:self_attn|mlp)\.\w+", static_in=None),
    Layout(
        "mola",
        "MoLA",
        None,
        "",
        expert=re.compile(r"base_model\.model\.(?P<module>model\.layers\.\d+\..+)\.lora_(?P<side>[AB])_(?P<expert>\d+)\.weight"),
        router=re.compile(r"base_model\.model\.(?P<module>model\.layers\.\d+\..+)\.router\.router\.weight"),
        static=None,
    ),
)

_ROUTING_FIELDS = frozenset(["routing_strategy", "num_experts", "top_k", "act_fn", "expert_lora"])


def layout_of(config: Mapping[str, Any], keys: Collection[str]) -> Layout | None:
    """The layout that a configuration or the names of the tensors show; None for any other file."""
    for layout in _LAYOUTS:
        if layout.peft_type is not None and config.get("peft_type") == layout.peft_type:
            return layout
    for layout in _LAYOUTS:
        if any(layout.router.fullmatch(key) or layout.expert.fullmatch(key) for key in keys):
            return layout
    return None


def read_moe(directory: PathLike, name: str | None = None) -> MoECheckpoint:
    """The mixture in a directory: `adapter_config.json` with `adapter_model.bin` or `adapter_model.safetensors`.

    Experts are adapters named `<name>.experts.<e>`, the plain LoRA beside them `<name>.static`; factors are A [r, in] and B [out, r],
    routers [N, in], all on the CPU in the file's dtype. `name` defaults to the last part of the path.

    Raises `MissingFileError`, and `FormatError` where a file is damaged or incomplete, where a tensor has no place in the layout, or
    where the method is more than a top-k mixture of scaling * B A.
    """
    path, last_part = adapter_directory(directory, _OPERATION)
    config = read_config(path, _OPERATION)
    tensors = read_tensors(path, _OPERATION)
    layout = layout_of(config, tensors)
    if layout is None:
        known = ", ".join(known.title for known in _LAYOUTS)
        raise FormatError(_OPERATION, "directory", f"a mixture of LoRA experts ({known})", f"peft_type {config.get('peft_type')!r}")
    _check_config(config, layout)
    parts = _sort(tensors, layout)
    _check_whole(parts, layout)
    counts = {module: int(router.shape[0]) for module, router in parts.routers.items()}
    num_experts = max(counts.values())
    name = last_part if name is None else name
    return MoECheckpoint(
        layout.method,
        tuple(
            Adapter(f"{name}.experts.{expert}", _factors(parts.experts[expert], config, layout, "expert_lora"), config)
            for expert in range(num_experts)
        ),
        Adapter(f"{name}.static", _factors(parts.static, config, layout, None), config) if parts.static else None,
        parts.routers,
        num_experts,
        _top_k(config, layout, counts),
        config,
    )


def _check_config(config: Mapping[str, Any], layout: Layout) -> None:
    check_fields(config, _OPERATION, known=_ROUTING_FIELDS)
    nested = config.get("expert_lora")
    if nested is not None and not isinstance(nested, Mapping):
        raise FormatError(_OPERATION, "expert_lora", "an object", repr(nested))
    check_fields(nested or {}, _OPERATION)
    if layout.peft_type is not None and config.get("routing_strategy") != layout.method:
        got = repr(config.get("routing_strategy"))
        raise FormatError(_OPERATION, "routing_strategy", f'"{layout.method}" (top-p and switch routing are not supported)', got)


_Sides = dict[str, tuple[str, "torch.Tensor"]]  # side -> (name in the file, tensor)


@dataclass(frozen=True)
class _Parts:
    routers: dict[str, torch.Tensor]  # module -> [N, in]
    experts: dict[int, dict[str, _Sides]]  # expert -> module -> sides
    static: dict[str, _Sides]  # module -> sides


def _sort(tensors: Mapping[str, torch.Tensor], layout: Layout) -> _Parts:
    parts = _Parts({}, {}, {})
    unknown = []
    for key, tensor in tensors.items():
        if match := layout.router.fullmatch(key):
            parts.routers[layout.prefix + match["module"]] = check_matrix(tensor, key, _OPERATION)
        elif match := layout.expert.fullmatch(key):
            sides = parts.experts.setdefault(int(match["expert"]), {}).setdefault(layout.prefix + match["module"], {})
            if match["side"] in sides:
                raise FormatError(_OPERATION, "tensors", "one tensor for each factor", f"{key} and {sides[match['side']][0]}")
            sides[match["side"]] = (key, tensor)
        elif layout.static and (match := layout.static.fullmatch(key)):
            parts.static.setdefault(layout.prefix + match["module"], {})[match["side"]] = (key, tensor)
        else:
            unknown.append(key)
    if unknown:
        raise FormatError(_OPERATION, "tensors", f"the tensors of {layout.title}", shorten(unknown))
    return parts


def _check_whole(parts: _Parts, layout: Layout) -> None:
    """Every target has all the experts that its router chooses from, and every router has targets."""
    routed = set()
    have: dict[str, set[int]] = {}
    for expert, modules in parts.experts.items():
        for module in modules:
            have.setdefault(module, set()).add(expert)
    for module, experts in have.items():
        owner = module if module in parts.routers else module.rpartition(".")[0]
        if owner not in parts.routers:
            raise FormatError(_OPERATION, module, f"a router ({layout.title})", "none")
        routed.add(owner)
        expected = set(range(parts.routers[owner].shape[0]))
        if experts != expected:
            raise FormatError(_OPERATION, module, f"experts 0 to {len(expected) - 1}, as many as its router has rows", sorted(experts))
        key, a = parts.experts[0][module].get("A", ("", None))
        if owner == module and a is not None and a.dim() == 2 and a.shape[1] != parts.routers[owner].shape[1]:
            raise FormatError(_OPERATION, f"router of {module}", f"{a.shape[1]} columns, as in {key}", list(parts.routers[owner].shape))
    if idle := parts.routers.keys() - routed:
        raise FormatError(_OPERATION, "tensors", "experts for every router", f"none for {shorten(idle)}")
    if not routed:
        raise FormatError(_OPERATION, "tensors", "routers and experts", "none")


def _factors(modules: Mapping[str, _Sides], config: Mapping[str, Any], layout: Layout, nested: str | None) -> dict[str, Factors]:
    """Factors by canonical weight name; the configuration's `nested` object overrides its own fields."""
    transposed = flag(config, "fan_in_fan_out", _OPERATION)
    own = {**config, **(config.get(nested) or {})} if nested else config
    found = {}
    for module, sides in modules.items():
        rule = LoraRule.of({**own, "r": _layer_rank(own, module)} if layout.peft_type is None else own, _OPERATION)
        found[module + ".weight"] = make_factors(module, sides, rule.scale(module), transposed, _OPERATION)
    return found


def _layer_rank(config: Mapping[str, Any], module: str) -> object:
    """MoLA's rank of a module: `r` is a list with one rank per layer, and modules are named model.layers.<layer>.<...>."""
    ranks = config.get("r")
    layer = int(module.split(".")[2])
    if not isinstance(ranks, list) or layer >= len(ranks):
        raise FormatError(_OPERATION, "r", f"a list of ranks, one per layer (at least {layer + 1})", repr(ranks))
    return ranks[layer]


def _top_k(config: Mapping[str, Any], layout: Layout, counts: Mapping[str, int]) -> int | None:
    """The number of experts per token, with the configuration's `num_experts` checked against the routers' rows."""
    if layout.peft_type is None:
        return None
    num_experts = config.get("num_experts")
    for module, count in counts.items():
        if count != num_experts:
            raise FormatError(_OPERATION, "num_experts", f"{count}, as many as the router of {module} has rows", repr(num_experts))
    if layout.method == "loramoe":
        return int(max(counts.values()))  # a softmax over all experts, with no choice among them
    top_k = config.get("top_k")
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= max(counts.values()):
        raise FormatError(_OPERATION, "top_k", f"an integer from 1 to num_experts ({num_experts})", repr(top_k))
    return top_k
