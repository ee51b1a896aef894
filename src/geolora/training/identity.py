"""What tells one run from another: its settings, its data and its base model; and the versions that made it."""

import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from geolora.files.ours import PROCESSOR
from geolora.files.reading import is_folder
from geolora.settings.train_config import TrainConfig

OF_BASE = (
    "config.json", "generation_config.json", "model*.safetensors", "pytorch_model*.bin",
    "*.index.json", *PROCESSOR,
)  # fmt: skip
"""Files of a model folder that transformers reads; a note beside them is no part of a base."""
BEGINNING = 1 << 20
"""Bytes of a file that 0.1.0 hashed."""


def run_id(config: TrainConfig, data_id: str, base: str) -> str:
    """A hash of the settings, data and base of a run; where it writes to does not matter.

    Args:
        data_id: what `Data.digest` gives. base: what `base_id` gives.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in ("output", "overwrite")}
    text = json.dumps([settings, data_id, base])
    return hashlib.sha256(text.encode()).hexdigest()


def base_id(model: str) -> str:
    """What tells one base model from another.

    For a folder a hash of every byte of what transformers reads of it; for a name on the Hub the name
    and, where it can be found out, the revision.
    """
    folder = Path(model)
    if not is_folder(folder):
        return _with_revision(model)
    every = (path for path in folder.iterdir() if path.is_file())
    read = sorted(p for p in every if any(fnmatchcase(p.name, name) for name in OF_BASE))
    with ThreadPoolExecutor() as threads:  # hashing does not hold the interpreter
        hashes = threads.map(_digest_of, read)
        found = [[path.name, of] for path, of in zip(read, hashes, strict=True)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def base_id_of_0_1(model: str) -> str:
    """The same as 0.1.0 wrote it down: sizes of all files of the folder, and how they begin."""
    folder = Path(model)
    if not is_folder(folder):
        return model
    result = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        result.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            result.update(file.read(BEGINNING))
    return result.hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    result = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            result.update(block)
    return result.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what made a result."""
    ours, *others = "geolora", "torch", "transformers", "peft"
    return {
        ours: metadata.version(ours),
        "python": sys.version.split()[0],
        **{name: metadata.version(name) for name in others},
    }


def _digest_of(path: Path) -> str:
    """SHA-256 of a file, computed once per process while the file is not written to."""
    status = path.stat()
    return _known_digest(path.absolute(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1000)
def _known_digest(path: Path, size: int, written: int) -> str:  # noqa: ARG001
    return digest(path)


@lru_cache(maxsize=1000)  # the hub is asked once per process
def _with_revision(name: str) -> str:
    """A name on the Hub with the revision that is loaded, by the folder its config.json is cached in."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(name, "config.json")
    except (OSError, ValueError):  # no such model, or no network: loading it says so
        return name
    return f"{name}@{Path(path).parent.name}" if path else name
