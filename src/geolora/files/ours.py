"""What geolora writes: how its folders are known as ours, and the names in them that may be removed.

| folder     | how it is known as ours                     | what of it is ours         |
|------------|---------------------------------------------|----------------------------|
| run        | run.json with the settings of a run         | `RUN`                      |
| demo       | demo.json, `{}` or the demo's results       | `DEMO`                     |
| adapter    | geolora/probes.safetensors                  | `ADAPTER`                  |
| comparison | comparison.json, `{}` or with rows          | nothing: never removed     |

Whatever else lies in such a folder stays when geolora removes or replaces what it wrote there.
"""

import contextlib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from geolora.files.reading import read_json
from geolora.files.writing import PARTIAL

LOCK = ".lock"
"""Ends the name of a file that is held by the process that works in a folder."""
FILE: dict[str, Any] = {}
"""Stands for a file in the layouts below; any other value is what lies in a folder."""


def _files(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), FILE)


PROCESSOR = _files(
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt "
    "merges.txt bpe.codes *.model *.spm *.tiktoken chat_template.jinja chat_template.json "
    "preprocessor_config.json processor_config.json video_preprocessor_config.json"
)
"""What tokenizers and image processors save."""
ADAPTER: dict[str, Any] = {
    **PROCESSOR,
    **_files("adapter_model.safetensors .tmp?????? README.md adapter_config.json"),
    "geolora": _files("probes.safetensors export.json"),
}
CHECKPOINT: dict[str, Any] = {
    **ADAPTER,
    **_files("optimizer.pt optimizer.bin scheduler.pt scaler.pt rng_state*.pth trainer_state.json"),
    **_files("training_args.bin seconds.json geolora.json"),
}
"""What Trainer saves, and we beside it."""
RUN: dict[str, Any] = {
    **_files(
        "report.json history.json labels.json step_size.json config.yaml run.json report.html ranks.png"
    ),
    **_files(".adapter.lock"),
    **dict.fromkeys(["adapter", ".adapter.partial", ".adapter.replaced", "start"], ADAPTER),
    "checkpoints": {"checkpoint-*": CHECKPOINT, "tmp-checkpoint-*": CHECKPOINT},
}
RUN_MARK, DEMO_MARK, COMPARISON_MARK = "run.json", "demo.json", "comparison.json"
DEMO: dict[str, Any] = {"table.txt": FILE, "lora": RUN, "geolora": RUN, DEMO_MARK: FILE}
SEAL = "geolora.json"
"""Says that a checkpoint is whole; written last and removed first."""
MARKS = ("probes.safetensors", "adapter_config.json", RUN_MARK, DEMO_MARK)
"""Written last and removed last, in this order: while one is there, the folder is known for what it is."""


def holds(folder: Path, kind: str) -> bool:
    """Whether geolora wrote a folder, by the mark in it; kinds are those of the table above."""
    if kind == "adapter":
        return (folder / "geolora" / "probes.safetensors").is_file()
    keys = {"run": {"model", "train", "method"}, "demo": {"floor"}, "comparison": {"rows"}}[kind]
    try:
        mark = read_json(folder / f"{kind}.json")
    except (OSError, ValueError):
        return False
    begun = mark == {} and kind != "run"
    return isinstance(mark, dict) and (begun or keys <= mark.keys())


def is_empty(folder: Path) -> bool:
    """Whether there is nothing in a folder but what an interrupted start of ours leaves."""
    return folder.is_dir() and all(path.name.endswith((LOCK, PARTIAL)) for path in folder.iterdir())


def remove_written(folder: Path, layout: dict[str, Any], but: str = "") -> None:
    """Remove from a folder what geolora wrote, its mark last, and the folder where nothing is left in it.

    Files and folders of other names stay. Of a link the link is removed, not what it leads to.

    Args:
        folder: need not exist. layout: what is ours in it: `RUN`, `ADAPTER` and so on.
        but: a name that stays, the mark of a folder that is written again.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir(), key=place_in_order):
        name = path.name if path.name in layout else path.name.removesuffix(PARTIAL)
        inner = entry(layout, name)
        if inner is None or path.name == but:
            continue
        if path.is_symlink() or (path.is_file() and inner is FILE):
            path.unlink()
        elif inner is not FILE:
            remove_written(path, inner)
    with contextlib.suppress(OSError):  # something else lies in it, or it is a link
        folder.rmdir()


def entry(layout: dict[str, Any], name: str) -> dict[str, Any] | None:
    """What a layout says of a name: `FILE`, the layout of a folder, or None for what is not ours."""
    return next((layout[pattern] for pattern in layout if fnmatchcase(name, pattern)), None)


def place_in_order(path: Path) -> int:
    """Marks come last, a seal first."""
    return MARKS.index(path.name) if path.name in MARKS else -1 - (path.name == SEAL)
