"""vLLM's and SGLang's Triton kernels for un-merged adapters, loaded at run time: none of their code is here.

A peer's files are found below the path in FUSEDMERGE_VLLM_PATH or FUSEDMERGE_SGLANG_PATH (a folder that holds `vllm` or `sglang`), else in
the installed package. The few files are loaded alone, with stand-ins for what they import of their package (settings, logging, registration
of operators), so that neither its compiled parts nor its pinned torch are needed. Checked with vLLM 0.33.0 and SGLang 0.5.23.

Both add one un-gated adapter per token: y += scaling * B (A x). What they prepare once per forward (tokens sorted by adapter) is prepared
before a measurement, as this library's `group_tokens`.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["PEERS", "Absent", "Peer", "sglang", "vllm"]

Peer = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor"], Callable[["torch.Tensor"], None]]
SGLANG_CHUNKS = (16, 128)  # the longest segment: the server's default, and the largest that its heuristic takes


class Absent(Exception):
    """Why a peer cannot be measured here."""


def vllm() -> dict[str, Peer]:
    """{title: a function of x [T, in], a [N, r, in], b [N, out, r], ids int32 [T] that returns one of y [T, out]}. Raises Absent."""
    root = _root("vllm", "FUSEDMERGE_VLLM_PATH")
    package = "vllm.lora.ops.triton_ops"
    names = [f"{package}.{leaf}" for leaf in ("kernel_utils", "utils", "lora_shrink_op", "lora_expand_op", "lora_kernel_metadata")]
    loaded = _load(root, names, _vllm_stubs())
    shrink, expand = loaded[names[2]].lora_shrink, loaded[names[3]].lora_expand
    meta_type = loaded[names[4]].LoRAKernelMeta

    def prepare(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ids: torch.Tensor) -> Callable[[torch.Tensor], None]:
        import torch

        meta = meta_type.make(len(a), len(x), x.device)
        meta.prepare_tensors(ids)
        specialize = (True,) if "specialize_active_lora" in inspect.signature(meta.meta_args).parameters else ()
        arguments = meta.meta_args(len(x), *specialize)
        z = torch.empty(1, len(x), a.shape[1], dtype=torch.float32, device=x.device)

        def add(y: torch.Tensor) -> None:
            shrink(x, [a], z, *arguments, 1.0)
            expand(z, [b], y, *arguments, offset_start=0, add_inputs=True)

        return add

    return {"vLLM": prepare}


def sglang() -> dict[str, Peer]:
    """The same of SGLang's chunked SGMV, with its default length of segments and with the lengths that its heuristic takes up to 128."""
    root = _root("sglang", "FUSEDMERGE_SGLANG_PATH")
    places = ("sglang.kernels.ops.lora.dense", "sglang.srt.lora.triton_ops")
    package = next((place for place in places if _file(root, f"{place}.chunked_sgmv_shrink").is_file()), places[0])
    names = [f"{package}.{leaf}" for leaf in ("lora_tuning_config", "chunked_sgmv_shrink", "chunked_sgmv_expand")]
    loaded = _load(root, names, _sglang_stubs())
    shrink, expand = loaded[names[1]].chunked_sgmv_lora_shrink_forward, loaded[names[2]].chunked_sgmv_lora_expand_forward

    def with_chunks(longest: int) -> Peer:
        def prepare(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ids: torch.Tensor) -> Callable[[torch.Tensor], None]:
            import torch

            batch = _segments(ids, a, longest)
            offsets = torch.tensor([0, b.shape[1]], dtype=torch.int32)
            on_host = {"slice_offsets_cpu": offsets} if "slice_offsets_cpu" in inspect.signature(expand).parameters else {}
            on_device = offsets.to(x.device)

            def add(y: torch.Tensor) -> None:
                expand(shrink(x, a, batch, 1), b, batch, on_device, b.shape[1], y, **on_host)

            return add

        return prepare

    return {f"SGLang, segments of up to {longest}": with_chunks(longest) for longest in SGLANG_CHUNKS}


PEERS: dict[str, Callable[[], dict[str, Peer]]] = {"vllm": vllm, "sglang": sglang}


def _segments(ids: torch.Tensor, a: torch.Tensor, longest: int) -> types.SimpleNamespace:
    """Tokens sorted by adapter, cut into segments of one adapter: what SGLang's kernels read."""
    import torch

    chunk = min(longest, 128 if len(ids) >= 256 else 32 if len(ids) >= 64 else 16)
    order = ids.argsort(stable=True)
    starts, adapters, at = [0], [], 0
    for adapter, count in zip(*(part.tolist() for part in ids[order].unique_consecutive(return_counts=True)), strict=True):
        for begin in range(0, count, chunk):
            starts.append(at + min(begin + chunk, count))
            adapters.append(adapter)
        at += count

    def on_device(values: list[Any], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=ids.device)

    return types.SimpleNamespace(
        use_cuda_graph=False,
        bs=len(adapters),
        num_segments=len(adapters),
        seg_indptr=on_device(starts),
        weight_indices=on_device(adapters),
        lora_ranks=on_device([a.shape[1]] * len(a)),
        scalings=on_device([1.0] * len(a), torch.float32),
        max_len=chunk,
        seg_lens=None,
        permutation=order.int(),
    )


