"""Which tensor of a checkpoint is which weight of the model: adapters name weights as they are in memory, files may name them otherwise.

transformers renames tensors as it loads them (rules per model class), merges or permutes some, adds or drops the base model's prefix,
and ties weights. `describe` asks transformers itself, on a model without storage, so that its rules hold here too.

Run as a module it is that question's child process: transformers' memory is gone before the merge begins.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fusedmerge.checks import shorten
from fusedmerge.errors import FormatError, StateError, UnknownNameError
from fusedmerge.weights import canonical_name

__all__ = ["Match", "NameMap", "Rules", "describe"]

logger = logging.getLogger(__name__)

_HEADS = ("lm_head", "embed_out", "output_projection")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")


@dataclass
class Rules:
    """How transformers loads one checkpoint. Names in memory are those of the model's state dict."""

    memory: dict[str, str] = field(default_factory=dict)  # name in the files -> name in memory, where they differ
    converted: list[str] = field(default_factory=list)  # names in the files of tensors that are merged, split or permuted as they load
    made: list[str] = field(default_factory=list)  # names in memory that no tensor of the files has alone
    tied: dict[str, str] | None = None  # name in memory -> the one it is tied to; None: not known
    transposed: dict[str, bool] = field(default_factory=dict)  # name in memory -> stored as [in, out] (Conv1D, embeddings)
    prefixes: list[str] = field(default_factory=lambda: ["model", "transformer"])  # of the base model inside one with a head


