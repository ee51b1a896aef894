"""What works with what: every task over every architecture, from `train` to stock peft in a fresh process.

docs/what_works.json says what each cell must give: "works", or the one line it ends in. `python
tests/test_matrix.py` writes it anew, with names of architectures those rows alone.
"""

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import geolora
from architectures import CELLS, model_folder, write_rows
from geolora.errors import GeoloraError
from geolora.settings.train_config import TrainConfig
from geolora.training import run as training

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TABLE = Path(__file__).parents[1] / "docs" / "what_works.json"
QUICK = [
    ("Roberta", "text-classification"),
    ("ModernBert", "token-classification"),
    ("XLNet", "text-regression"),
    ("Mixtral", "causal-lm"),
    ("Bart", "text-classification"),
    ("ResNet", "image-classification"),
]
"""Cells of the default run; the others are run by `make guards`."""
STEPS = 3
RELOAD = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
from peft import PeftModel
for line in sys.stdin:
    kind, base, labels, folder = line.strip().split("|")
    auto = getattr(transformers, kind)
    base = auto.from_pretrained(base, **({"num_labels": int(labels)} if labels else {}))
    if getattr(base.config, "pad_token_id", 0) is None:
        base.config.pad_token_id = transformers.AutoTokenizer.from_pretrained(folder + "/adapter").pad_token_id
    model = PeftModel.from_pretrained(base, folder + "/adapter").eval()
    with torch.no_grad():
        logits = model(**torch.load(folder + "/inputs.pt")).logits
    torch.save(logits, folder + "/logits.pt")
    print("done", flush=True)
"""
"""Stock transformers and peft alone."""
KINDS = {
    "text-classification": "AutoModelForSequenceClassification",
    "text-regression": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
    "causal-lm": "AutoModelForCausalLM",
}


class Bench:
    """Files for all tasks, models made once, and a fresh process that loads what was trained."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tasks, self.reloader = folder, write_rows(folder), None

    def model(self, name: str) -> Path:
        """The base model of an architecture."""
        path = self.folder / name
        return path if path.exists() else model_folder(name, path)

    def reload(self, kind: str, base: Path, labels: int | None, folder: Path) -> torch.Tensor:
        """Logits of the adapter in a folder, on the inputs there, as stock peft computes them."""
        if self.reloader is None:
            self.reloader = subprocess.Popen(
                [sys.executable, "-c", RELOAD], stdin=-1, stdout=-1, stderr=-1, text=True
            )
        assert self.reloader.stdin is not None
        assert self.reloader.stdout is not None
        self.reloader.stdin.write(f"{kind}|{base}|{labels or ''}|{folder}\n")
        self.reloader.stdin.flush()
        if self.reloader.stdout.readline() != "done\n":
            raise AssertionError(self.reloader.communicate()[1][-2000:])
        return torch.load(folder / "logits.pt")

    def close(self) -> None:
        """End the fresh process."""
        if self.reloader is not None:
            self.reloader.kill()
            self.reloader.communicate()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("matrix"))
    yield made
    made.close()


@pytest.mark.parametrize(
    "name, task",
    [
        pytest.param(*cell, id=" ".join(cell), marks=[] if cell in QUICK else pytest.mark.guard)
        for cell in CELLS
    ],
)
def test_cell(bench: Bench, tmp_path: Path, name: str, task: str) -> None:
    assert outcome(bench, tmp_path, name, task) == json.loads(TABLE.read_text())[name][task]


def outcome(bench: Bench, folder: Path, name: str, task: str) -> str:
    """ "works", or the line a cell ends in without its paths; asserts what must hold where it works."""
    base = bench.model(name)
    settings: dict[str, Any] = {
        "model": str(base), "task": task, **bench.tasks[task], "rank": 2, "max_steps": STEPS, "batch_size": 8,
    }  # fmt: skip
    seen: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, task, seen)
        try:
            training.run(TrainConfig(**settings, output=str(folder / "whole")))
        except GeoloraError as error:
            return str(error).replace(str(base), name)
    model, out = seen["model"].eval(), folder / "whole"

    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, STEPS)
        config = TrainConfig(**settings, save_every=STEPS - 1, output=str(folder / "stopped"))
        with pytest.raises(KeyboardInterrupt):
            training.run(config)
    training.run(config)
    weights = "adapter/adapter_model.safetensors"
    whole, gone_on = load_file(out / weights), load_file(folder / "stopped" / weights)
    assert whole.keys() == gone_on.keys()
    assert all(torch.equal(whole[key], gone_on[key]) for key in whole), "going on is exact"

    assert geolora.verify(out / "adapter")
    assert {row.layer for row in geolora.inspect(out / "adapter")} == set(geolora.ranks(model))
    inputs = {k: v.to(model.device) for k, v in seen["batch"].items() if k != "labels"}
    torch.save(inputs, out / "inputs.pt")
    with torch.no_grad():
        wanted = model(**inputs).logits
    labels = None if task == "causal-lm" else wanted.shape[-1]
    got = bench.reload(KINDS[task], base, labels, out)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)

    one = {**settings, "init": "lora-one", "max_steps": 1}
    training.run(TrainConfig(**one, output=str(folder / "one")))
    return "works"


def watch(patch: pytest.MonkeyPatch, task: str, seen: dict[str, Any]) -> None:
    """Keep the trained model, and the longest batch it was trained on."""
    predict = training.TASKS[task].predict

    def kept(trainer: Any, *given: Any) -> Any:
        seen["model"] = trainer.model
        seen["batch"] = next(iter(trainer.get_train_dataloader()))
        return predict(trainer, *given)

    patch.setattr(training.TASKS[task], "predict", kept)


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Interrupt a run before the optimizer's step of a number."""
    real, left = geolora.GeoLoRA.step, [step]

    def counted(self: Any, closure: None = None) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        real(self, closure)

    patch.setattr(geolora.GeoLoRA, "step", counted)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        only = sys.argv[1:] or [name for name, _ in CELLS]
        every, found = Bench(Path(place)), json.loads(TABLE.read_text())
        for name, task in CELLS:
            if name not in only:
                continue
            told = outcome(every, Path(place) / f"{name}-{task}", name, task)
            found.setdefault(name, {})[task] = told
            sys.stderr.write(f"{name} {task}: {told}\n")
        every.close()
    TABLE.write_text(json.dumps(found, indent=1) + "\n")
