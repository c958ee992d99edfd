"""A bank on disk, and random banks for benchmarks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fusedmerge.checks import usable_device
from fusedmerge.errors import FormatError, InvalidValueError, MissingFileError, ShapeError, UnknownNameError
from fusedmerge.formats.lora import Adapter, Factors
from fusedmerge.staging import BankTarget, TargetSpec
from fusedmerge.weights import Weights, canonical_name, collect

if TYPE_CHECKING:
    import torch

__all__ = ["load_bank", "random_adapters", "save_bank"]

FORMAT = "fusedmerge.bank.v1"


def random_adapters(weights: Weights, num_adapters: int, r: int, targets: Sequence[str] | None, delta: float, seed: int) -> list[Adapter]:
    """Normal factors with |B A| / |W| of about `delta` on every target. Raises UnknownNameError for a target that is not there."""
    import torch

    if not isinstance(num_adapters, int) or not isinstance(r, int) or num_adapters < 1 or r < 1:
        raise InvalidValueError("random", "num_adapters and r", "whole numbers of at least 1", f"{num_adapters!r} and {r!r}")
    found = collect(weights, "random")
    if targets is None:
        bare = not isinstance(weights, torch.nn.Module)
        chosen = [name for name, w in found.items() if w.tensor.dim() == 2 and (bare or w.transposed is False)]
    else:
        chosen = [canonical_name(name) for name in ([targets] if isinstance(targets, str) else targets)]
    for name in chosen:
        if name not in found:
            raise UnknownNameError("random", "targets", "weights that the model has", name)
        if found[name].tensor.dim() != 2:
            raise ShapeError("random", name, "a matrix", f"shape {list(found[name].tensor.shape)}")
    generator = torch.Generator().manual_seed(seed)
    adapters: list[dict[str, Factors]] = [{} for _ in range(num_adapters)]
    for name in chosen:
        rows, cols = found[name].tensor.shape
        norm = float(found[name].tensor.detach().float().norm()) if found[name].tensor.device.type != "meta" else (rows * cols) ** 0.5
        for factors in adapters:
            a = torch.randn(r, cols, generator=generator, device="cpu") * cols**-0.5
            b = torch.randn(rows, r, generator=generator, device="cpu") * (delta * norm / (rows * r) ** 0.5)
            factors[name] = Factors(a, b, 1.0) if not found[name].transposed else Factors(b.t(), a.t(), 1.0, True)
    return [Adapter(f"random_{index}", factors) for index, factors in enumerate(adapters)]


def save_bank(
    targets: Mapping[str, BankTarget], slots: Sequence[str | None], cast_error: Mapping[str, float], path: str | os.PathLike[str]
) -> None:
    """See `AdapterBank.save`."""
    from safetensors.torch import save_file

    described = {name: {"ranks": target.ranks, "transposed": target.spec.transposed} for name, target in targets.items()}
    header = {"slots": list(slots), "cast_error": dict(cast_error), "targets": described}
    tensors = {f"{name}.{field}": getattr(target, field) for name, target in targets.items() for field in ("a", "b", "scaling")}
    final = Path(path)
    if not final.parent.is_dir():
        raise MissingFileError("save", "path", "a file in a directory that is there", str(path))
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata={"format": FORMAT, "bank": json.dumps(header)})
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)


def load_bank(path: str | os.PathLike[str], device: torch.device | str) -> tuple[dict[str, BankTarget], list[str | None], dict[str, float]]:
    """(targets, slots, cast_error) of a saved bank. Raises MissingFileError, or FormatError for a file that `save` did not write whole."""
    import torch
    from safetensors import SafetensorError, safe_open

    device = usable_device(device, "load")
    if not isinstance(path, (str, os.PathLike)) or not Path(path).is_file():
        raise MissingFileError("load", "path", "a bank file", str(path))
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise FormatError("load", str(path), f"format {FORMAT}", metadata.get("format"))
            header = json.loads(metadata["bank"])
            targets = {}
            for name, entry in header["targets"].items():
                a, b, scaling = (file.get_tensor(f"{name}.{field}") for field in ("a", "b", "scaling"))
                spec = TargetSpec(name, (b.shape[1], a.shape[2]), a.dtype, torch.device(device), entry["transposed"])
                targets[name] = BankTarget(spec, a, b, scaling, list(entry["ranks"]), scaling.tolist())
                if max(entry["ranks"]) > a.shape[1] or len(entry["ranks"]) != a.shape[0]:
                    raise ValueError(f"ranks {entry['ranks']} of {name}")
            taken = [name for name in header["slots"] if name is not None]
            if len(set(taken)) != len(taken):
                raise ValueError(f"slots {header['slots']}")
            return targets, header["slots"], header["cast_error"]
    except (SafetensorError, KeyError, IndexError, ValueError, TypeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError("load", str(path), "a bank that save() wrote", error) from error