def describe(directory: Path, config: Mapping[str, Any], disk: Sequence[str]) -> Rules:
    """Ask transformers. Without it, or for a model class that it lacks, names in memory are taken to be those in the files."""
    architectures = config.get("architectures")
    if not architectures or importlib.util.find_spec("transformers") is None:
        return Rules()
    question = {"directory": os.path.abspath(directory), "architecture": architectures[0], "disk": list(disk)}
    if "transformers" in sys.modules or not sys.executable:
        try:
            return _ask(question)
        except Exception as error:  # a broken or incomplete model class raises nearly anything
            _warn(architectures[0], f"{type(error).__name__}: {error}")
            return Rules()
    done = subprocess.run(
        [sys.executable, "-m", "fusedmerge.checkpoint.names"], input=json.dumps(question), capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[1],  # first on the child's path, so that it finds this very package
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        _warn(architectures[0], (done.stderr.strip().splitlines() or ["no message"])[-1])
        return Rules()
    return Rules(**json.loads(done.stdout))


def _warn(architecture: str, why: str) -> None:
    logger.warning("merge: transformers could not build %s (%s): names are taken as they are in the files", architecture, why)


def _ask(question: Mapping[str, Any]) -> Rules:
    """In this process. Raises whatever transformers raises."""
    import torch
    import transformers

    from fusedmerge.weights import collect

    disk: list[str] = question["disk"]
    model_class = getattr(transformers, question["architecture"], None)
    if model_class is None:
        return Rules()
    config = model_class.config_class.from_pretrained(question["directory"])
    with torch.device("meta"):
        model = model_class._from_config(config, attn_implementation="eager")
    parameters = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")
    renamed = _renamed(model, disk, prefix, parameters)
    plain = {memory for memory, converted in renamed.values() if not converted}
    return Rules(
        memory={name: memory for name, (memory, _) in renamed.items() if memory != name},
        converted=[name for name, (_, converted) in renamed.items() if converted],
        made=[name for name in parameters if name not in plain],
        tied=getattr(model, "all_tied_weights_keys", None),
        transposed={name: w.transposed for name, w in collect(model, "merge").items() if w.transposed is not None},
        prefixes=[prefix] if prefix else [],
    )


def _renamed(model: Any, disk: Sequence[str], prefix: str, parameters: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """{name in the files: (name in memory, whether its values change on the way)}, as transformers' loader decides it."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:  # transformers 4 loads without such rules
        return {name: (name, False) for name in disk}
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found = {}
    for name in sorted(disk, key=dot_natural_key):  # some rules depend on what came before
        memory, converter = rename_source_key(name, renamings, converters, prefix or None, parameters)
        if memory not in parameters and name in parameters:
            memory, converter = rename_source_key(name, [], [], prefix or None, parameters)
        found[name] = (memory, converter is not None)
    return found


@dataclass(frozen=True)
class Match:
    """The tensor that a target is."""

    disk: str
    transposed: bool | None  # stored as [in, out]; None: not known


class NameMap:
    """Finds an adapter's targets among a checkpoint's tensors."""

    def __init__(self, disk: Iterable[str], config: Mapping[str, Any], rules: Rules) -> None:
        self._rules = rules
        self._made = {canonical_name(name) for name in rules.made}
        self._by_name: dict[str, list[Match]] = defaultdict(list)
        converted = set(rules.converted)
        for name in disk:
            memory = rules.memory.get(name, name)
            if name not in converted:
                self._by_name[canonical_name(memory)].append(Match(name, rules.transposed.get(canonical_name(memory))))
            if name != memory:  # adapters from before a rename use the files' names, and the files' values with them
                self._by_name[canonical_name(name)].append(Match(name, None))
        self._tied = _tied(rules, config, self._by_name)

    def find(self, targets: Iterable[str], adapter: str, operation: str) -> dict[str, Match]:
        """{target: its tensor}. Raises UnknownNameError listing targets without a tensor, StateError for tied ones, FormatError."""
        found: dict[str, Match] = {}
        missing: list[str] = []
        owner: dict[str, str] = {}
        for target in targets:
            self._check_untied(target, adapter, operation)
            matches = self._matches(target)
            what = f'adapter "{adapter}" on {target}'
            if len(matches) > 1:
                raise FormatError(operation, what, "one tensor of the checkpoint", " and ".join(match.disk for match in matches))
            if not matches:
                missing.append(target)
                continue
            found[target] = matches[0]
            other = owner.setdefault(matches[0].disk, target)
            if other != target:
                raise FormatError(operation, what, "a tensor of its own", f"{matches[0].disk}, which is also {other}")
        if missing:
            made = any(name in self._made for target in missing for name in self._spellings(target))
            why = " (transformers makes that weight from other tensors as it loads them)" if made else ""
            raise UnknownNameError(operation, f'adapter "{adapter}": targets', "tensors of the checkpoint", f"no {shorten(missing)}{why}")
        return found

    def carried(self, name: str) -> str | None:
        """The tensor that a weight in an adapter's file repeats, if the checkpoint has it, perhaps under the name it is tied to."""
        for spelling in (name, self._tied.get(name, name)):
            matches = self._matches(spelling)
            if len(matches) == 1:
                return matches[0].disk
        return None

    def _matches(self, target: str) -> list[Match]:
        for spelling in self._spellings(target):
            if self._by_name.get(spelling):
                return self._by_name[spelling]
        return []

    def _spellings(self, target: str) -> list[str]:
        """The name, and what it is with or without the base model's prefix (trained without a head, saved with one, or the reverse)."""
        return [
            target,
            *(f"{prefix}.{target}" for prefix in self._rules.prefixes),
            *(target.removeprefix(f"{prefix}.") for prefix in self._rules.prefixes if target.startswith(f"{prefix}.")),
        ]

    def _check_untied(self, target: str, adapter: str, operation: str) -> None:
        for spelling in self._spellings(target):
            matches = self._by_name.get(spelling, [])
            memory = [canonical_name(self._rules.memory.get(match.disk, match.disk)) for match in matches]
            for name in (spelling, *memory):
                if name in self._tied:
                    got = f"one that is tied to {self._tied[name]} (tie_word_embeddings): the adapter would change both"
                    raise StateError(operation, f'adapter "{adapter}" on {target}', "a weight of its own", got)
            if matches:
                return


def _tied(rules: Rules, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """{name in memory: the one it is tied to}, both ways."""
    pairs: dict[str, str] = {}
    if rules.tied is not None:
        for name, other in rules.tied.items():
            pairs[canonical_name(name)] = canonical_name(other)
            pairs.setdefault(canonical_name(other), canonical_name(name))
        return pairs
    text = config.get("text_config")
    tie = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, Mapping) else None)
    by_module = {name: name.removesuffix(".weight").rpartition(".")[2] for name in names if name.endswith(".weight")}
    heads = [name for name, module in by_module.items() if module in _HEADS]
    has_head = str((config.get("architectures") or [""])[0]).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    if tie or (tie is None and has_head and not heads):
        heads = heads or ["lm_head.weight"]
        embeddings = [name for name, module in by_module.items() if module in _EMBEDDINGS]
        for name in embeddings:
            pairs[name] = heads[0]
        for name in heads:
            pairs[name] = embeddings[0] if embeddings else "the embedding"
    return pairs


def main() -> None:
    """Answer the question on stdin, a JSON object, with one on stdout. Whatever transformers prints goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        rules = _ask(json.load(sys.stdin))
    json.dump(asdict(rules), sys.stdout)


if __name__ == "__main__":
    main()
