"""Text of several domains from a Debian machine, as tokens: `python -m perf.accuracy.data --setting cpu` writes build/accuracy/data-<key>/.

Languages are manual pages, split by page name, so that no page is in one language's training and another's test; code is split by package.
A line of more than 12 characters that was seen before, in whatever domain, is dropped. The tokenizer is trained on training splits only.
What a machine lacks is left out with a notice: fewer domains, never other data in their place.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perf.accuracy.settings import BUILD, SETTINGS, DataSetting

SPLITS = ("train", "validation", "test")
PRETRAINING = "english"
END = "<|end|>"  # token 0, between documents
LEAST_BYTES = 60_000  # of training text; a domain with less is left out


@dataclass(frozen=True)
class Source:
    """Where a domain's files are: in Debian packages (downloaded and unpacked, not installed) and in folders of this machine."""

    packages: tuple[str, ...]
    roots: tuple[str, ...]  # also looked for inside the unpacked packages
    pattern: str
    manual: bool = False
    depth: int = 1  # folders that name a package


def _language(code: str) -> Source:
    return Source((f"manpages-{code}",), (f"/usr/share/man/{code}",), "man*/*.gz", manual=True)


SOURCES = {
    PRETRAINING: Source(("manpages", "manpages-dev"), ("/usr/share/man",), "man[0-9]*/*.gz", manual=True),
    **{code: _language(code) for code in ("de", "fr", "es", "pl", "ru", "it", "nl", "sv", "uk", "ro", "da", "hu", "cs", "fi")},
    "python": Source((), (sysconfig.get_paths()["stdlib"], "/usr/lib/python3/dist-packages"), "**/*.py"),
    "c": Source((), ("/usr/include",), "**/*.h"),
    "javascript": Source((), ("/usr/lib/node_modules", "/usr/share/nodejs", "/usr/share/javascript"), "**/*.js"),
    "perl": Source((), ("/usr/share/perl", "/usr/share/perl5"), "**/*.pm"),
    "tcl": Source(("tcllib",), ("/usr/share/tcltk",), "**/*.tcl", depth=2),
}


def split_of(name: str) -> str:
    """80 % training, 10 % validation, 10 % test by the name of a page or a package."""
    bucket = hashlib.sha256(name.encode()).digest()[0]
    return "train" if bucket < 205 else "validation" if bucket < 231 else "test"


def documents(domain: str, unpacked: Path) -> Iterator[tuple[str, str, str]]:
    """(split, name, text) of a domain's files, in an order that does not depend on the machine's directory order."""
    source, seen = SOURCES[domain], set()
    crowd: Counter[str] = Counter()
    for root in [*(unpacked / r.lstrip("/") for r in source.roots), *map(Path, source.roots)]:
        for path in sorted(root.glob(source.pattern), key=lambda p: hashlib.sha256(p.name.encode()).digest()):
            if not path.is_file() or path.is_symlink() or "test" in str(path.relative_to(root)).lower():
                continue
            name = path.name.removesuffix(".gz") if source.manual else str(path.relative_to(root))
            group = name if source.manual else _package(path.relative_to(root).parts, source.depth)
            family = re.split(r"[-_.]", name)[0] if source.manual else group
            crowd[family] += 1
            if name in seen or crowd[family] > 60:  # one program with thousands of pages is not a language
                continue
            seen.add(name)
            text = _read(path)
            if text:
                yield split_of(group), name, roff_to_text(text) if source.manual else text


def _package(parts: tuple[str, ...], depth: int) -> str:
    """The innermost node_modules' package, else the first `depth` folders; a file at the top is a package of its own."""
    if "node_modules" in parts[:-1]:
        return parts[len(parts) - parts[::-1].index("node_modules")]
    return "/".join(parts[: min(depth, len(parts) - 1)] or parts)


def _read(path: Path) -> str:
    if path.stat().st_size > 400_000:
        return ""  # generated tables
    raw = path.read_bytes()
    try:
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (UnicodeDecodeError, OSError, EOFError):
        return ""


def roff_to_text(page: str) -> str:
    """A manual page's words: comments and layout requests go, arguments of headings and fonts stay."""
    lines = []
    for line in page.splitlines():
        request = re.match(r"[.']\s*([A-Za-z\\\"]*)\s*(.*)", line)
        if request and request[1] not in ("SH", "SS", "B", "I", "BR", "IR", "RB", "RI", "BI", "IB", "Sh", "Ss"):
            continue
        text = request[2].replace('"', "") if request else line
        text = re.sub(r"\\f(\(..|\[[^]]*\]|.)|\\s[+-]?\d+|\\[&/,:|^]", "", text)
        lines.append(re.sub(r"\\(\(..|\[[^]]*\])", " ", text.replace("\\-", "-").replace("\\e", "\\")))
    return "\n".join(lines) + "\n"