# ---------------------------------------------------------------------- loading


def _root(package: str, variable: str) -> Path:
    """The folder that holds the package."""
    if importlib.util.find_spec("triton") is None:
        raise Absent("Triton is not installed")
    given = os.environ.get(variable)
    if given:
        root = Path(given)
        if not (root / package).is_dir():
            raise Absent(f"{variable} is {given}, where no {package}/ is")
        return root
    spec = importlib.util.find_spec(package)  # of a top-level name: nothing is imported
    if spec is None or not spec.submodule_search_locations:
        raise Absent(f"{package} is not installed; {variable} may name a folder that holds it")
    return Path(next(iter(spec.submodule_search_locations))).parent


def _file(root: Path, name: str) -> Path:
    return root.joinpath(*name.split(".")).with_suffix(".py")


def _load(root: Path, names: list[str], stubs: dict[str, dict[str, Any]]) -> dict[str, types.ModuleType]:
    """The modules `names`, in order, from their files; sys.modules is left as it was. Raises Absent where they cannot be loaded."""
    found: dict[str, types.ModuleType] = {}
    with _replaced_modules([*names, *stubs]):
        for name, contents in stubs.items():
            _package(name).__dict__.update(contents)
        for name in names:
            path = _file(root, name)
            if not path.is_file():
                if name.endswith(".lora_tuning_config"):  # older releases have none
                    continue
                raise Absent(f"{path} is missing")
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            _package(name.rpartition(".")[0])
            sys.modules[name] = module
            try:
                spec.loader.exec_module(module)
            except Exception as error:  # whatever another release raises
                raise Absent(f"{path} cannot be loaded alone: {type(error).__name__}: {error}") from error
            found[name] = module
    return found


@contextmanager
def _replaced_modules(names: list[str]) -> Iterator[None]:
    """Inside, these names' packages start empty."""
    tops = {name.partition(".")[0] for name in names}

    def ours(name: str) -> bool:
        return name.partition(".")[0] in tops

    before = {name: module for name, module in sys.modules.items() if ours(name)}
    for name in before:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def _package(name: str) -> types.ModuleType:
    """An empty module of that name, in empty packages."""
    if name not in sys.modules:
        module = types.ModuleType(name)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(_package(parent), leaf, module)
    return sys.modules[name]


class _Settings:
    """All settings off; an environment variable of a setting's name sets it (VLLM_TUNED_CONFIG_FOLDER). Also a value with `get`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return os.environ.get(name) if name.isupper() and name.startswith("VLLM_") else types.SimpleNamespace(get=lambda: False)


def _vllm_stubs() -> dict[str, dict[str, Any]]:
    import torch
    import triton
    import triton.language as tl

    def registered(**_: Any) -> None:
        raise AttributeError("registered nowhere: the plain function is used")

    def at_least(capability: Any, *_: Any) -> bool:
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor >= (capability if isinstance(capability, int) else 10 * capability[0] + capability[1])

    def exactly(capability: int, *_: Any) -> bool:
        return at_least(capability) and not at_least(capability + 1)

    def logger(name: str) -> logging.Logger:
        made: Any = logging.getLogger(name)
        made.warning_once, made.info_once = made.debug, made.debug
        return made

    def to_device(data: Any, dtype: torch.dtype, device: Any, **_: Any) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype, device=device)

    platform = types.SimpleNamespace(is_cuda=torch.cuda.is_available, has_device_capability=at_least, is_device_capability=exactly)
    return {
        "vllm": {"envs": _Settings()},
        "vllm.logger": {"init_logger": logger},
        "vllm.platforms": {"current_platform": platform},
        "vllm.triton_utils": {"tl": tl, "triton": triton},
        "vllm.utils": {"direct_register_custom_op": registered},
        "vllm.utils.math_utils": {"next_power_of_2": triton.next_power_of_2},
        "vllm.utils.torch_utils": {"direct_register_custom_op": registered, "async_tensor_h2d": to_device},
    }


def _sglang_stubs() -> dict[str, dict[str, Any]]:
    import torch

    def cached(first: Any, *_: Any, **__: Any) -> Any:
        """In place of a cache of launches, which only shortens their Python: `@cached(key)` above the kernel."""
        return lambda kernel: kernel

    def device_name() -> str:
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"  # of a table of tuned sizes

    return {
        "sglang.srt.environ": {"envs": _Settings()},
        "sglang.srt.lora.utils": {"LoRABatchInfo": types.SimpleNamespace},
        "sglang.srt.utils": {"cached_triton_kernel": cached, "get_device_name": device_name},
    }
