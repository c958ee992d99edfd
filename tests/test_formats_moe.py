"""fusedmerge.formats.read_moe: files written by hand in the layout of each project, read back; and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from fusedmerge.errors import FormatError, MissingFileError
from fusedmerge.formats import read_moe, read_peft

DIM, HIDDEN, LAYERS = 6, 10, 2
SHAPES = {  # module in a layer -> (in, out)
    "self_attn.q_proj": (DIM, DIM),
    "self_attn.v_proj": (DIM, 4),
    "mlp.gate_proj": (DIM, HIDDEN),
    "mlp.up_proj": (DIM, HIDDEN),
    "mlp.down_proj": (HIDDEN, DIM),
}
ATTENTION = tuple(module for module in SHAPES if module.startswith("self_attn"))
MLP = tuple(module for module in SHAPES if module.startswith("mlp"))


class Project:
    """A checkpoint as a project would write it, with its factors and routers by canonical name."""

    def __init__(self, config, num_experts=(3, 3)):
        self.config = config
        self.num_experts = num_experts  # per layer
        self.generator = torch.Generator().manual_seed(0)
        self.tensors = {}
        self.factors = {}  # (module, expert or None, side) -> tensor
        self.routers = {}

    def random(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def add_factors(self, module, expert, rank, key):
        """`key` holds a {side} to fill in."""
        columns, rows = SHAPES[module.split(".", 3)[3]]
        for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            self.tensors[key.format(side=side)] = self.factors[module, expert, side] = self.random(*shape)

    def add_router(self, module, key, columns, num_experts):
        self.tensors[key] = self.routers[module] = self.random(num_experts, columns)

    def write(self, directory, pickled=True):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "adapter_config.json").write_text(json.dumps(self.config))
        if pickled:
            torch.save(self.tensors, directory / "adapter_model.bin")
        else:
            from safetensors.torch import save_file

            save_file(self.tensors, directory / "adapter_model.safetensors")
        return directory


def moe_peft_config(method, **fields):
    return {
        "bias": "none",
        "peft_type": method.upper(),
        "r": 2,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "target_modules": [module.rpartition(".")[2] for module in SHAPES],
        "routing_strategy": method,
        "num_experts": 3,
        "base_model_name_or_path": "some/llama",
        "task_type": "CAUSAL_LM",
        **fields,
    }


def mixlora(expert_rank=2, **fields):
    project = Project(moe_peft_config("mixlora", top_k=2, act_fn="silu", **fields))
    for layer in range(LAYERS):
        project.add_router(f"model.layers.{layer}.mlp", f"mixlora.layers.{layer}.mlp.moe_gate.weight", DIM, 3)
        for module in ATTENTION:
            project.add_factors(f"model.layers.{layer}.{module}", None, 2, f"mixlora.layers.{layer}.{module}.lora_{{side}}.weight")
        for module in MLP:
            for expert in range(3):
                key = f"mixlora.layers.{layer}.{module}.experts.{expert}.lora_{{side}}.weight"
                project.add_factors(f"model.layers.{layer}.{module}", expert, expert_rank, key)
    return project


def plugin(method, **fields):
    """LoRAMoE and MoE-PEFT's MoLA: a router at every linear layer that has experts."""
    project = Project(moe_peft_config(method, **({"top_k": 2} if method == "mola" else {}), **fields))
    for layer in range(LAYERS):
        for module, (columns, _) in SHAPES.items():
            name, key = f"model.layers.{layer}.{module}", f"{method}.layers.{layer}.{module}"
            if method == "loramoe" and module in ATTENTION:
                project.add_factors(name, None, 2, f"{key}.lora_{{side}}.weight")
                continue
            project.add_router(name, f"{key}.moe_gate.weight", columns, 3)
            for expert in range(3):
                project.add_factors(name, expert, 2, f"{key}.experts.{expert}.lora_{{side}}.weight")
    return project