def collect(domain: str, unpacked: Path, seen: set[bytes], limit: dict[str, int]) -> dict[str, list[str]]:
    """The domain's documents per split, at most limit[split] bytes each, without lines that are already in `seen`."""
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    size = dict.fromkeys(SPLITS, 0)
    for split, _, text in documents(domain, unpacked):
        if size[split] >= limit[split]:
            continue
        kept = []
        for line in text.splitlines():
            digest = hashlib.blake2b(line.strip().encode(), digest_size=8).digest()
            if len(line.strip()) > 12 and digest in seen:
                continue
            seen.add(digest)
            kept.append(line)
        document = re.sub(r"\n{3,}", "\n\n", "\n".join(kept))
        found[split].append(document)
        size[split] += len(document.encode())
    return found


def unpack(packages: list[str], folder: Path, notice: Callable[[str], None]) -> None:
    """Download Debian packages with apt-get and unpack them below `folder`; nothing is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        done = folder / f".{package}"
        if done.exists():
            continue
        if shutil.which("apt-get") and shutil.which("dpkg"):
            subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, check=False)
        archives = list(folder.glob(f"{package}_*.deb"))
        if not archives:
            notice(f"Debian package {package} cannot be had here: only what is installed counts")
            continue
        subprocess.run(["dpkg", "-x", str(archives[0]), str(folder)], check=True)
        archives[0].unlink()
        done.touch()


def build(setting: DataSetting, folder: Path) -> None:
    """Write tokenizer.json, <domain>-<split>.npy (uint16), and data.json (domains, bytes per token id, sizes, notices)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    notices: list[str] = []

    def notice(text: str) -> None:
        notices.append(text)
        print(f"notice: {text}", file=sys.stderr)

    wanted = [PRETRAINING, *setting.domains]
    unpacked = BUILD / "debian"
    unpack([package for domain in wanted for package in SOURCES[domain].packages], unpacked, notice)
    seen: set[bytes] = set()
    texts = {}
    for domain in wanted:
        share = setting.pretraining_bytes if domain == PRETRAINING else setting.domain_bytes
        found = collect(domain, unpacked, seen, {"train": share, "validation": share // 8, "test": share // 4})
        size = {split: sum(len(t.encode()) for t in found[split]) for split in SPLITS}
        print(f"{domain:12} {size}", file=sys.stderr)
        if size["train"] < LEAST_BYTES or not found["validation"] or not found["test"]:
            notice(f"domain {domain} is left out: {size} bytes of text here")
            continue
        texts[domain] = found
    if PRETRAINING not in texts or len(texts) - 1 < setting.least_domains:
        raise SystemExit(f"data: expected {PRETRAINING} and at least {setting.least_domains} domains, got {list(texts)}")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=setting.vocabulary, initial_alphabet=sorted(alphabet), special_tokens=[END], show_progress=False
    )
    each = min(setting.domain_bytes, 400_000)
    tokenizer.train_from_iterator(("\n".join(found["train"])[:each] for found in texts.values()), trainer)

    folder.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, dict[str, int]] = {}
    for domain, found in texts.items():
        sizes[domain] = {}
        for split in SPLITS:
            encoded = tokenizer.encode_batch(found[split])
            tokens = np.concatenate([np.asarray([*e.ids, 0], dtype=np.uint16) for e in encoded])
            np.save(folder / f"{domain}-{split}.npy", tokens)
            sizes[domain][split] = len(tokens)
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    content = {
        "domains": [domain for domain in texts if domain != PRETRAINING],
        "token_bytes": [0 if t == END else len(t) for t in tokens],  # one character of a byte-level token is one byte
        "tokens": sizes,
        "notices": notices,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "data.json").write_text(json.dumps(content) + "\n")


class Data:
    """The tokens that `build` wrote."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "data.json").is_file():
            raise SystemExit(f"no data in {folder}: run `python -m perf.accuracy.data` on a Debian machine, and carry the folder here")
        found = json.loads((folder / "data.json").read_text())
        self.domains: list[str] = found["domains"]
        self.notices: list[str] = found["notices"]
        self.sizes: dict[str, dict[str, int]] = found["tokens"]
        self.token_bytes = np.asarray(found["token_bytes"], dtype=np.int64)  # [vocabulary]
        self._folder = folder
        self._arrays: dict[tuple[str, str], np.ndarray] = {}

    def windows(self, domain: str, split: str, count: int, length: int, generator: np.random.Generator) -> np.ndarray:
        """int64 [count, length]: windows of consecutive tokens at random places."""
        key = (domain, split)
        if key not in self._arrays:
            self._arrays[key] = np.load(self._folder / f"{domain}-{split}.npy")
        tokens = self._arrays[key]
        starts = generator.integers(0, len(tokens) - length + 1, size=count)
        return tokens[starts[:, None] + np.arange(length)].astype(np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    setting = SETTINGS[parser.parse_args().setting].data
    build(setting, setting.folder)
    print(setting.folder)


if __name__ == "__main__":
    main()
