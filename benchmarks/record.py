"""What every benchmark writes beside its numbers: how they were made."""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from geolora.training.identity import versions

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"


def _git(*words: str) -> str:
    root = Path(__file__).parents[1]
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()


# taken when the program starts: that is the code that runs, whatever is committed meanwhile
COMMIT = _git("rev-parse", "HEAD")
DIRTY = bool(_git("status", "--porcelain", "--", "src", "benchmarks/*.py"))


def write(name: str, results: Any) -> Path:
    """results/<name>.json: the command, versions, machine, commit, and the results."""
    import torch

    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {
        # of a path only the name: where it lies is nobody else's
        "command": " ".join(
            ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
            + [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
        ),
        "versions": versions(),
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "commit": COMMIT,
        "dirty": DIRTY,
        "results": results,
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path