def mola(**fields):
    """GCYZSL/MoLA: ranks and numbers of experts per layer, the latter in no file."""
    ranks, num_experts = [2, 3], (2, 4)
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": "some/llama",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 12,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": ranks,
        "revision": None,
        "target_modules": ["q_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    project = Project({**config, **fields}, num_experts)
    for layer in range(LAYERS):
        for module in ("self_attn.q_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{module}"
            key = f"base_model.model.{name}"
            project.add_router(name, f"{key}.router.router.weight", SHAPES[module][0], num_experts[layer])
            for expert in range(num_experts[layer]):
                project.add_factors(name, expert, ranks[layer], f"{key}.lora_{{side}}_{expert}.weight")
    return project


PROJECTS = {
    "MoE-PEFT mixlora": (mixlora, "mixlora"),
    "MoE-PEFT loramoe": (lambda: plugin("loramoe"), "loramoe"),
    "MoE-PEFT mola": (lambda: plugin("mola"), "mola"),
    "MoLA": (mola, "mola"),
}


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("title", PROJECTS)
def test_every_tensor_comes_back(tmp_path, title, pickled):
    make, method = PROJECTS[title]
    project = make()
    checkpoint = read_moe(project.write(tmp_path / "mix", pickled))
    assert checkpoint.method == method
    assert checkpoint.num_experts == len(checkpoint.experts) == max(project.num_experts)
    assert checkpoint.routers.keys() == project.routers.keys()
    assert all(torch.equal(checkpoint.routers[module], router) for module, router in project.routers.items())
    assert checkpoint.config == project.config
    got = {}
    adapters = dict(enumerate(checkpoint.experts)) | ({None: checkpoint.static} if checkpoint.static else {})
    for expert, adapter in adapters.items():
        assert adapter.name == ("mix.static" if expert is None else f"mix.experts.{expert}")
        for target, factors in adapter.targets.items():
            assert not factors.transposed
            got[target.removesuffix(".weight"), expert, "A"] = factors.a
            got[target.removesuffix(".weight"), expert, "B"] = factors.b
    assert got.keys() == project.factors.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in project.factors.items())


@pytest.mark.parametrize(
    ("make", "static", "top_k"),
    [
        (mixlora, {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight"}, 2),
        (lambda: plugin("loramoe"), {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight"}, 3),
        (lambda: plugin("mola"), None, 2),
        (mola, None, None),
    ],
)
def test_static_lora_and_top_k(tmp_path, make, static, top_k):
    checkpoint = read_moe(make().write(tmp_path), name="x")
    assert checkpoint.top_k == top_k
    if static is None:
        assert checkpoint.static is None
    else:
        assert static < checkpoint.static.targets.keys()
        assert checkpoint.static.name == "x.static"


def scalings(adapter):
    return {factors.scaling for factors in adapter.targets.values()}


def test_scaling_of_mixlora(tmp_path):
    checkpoint = read_moe(mixlora().write(tmp_path / "plain"))
    assert scalings(checkpoint.experts[0]) == scalings(checkpoint.static) == {4.0}
    checkpoint = read_moe(mixlora(use_rslora=True).write(tmp_path / "rslora"))
    assert scalings(checkpoint.experts[2]) == scalings(checkpoint.static) == {8 / 2**0.5}
    own = {"r": 5, "lora_alpha": 20, "lora_dropout": 0.05, "bias": "none"}
    checkpoint = read_moe(mixlora(expert_rank=5, expert_lora=own).write(tmp_path / "own"))
    assert scalings(checkpoint.experts[1]) == scalings(checkpoint.static) == {4.0}
    checkpoint = read_moe(mixlora(expert_rank=5, expert_lora={"r": 5, "lora_alpha": 5}).write(tmp_path / "own2"))
    assert scalings(checkpoint.experts[1]) == {1.0} and scalings(checkpoint.static) == {4.0}


def test_ranks_and_experts_of_mola_differ_by_layer(tmp_path):
    checkpoint = read_moe(mola().write(tmp_path))
    first, last = checkpoint.experts[0].targets, checkpoint.experts[3].targets
    assert [first[f"model.layers.{layer}.self_attn.q_proj.weight"].rank for layer in range(2)] == [2, 3]
    assert [first[f"model.layers.{layer}.self_attn.q_proj.weight"].scaling for layer in range(2)] == [6.0, 4.0]
    assert set(last) == {"model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"}
    assert checkpoint.routers["model.layers.0.mlp.down_proj"].shape == (2, HIDDEN)


@pytest.mark.parametrize("title", PROJECTS)
def test_read_peft_says_what_the_directory_is(tmp_path, title):
    layout = "MoLA" if title == "MoLA" else title.replace(" ", ", ")
    with pytest.raises(FormatError, match=rf"^read_peft: directory: .*mixture of LoRA experts \({layout}\): use read_moe"):
        read_peft(PROJECTS[title][0]().write(tmp_path))


def test_moe_keys_under_a_plain_configuration(tmp_path):
    project = mixlora()
    project.config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
    with pytest.raises(FormatError, match="use read_moe"):
        read_peft(project.write(tmp_path))


def test_a_plain_adapter_is_refused(tmp_path):
    project = Project({"peft_type": "LORA", "r": 2, "lora_alpha": 8})
    project.add_factors("model.layers.0.mlp.up_proj", None, 2, "base_model.model.model.layers.0.mlp.up_proj.lora_{side}.weight")
    with pytest.raises(FormatError, match=r"a mixture of LoRA experts \(MoE-PEFT, mixlora, .* MoLA\), got peft_type 'LORA'"):
        read_moe(project.write(tmp_path))
    assert read_peft(tmp_path).targets


def test_missing_files(tmp_path):
    with pytest.raises(MissingFileError, match="^read_moe: directory"):
        read_moe(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (mixlora, {"use_dora": True}, "use_dora: .*DoRA"),
        (mixlora, {"expert_lora": {"use_dora": True}}, "use_dora: .*DoRA"),
        (mixlora, {"use_dora": True, "expert_lora": {"use_dora": False}}, "use_dora: .*DoRA"),
        (mixlora, {"expert_lora": [3]}, r"expert_lora: expected an object, got \[3\]"),
        (mixlora, {"expert_lora": {"r": 4}}, "experts.0.lora_A.weight: expected rank 4, got rank 2"),
        (mixlora, {"r": 4, "expert_lora": {"r": 2}}, "self_attn.q_proj.lora_A.weight: expected rank 4, got rank 2"),
        (mixlora, {"routing_strategy": "mixlora-dynamic"}, 'routing_strategy: expected "mixlora" .*got .mixlora-dynamic'),
        (mixlora, {"routing_strategy": "mixlora-switch"}, "routing_strategy: .*got .mixlora-switch"),
        (mixlora, {"routing_strategy": None}, "routing_strategy: .*got None"),
        (mixlora, {"num_experts": 4}, "num_experts: expected 3, as many as the router of model.layers.0.mlp has rows, got 4"),
        (mixlora, {"num_experts": None}, "num_experts: expected 3.*got None"),
        (mixlora, {"top_k": 0}, r"top_k: expected an integer from 1 to num_experts \(3\), got 0"),
        (mixlora, {"top_k": 4}, "top_k: .*got 4"),
        (mixlora, {"top_k": None}, "top_k: .*got None"),
        (mixlora, {"top_k": True}, "top_k: .*got True"),
        (mixlora, {"a_new_gate": "x"}, "a_new_gate: .*field this version knows"),
        (mixlora, {"lora_alpha": None}, "lora_alpha: expected a finite number"),
        (mola, {"r": 2}, r"r: expected a list of ranks, one per layer \(at least 1\), got 2"),
        (mola, {"r": [2]}, r"r: expected a list of ranks, one per layer \(at least 2\), got \[2\]"),
        (mola, {"r": [2, 0]}, "r: expected a positive integer, got 0"),
        (mola, {"r": [2, 4]}, "layers.1.self_attn.q_proj.lora_A_0.weight: expected rank 4, got rank 3"),
        (mola, {"modules_to_save": ["lm_head"]}, "modules_to_save: "),
    ],
)
def test_config_refusals(tmp_path, make, fields, message):
    project = make()
    project.config.update(fields)
    with pytest.raises(FormatError, match=f"^read_moe: .*{message}"):
        read_moe(project.write(tmp_path))


GATE, EXPERT = "mixlora.layers.1.mlp.moe_gate.weight", "mixlora.layers.1.mlp.up_proj.experts.2.lora_{}.weight"


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (mixlora, {"classifier": torch.ones(2, DIM)}, "tensors: expected the tensors of MoE-PEFT, mixlora, got classifier$"),
        (mixlora, {"mixlora.layers.0.gate.weight": torch.ones(3, DIM)}, "tensors: .*got mixlora.layers.0.gate.weight$"),
        (mixlora, {"mixlora.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, DIM)}, "tensors: .*got mixlora.layers.0.mlp.up_proj.lora_A"),
        (mixlora, {"loramoe.layers.0.mlp.up_proj.moe_gate.weight": torch.ones(3, DIM)}, "tensors: .*got loramoe"),
        (mixlora, {"mixlora.layers.1.mlp.up_proj.experts.02.lora_A.weight": torch.ones(2, DIM)}, "expected one tensor for each factor"),
        (mixlora, {GATE: None}, "model.layers.1.mlp.gate_proj: expected a router .*got none"),
        (mixlora, {GATE: torch.ones(3)}, f"{GATE}: expected a matrix"),
        (mixlora, {GATE: torch.full((3, DIM), float("nan"))}, f"{GATE}: expected finite values, got {3 * DIM}"),
        (mixlora, {GATE: torch.ones(4, DIM)}, r"mlp.gate_proj: expected experts 0 to 3, .*got \[0, 1, 2\]"),
        (mixlora, {EXPERT.format("A"): None}, "layers.1.mlp.up_proj: expected a lora_A and a lora_B, got mixlora.*without its lora_A"),
        (mixlora, {EXPERT.format("A"): None, EXPERT.format("B"): None}, r"mlp.up_proj: expected experts 0 to 2, .*got \[0, 1\]"),
        (mixlora, {EXPERT.format("B"): torch.full((HIDDEN, 2), float("inf"))}, "experts.2.lora_B.weight: expected finite values"),
        (mixlora, {EXPERT.format("A"): torch.ones(2, DIM, dtype=torch.int32)}, "experts.2.lora_A.weight: expected bfloat16"),
        (
            mixlora,
            {"mixlora.layers.7.mlp.moe_gate.weight": torch.ones(3, DIM)},
            "experts for every router, got none for model.layers.7.mlp",
        ),
        (mixlora, {"mixlora.layers.0.self_attn.q_proj.lora_B.weight": None}, "self_attn.q_proj: .*without its lora_B"),
        (
            lambda: plugin("mola"),
            {"mola.layers.0.mlp.down_proj.moe_gate.weight": torch.ones(3, DIM)},
            rf"router of model.layers.0.mlp.down_proj: expected {HIDDEN} columns.*\[3, {DIM}\]",
        ),
        (lambda: plugin("mola"), {"mola.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, DIM)}, "tensors: .*got mola.layers.0"),
        (
            lambda: plugin("loramoe"),
            {"loramoe.layers.0.mlp.moe_gate.weight": torch.ones(3, DIM)},
            "tensors: expected the tensors of MoE-PEFT, loramoe",
        ),
        (mola, {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, DIM)}, "tensors: expected the tensors of MoLA"),
        (
            mola,
            {"base_model.model.model.layers.0.self_attn.q_proj.router.router.weight": None},
            "q_proj: expected a router .MoLA., got none",
        ),
    ],
)
def test_tensor_refusals(tmp_path, make, changes, message):
    project = make()
    project.tensors.update(changes)
    project.tensors = {key: tensor for key, tensor in project.tensors.items() if tensor is not None}
    with pytest.raises(FormatError, match=f"^read_moe: .*{message}"):
        read_moe(project.write(tmp_path))


def test_static_lora_alone_is_refused(tmp_path):
    project = mixlora()
    project.tensors = {key: tensor for key, tensor in project.tensors.items() if "self_attn" in key}
    with pytest.raises(FormatError, match="tensors: expected routers and experts, got none"):
        read_moe(project.write(tmp_path))


def test_names_follow_the_rule_of_mola():
    """MoLA's layers hold experts as lora_A["default_0"] and a router["router"]; its writer keeps these and cuts ".default" out."""
    layer = torch.nn.Linear(DIM, DIM)
    for side in "AB":
        setattr(layer, f"lora_{side}", torch.nn.ModuleDict({f"default_{expert}": torch.nn.Linear(2, 2, bias=False) for expert in (0, 1)}))
    layer.router = torch.nn.ModuleDict({"router": torch.nn.Linear(DIM, 2, bias=False)})
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    state = {prefix + key: None for key in layer.state_dict()}
    saved = {key.replace(".default", "") for key in state if "lora_" in key or "router" in key}
    assert saved == {key for key in mola().tensors if key.startswith(prefix)}
