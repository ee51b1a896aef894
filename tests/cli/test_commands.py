"""The command line as its user calls it: results, one-line errors, exit codes."""

import csv
import errno
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from geolora.cli.__main__ import main
from geolora.settings.train_config import TrainConfig
from models import tiny_bert
from rows import reviews

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny_bert(folder / "model")
    train, held_out = reviews(120), reviews(60, seed=1)
    for name, rows in (("train", train), ("dev", held_out)):
        text = "\n".join(json.dumps(row) for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.write(text)
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"text": "the film"}\n{"text": \n')
    (folder / "one.jsonl").write_text("\n".join(json.dumps({**r, "label": "good"}) for r in train))
    (folder / "gap.jsonl").write_text('{"text": "the film", "label": "good"}\n{"label": "bad"}')
    (folder / "nan.jsonl").write_text('{"text": "the film", "label": NaN}')
    (folder / "bom.csv").write_text(
        "\ufefftext,label\n" + "the film was good,good\nthe plot was bad,bad\n" * 20
    )
    (folder / "latin.csv").write_bytes("text,label\ncaf\xe9,1\n".encode("latin-1"))
    (folder / "new.jsonl").write_text(json.dumps({"text": "the film", "label": "goods"}))
    return folder


@pytest.fixture
def geolora(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable:
    """Run a command; `train` gets the files and small settings unless they are given."""

    def call(*words: object) -> tuple[int, str, str]:
        arguments = [str(word) for word in words]
        if arguments[:1] == ["train"]:
            for flag, value in (
                ("--model", files / "model"),
                ("--train", files / "train.jsonl"),
                ("--eval", files / "dev.jsonl"),
                ("--output", tmp_path / "out"),
                ("--max-steps", 20),
                ("--batch-size", 16),
                ("--rank", 4),
            ):
                if flag not in arguments:
                    arguments += [flag, str(value)]
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


REPORT = {
    "method", "task", "metric", "value", "lr", "train_loss", "steps", "seconds", "seconds_per_step",
    "trainable_parameters", "adapter_parameters", "exported_parameters", "ranks",
    "peak_memory_bytes", "seed", "versions", "command",
}  # fmt: skip


def test_train_writes_an_adapter_that_stock_peft_loads(
    geolora: Callable, files: Path, tmp_path: Path
) -> None:
    code, out, err = geolora("train", "--max-steps", 300, "--lr", "0.005", "--budget", "1200")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report.keys() == REPORT
    assert report["value"] > 0.9
    assert report["adapter_parameters"] <= 1200
    assert f"{report['value']:.4f}" in out
    assert out.endswith(f"{tmp_path}/out/report.html\n")
    assert f"{report['value']:.4f}" in (tmp_path / "out" / "report.html").read_text()
    assert f"{report['adapter_parameters']:,} parameters of a budget of 1,200" in out
    assert f"parameters={report['adapter_parameters']:,} of 1,200" in err
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert history[-1]["rank"] == sum(report["ranks"].values())
    assert not (tmp_path / "out" / "checkpoints").exists()
    # from the files alone, as anyone would
    base = AutoModelForSequenceClassification.from_pretrained(files / "model", num_labels=2)
    model = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "adapter")
    names = json.loads((tmp_path / "out" / "labels.json").read_text())
    rows = reviews(60, seed=1)
    with torch.no_grad():
        logits = model(
            **tokenizer([r["text"] for r in rows], padding=True, return_tensors="pt")
        ).logits
    hits = [names[int(i)] == row["label"] for i, row in zip(logits.argmax(-1), rows, strict=True)]
    assert sum(hits) / len(hits) == pytest.approx(report["value"])


@pytest.mark.parametrize("suffix", ["csv", "jsonl.gz"])
def test_train_lora_on_pairs_of_other_formats(
    geolora: Callable, files: Path, tmp_path: Path, suffix: str
) -> None:
    code, _, err = geolora(
        "train", "--method", "lora", "--text-pair", "other", "--lr", "3e-3",
        "--train", files / f"train.{suffix}", "--eval", files / f"dev.{suffix}",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["ranks"].values()) == {4}
    assert report["adapter_parameters"] == report["exported_parameters"]


def test_train_finds_its_step_size_and_says_it(
    geolora: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The word auto and no word are the same; a search that is interrupted leaves a run that can be started again."""
    import geolora.training.step_size as step_size

    def stops(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(step_size, "find_lr", stops)
        assert geolora("train")[0] == 130
    assert not (tmp_path / "out" / "step_size.json").exists()
    code, out, err = geolora("train")
    assert code == 0, err
    search, report = (
        json.loads((tmp_path / "out" / name).read_text())
        for name in ("step_size.json", "report.json")
    )
    assert len(search["curve"]) == 5, "a quarter of the steps"
    assert report["lr"] == search["lr"]
    assert f"of size {search['lr']:.2g}" in out
    assert "Step size" in (tmp_path / "out" / "report.html").read_text()
    assert geolora("train", "--lr", "auto", "--output", tmp_path / "auto")[0] == 0
    assert json.loads((tmp_path / "auto" / "step_size.json").read_text()) == search
    assert geolora("train", "--lr", "0.01", "--output", tmp_path / "given")[0] == 0
    assert not (tmp_path / "given" / "step_size.json").exists()
    assert geolora("train", "--max-steps", 4, "--output", tmp_path / "short")[0] == 0
    assert json.loads((tmp_path / "short" / "report.json").read_text())["lr"] == 7e-3


def test_train_regression(geolora: Callable, tmp_path: Path) -> None:
    code, _, err = geolora(
        "train", "--task", "text-regression", "--label", "score",
        "--lr", "0.007", "--max-steps", 300, "--tail", 0,
    )  # fmt: skip
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["metric"] == "pearson"
    assert report["value"] > 0.8


def test_train_is_reproducible_and_goes_on_where_it_was_stopped(
    geolora: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import geolora.optim.geolora as optim

    whole = tmp_path / "whole"
    assert geolora("train", "--output", whole, "--save-every", 5)[0] == 0
    wanted = json.loads((whole / "report.json").read_text())
    step, done = optim.GeoLoRA.step, [0]

    def stopping(self: optim.GeoLoRA, closure: None = None) -> None:
        done[0] += 1
        if done[0] == 5 + 13:  # after the search for a step size
            raise KeyboardInterrupt
        step(self, closure)

    monkeypatch.setattr(optim.GeoLoRA, "step", stopping)
    code, _, err = geolora("train", "--save-every", 5)
    assert code == 130
    assert "stopped" in err
    assert not (tmp_path / "out" / "report.json").exists()
    monkeypatch.setattr(optim.GeoLoRA, "step", step)
    seen = []
    monkeypatch.setattr(
        optim.GeoLoRA, "step", lambda self, closure=None: (seen.append(1), step(self, closure))[1]
    )
    assert geolora("train", "--save-every", 5)[0] == 0
    assert len(seen) == 10, "from the checkpoint at step 10"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {k: report[k] for k in ("value", "ranks")} == {k: wanted[k] for k in ("value", "ranks")}


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "--train", "{files}/trian.jsonl"], "`--train`.*does not exist. Did you mean `train.jsonl`?"),
        (["train", "--train", "{files}/model"], "`--train` must be a file"),
        (["train", "--train", "{files}/model/config.json"], "must end in .jsonl, .jsonl.gz, .csv"),
        (["train", "--train", "{files}/empty.jsonl"], "`--train` must have rows; .* is empty"),
        (["train", "--train", "{files}/broken.jsonl"], "line 2 is not JSON"),
        (["train", "--train", "{files}/one.jsonl"], "two classes or more; got ['good']"),
        (["train", "--train", "{files}/gap.jsonl"], "no column `text` (row 2)"),
        (["train", "--eval", "{files}/new.jsonl"], "label `goods`.*Did you mean `good`?"),
        (["train", "--text", "txt"], "no column `txt`.*Did you mean `text`?"),
        (["train", "--label", "lable"], "no column `lable`.*Did you mean `label`?"),
        (["train", "--text-pair", "othr"], "no column `othr`.*Did you mean `other`?"),
        (["train", "--text", "score"], "column `score` must hold text; row 1"),
        (["train", "--task", "text-regression"], "must hold finite numbers; row 1 of train.jsonl has"),
        (["train", "--report-to", "tensorbord"], "got tensorbord. Did you mean `tensorboard`?"),
        (["train", "--metric", "pearson"], "`--metric` must be one of accuracy, matthews, f1, macro_f1 for text-c"),
        (["train", "--task", "text-clasification"], "`--task`.*Did you mean `text-classification`?"),
        (["train", "--method", "geolara"], "`--method`.*Did you mean `geolora`?"),
        (["train", "--model", "{files}/nothing"], "`--model`: .*nothing cannot be loaded"),
        (["train", "--rank", "33"], "geolora: rank must be at most min(d_out, d_in); got r=33 for 32 x 32"),
        (["train", "--rank", "0"], "`--rank` must be above 0; got 0"),
        (["train", "--start-rank", "5"], "`start_rank`.*got 5"),
        (["train", "--budget", "99"], "`budget` must hold one direction in every layer.*got 99"),
        (["train", "--method", "lora", "--budget", "9999"], "`--budget` belongs to geolora, lora-then-truncate"),
        (["train", "--tail", "1.5"], "`tail` must be None or in [0, 1); got 1.5"),
        (["train", "--lr", "fast"], "`--lr` must be a number or auto; got 'fast'"),
        (["train", "--lr", "x" * 9999], "`--lr` must be a number or auto; got 'xxx"),
        (["train", "--lr"], "`--lr` must have a value after it. See geolora train --help."),
        (["train", "--lora-r=8"], "unknown argument `--lora-r`. Did you mean `--rank`?"),
        (["train", "--load-in-4bit"], "unknown argument `--load-in-4bit`. There is no such flag yet. See"),
        (["train", "--bugdet", "9"], "unknown argument `--bugdet`. Did you mean `--budget`?"),
        (["train", "--output", "{files}"], "`--output`: .* exists. Choose another folder"),
        (["train", "--task", "text-regression", "--train", "{files}/nan.jsonl"], "finite numbers; row 1"),
        (["train", "--train", "{files}/latin.csv"], "latin.csv cannot be read"),
        (["train", "--max-length", "65"], "`--max-length` must be at most 64; got 65"),
        (["train", "--seed", "5000000000"], "`--seed` must be 0 or above and below 2^32; got 5000000000"),
        (["train", "--train-rows", "0"], "`--train-rows` must be above 0; got 0"),
        (["train", "--config", "{files}/none.yaml"], "none.yaml cannot be read"),
        (["train", "--config", "{files}/empty.jsonl"], "must be a mapping of settings"),
        (["compare", "{files}/none.yaml"], "none.yaml cannot be read"),
        ([""], "unknown command ``"),
        (["train", "--seed", "-1"], "`--seed` must be 0 or above and below 2^32; got -1"),
        (["train", "--epochs", "inf"], "`--epochs` must be finite"),
        (["train", "--method", "lora", "--lr", "-1"], "`--lr` must be a number >= 0; got -1.0"),
        (["train", "--output", "{files}/train.csv/out"], "cannot be made in"),
        (["train", "--output", "{files}", "--overwrite"], "holds .*, which is read"),
        (["train", "--output", "{files}/..", "--overwrite"], "holds .*, which is read"),
        (["train", "--train", "{files}", "--output", "{files}/out"], "lies in .*, which is read"),
        (["train", "--output", "a\udcff"], "`--output`: must be a path in UTF-8"),
        (["train", "--eval", "a\udcff"], "`--eval` must be a path in UTF-8"),
        (["train", "--output", "{files}/model", "--overwrite", "--model", "hub"], "is no run that was written by geolora"),
        (["demo", "--steps", "0", "--output", "{out}"], "`--steps` must be above 0"),
        (["tarin"], "unknown command `tarin`. Did you mean `train`?"),
        ([], "the following arguments are required: COMMAND"),
        (["inspect", "{files}", "--tail", "1"], "inspect: `tail` must be in [0, 1); got 1.0"),
        (["inspect", "{files}", "--tail", "nan"], "inspect: `tail` must be in [0, 1); got nan"),
        (["inspect", "{files}", "--budget", "many"], "`--budget` must be a whole number; got 'many'"),
        (["inspect", "{files}", "--figures", "{files}/train.csv"], "`--figures` must be a folder; .*train.csv is a file"),
        (["inspect", "{files}"], "must be a PEFT adapter folder; .* has no adapter_config.json"),
        (["verify", "{files}"], "must be a PEFT adapter folder"),
        (["export", "{files}", "{out}"], "must be a PEFT adapter folder"),
        (["export", "{files}", "{files}"], "must be a PEFT adapter folder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(
    geolora: Callable, files: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    import re

    before = sorted(path.name for path in files.iterdir())
    code, out, err = geolora(*[w.format(files=files, out=tmp_path / "out") for w in words])
    assert code == 2
    assert out == ""
    line = next(line for line in err.splitlines() if line.startswith("geolora: "))
    assert err.strip().endswith(line), "nothing after it"
    assert len(err.strip().splitlines()) == 1, err
    assert not line.startswith("geolora: geolora:")
    assert len(line) < 700
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    assert re.search(pattern, line), line
    assert not (tmp_path / "out").exists(), "nothing half-written"
    assert sorted(path.name for path in files.iterdir()) == before


def test_inspect_export_verify(geolora: Callable, files: Path, tmp_path: Path) -> None:
    assert geolora("train", "--lr", "0.02", "--tail", "0.05")[0] == 0
    adapter = tmp_path / "out" / "adapter"
    ranks = json.loads((tmp_path / "out" / "report.json").read_text())["ranks"]

    code, out, _ = geolora("verify", adapter)
    assert code == 0
    assert f"{len(ranks)} layers are right" in out

    code, out, _ = geolora("inspect", adapter)
    assert code == 0
    for name, rank in ranks.items():
        line = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        shape, after = line[len(name) :].strip().split("  ", 1)
        assert " x " in shape
        assert int(after.split()[0]) == rank
    code, out, _ = geolora("inspect", adapter, "--json", "--tail", "0.9")
    assert {row["layer"]: row["rank"] for row in json.loads(out)} == ranks

    code, out, _ = geolora("export", adapter, tmp_path / "small", "--layout", "compact")
    assert code == 0
    assert "compact" in out
    assert geolora("verify", tmp_path / "small", "--base", files / "model")[0] == 0
    code, _, err = geolora("export", adapter, tmp_path / "one", "--rank", "1")
    assert code == 2
    assert re.search(r"`rank` 1 cuts \d+% of what was trained, `max_error` allows 5%. Give", err)
    assert not (tmp_path / "one").exists()
    words = ["--rank", "1", "--max-error", "1"]
    code, out, _ = geolora("export", adapter, tmp_path / "one", *words)
    assert code == 0
    error = float(re.findall("relative error (.*)", out)[0])
    code, out, _ = geolora("verify", tmp_path / "one")
    assert code == 0
    assert f"export left out {error:.1%} of what was trained" in out
    assert geolora("export", adapter, tmp_path / "one", "--rank", "99")[0] == 2
    # an export of what had lost something says what both have lost
    assert geolora("export", tmp_path / "one", tmp_path / "two", "--layout", "compact")[0] == 0
    assert (
        f"export left out {error:.1%} of what was trained" in geolora("verify", tmp_path / "two")[1]
    )
    (tmp_path / "two" / "geolora" / "export.json").write_text('{"error": "much"}')
    assert (
        "`error` must be a number from 0 to 1; got 'much'" in geolora("verify", tmp_path / "two")[2]
    )


def test_export_onto_its_input_and_around_it(geolora: Callable, tmp_path: Path) -> None:
    """The adapter may be replaced by its own export; a folder that holds it may not."""
    assert geolora("train", "--max-steps", "3")[0] == 0
    out, adapter = tmp_path / "out", tmp_path / "out" / "adapter"
    (adapter / "thesis.tex").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for given, message in (
        ([adapter, out], "holds .*adapter, which is read"),
        ([out / "adapter", out / "..", "--base", "hub/name"], "holds .*adapter, which is read"),
        ([adapter, adapter / ".." / "adapter", "--base", adapter / "x"], "must be a model folder"),
    ):
        code, _, err = geolora("export", *given, "--overwrite")
        assert code == 2
        assert re.search(message, err), err
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert geolora("export", adapter, adapter, "--overwrite", "--layout", "compact")[0] == 0
    assert (adapter / "thesis.tex").read_text() == "mine"
    assert geolora("verify", adapter)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(
        {p.relative_to(out).parts[0] for p in before}
    )


def test_train_overwrites_its_own_files_only(geolora: Callable, tmp_path: Path) -> None:
    assert geolora("train", "--max-steps", "3")[0] == 0
    out = tmp_path / "out"
    for name in ("thesis.tex", "adapter/notes.md", "mine/report.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    (out / "adapter" / "added_tokens.json").write_text("of the old run")
    assert geolora("train", "--max-steps", "2", "--overwrite")[0] == 0
    assert json.loads((out / "report.json").read_text())["steps"] == 2
    for name in ("thesis.tex", "adapter/notes.md", "mine/report.json"):
        assert (out / name).read_text() == "mine"
    assert not (out / "adapter" / "added_tokens.json").exists()


def test_a_failed_start_can_be_started_again(
    geolora: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the mark of the new run is written: the old one is still there to know the folder by."""
    assert geolora("train", "--max-steps", "3")[0] == 0

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("geolora.training.resume.write_json", full)
        code, _, err = geolora("train", "--max-steps", "2", "--overwrite")
        assert (code, "no space left" in err) == (2, True)
    assert geolora("train", "--max-steps", "2", "--overwrite")[0] == 0


def test_an_error_amid_training_has_a_line_of_its_own(
    geolora: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("geolora.training.checkpoints.seal", full)
    code, _, err = geolora("train", "--max-steps", "3")
    assert code == 2
    assert [line for line in err.splitlines() if "geolora: " in line] == err.splitlines()[-1:]
    assert err.splitlines()[-1].startswith("geolora: `--output`:")


def test_inspect_shows_and_draws_what_a_budget_leaves(
    geolora: Callable, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert geolora("train", "--method", "lora", "--lr", "3e-3", "--max-steps", "4")[0] == 0
    adapter, drawn = tmp_path / "out" / "adapter", tmp_path / "figures"
    full = json.loads(geolora("inspect", adapter, "--json")[1])
    cost = {row["layer"]: row["d_out"] + row["d_in"] for row in full}
    budget = 2 * sum(cost.values())
    code, out, err = geolora("inspect", adapter, "--tail", "0", "--budget", budget, "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert sum(row["settled_rank"] * cost[row["layer"]] for row in rows) <= budget
    assert {row["tail_rank"] for row in rows} == {4}
    code, out, err = geolora("inspect", adapter, "--tail", "0", "--budget", budget)
    assert code == 0, err
    assert f"rank needed at tail 0 and budget {budget:,}\n" in out
    for row in rows:
        line = next(line for line in out.splitlines() if line.startswith(row["layer"]))
        after = line.split()
        assert after[4:6] == ["4", str(row["settled_rank"])]
        assert "█" in after[-1]
    assert not drawn.exists()

    pytest.importorskip("matplotlib", reason="the plots extra is not installed")
    code, out, err = geolora("inspect", adapter, "--figures", drawn)
    assert code == 0, err
    assert f"drawn: {drawn / 'ranks.png'}, {drawn / 'spectra.png'}" in out
    assert sorted(path.name for path in drawn.iterdir()) == ["ranks.png", "spectra.png"]
    code, out, err = geolora("inspect", adapter, "--figures", drawn)
    assert (code, out) == (2, "")
    assert "ranks.png exists. Choose another folder, or add --overwrite." in err
    (drawn / "ranks.png").write_text("old")
    assert geolora("inspect", adapter, "--figures", drawn, "--overwrite", "--json")[0] == 0
    assert (drawn / "ranks.png").read_bytes().startswith(b"\x89PNG")

    from geolora.report import figures

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(figures, "_spectra", full)  # the second of two
        code, out, err = geolora("inspect", adapter, "--figures", tmp_path / "full")
        assert (code, out) == (2, "")
        assert err.startswith(f"geolora: `--figures`: {tmp_path / 'full'}: there is no space left.")
        assert not any((tmp_path / "full").iterdir())
    for place in ("/proc/x/y", "/sys/x", adapter / "README.md" / "x"):
        code, out, err = geolora("inspect", adapter, "--figures", place)
        assert (code, out) == (2, "")
        assert f"`--figures`: {place} cannot be made in" in err
        assert len(err.splitlines()) == 1
        assert geolora("train", "--output", place)[0] == 2

    monkeypatch.setattr(figures, "find_spec", lambda _: None)
    code, out, err = geolora("inspect", adapter, "--figures", tmp_path / "more")
    assert (code, out) == (2, "")
    assert err == "geolora: `--figures` needs matplotlib. Run: pip install 'matplotlib>=3.9'.\n"
    assert not (tmp_path / "more").exists()
    assert geolora("inspect", adapter)[0] == 0


def test_export_keeps_the_old_folder_until_the_new_one_is_whole(
    geolora: Callable, tmp_path: Path
) -> None:
    assert geolora("train")[0] == 0
    adapter = tmp_path / "out" / "adapter"
    before = {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
    for words in (["--rank", "99"], ["--layout", "flat"]):
        assert geolora("export", adapter, adapter, "--overwrite", *words)[0] == 2
        assert {p.name: p.read_bytes() for p in adapter.iterdir() if p.is_file()} == before
    assert geolora("export", adapter, adapter, "--overwrite", "--layout", "compact")[0] == 0
    assert geolora("verify", adapter)[0] == 0
    (adapter / "adapter_model.safetensors").write_bytes(b"torn")
    for words in (["verify", adapter], ["inspect", adapter]):
        code, _, err = geolora(*words)
        assert code == 2
        assert "cannot be read" in err


def test_an_adapter_of_another_task_is_loaded_over_its_own_class(
    geolora: Callable, tmp_path: Path
) -> None:
    """Without a task type the class is the one the base was saved as."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    import geolora as library

    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    library.export(model, tmp_path / "adapter")
    assert geolora("verify", tmp_path / "adapter")[0] == 0
    code, out, _ = geolora("export", tmp_path / "adapter", tmp_path / "again")
    assert code == 0
    assert "largest rank 2" in out
    code, _, err = geolora("verify", tmp_path / "adapter", "--base", tmp_path / "adapter")
    assert code == 2
    assert "cannot be loaded" in err


@pytest.mark.parametrize("kind", ["distilbert", "deberta-v2", "bart"])
def test_models_whose_heads_differ(
    geolora: Callable, files: Path, tmp_path: Path, kind: str
) -> None:
    """New layers of any name are trained in full, saved, and not adapted."""
    import shutil

    from transformers import AutoConfig, AutoModel

    sizes = {
        "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48},
        "deberta-v2": {
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 48,
        },
        "bart": {
            "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
            "eos_token_id": 3,
        },
    }[kind]  # fmt: skip
    folder = tmp_path / kind
    shutil.copytree(files / "model", folder)
    config = AutoConfig.for_model(
        kind, vocab_size=24, max_position_embeddings=64, pad_token_id=0, **sizes
    )
    AutoModel.from_config(config).save_pretrained(folder)
    code, _, err = geolora("train", "--model", folder, "--max-steps", 6)
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    scores = []
    for seed in (
        1,
        2,
    ):  # a fresh base has other random layers; the file must bring the trained ones
        torch.manual_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        model = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "adapter")
        texts = [row["text"] for row in reviews(60, seed=1)]
        with torch.no_grad():
            scores.append(model(**tokenizer(texts, padding=True, return_tensors="pt")).logits)
    assert torch.equal(*scores)
    names = json.loads((tmp_path / "out" / "labels.json").read_text())
    rows = zip(scores[0].argmax(-1), reviews(60, seed=1), strict=True)
    assert sum(names[int(i)] == row["label"] for i, row in rows) / 60 == pytest.approx(
        report["value"]
    )


def test_an_unfinished_run_over_other_data_is_refused(
    geolora: Callable, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import geolora.optim.geolora as optim

    mine = tmp_path / "mine.jsonl"
    mine.write_bytes((files / "train.jsonl").read_bytes())

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(optim.GeoLoRA, "step", stop)
        assert geolora("train", "--train", mine)[0] == 130
    mine.write_text(mine.read_text().replace("good", "great"))
    code, _, err = geolora("train", "--train", mine)
    assert code == 2
    assert "unfinished run of the same flags over other data" in err or "does not occur" in err
    mine.write_bytes((files / "train.jsonl").read_bytes())
    assert geolora("train", "--train", mine)[0] == 0


def test_a_byte_order_mark_is_no_part_of_a_column(geolora: Callable, files: Path) -> None:
    code, _, err = geolora("train", "--train", files / "bom.csv", "--eval", files / "bom.csv")
    assert code == 0, err


@pytest.mark.parametrize("command", ["demo", "train", "inspect", "export", "verify"])
def test_help_shows_every_flag_and_an_example(geolora: Callable, command: str) -> None:
    code, out, _ = geolora(command, "--help")
    assert code == 0
    assert f"geolora {command}" in out.partition("examples:")[2]
    assert geolora("--version")[1].startswith("geolora 0.")


def test_help_shows_every_setting_once_under_a_heading() -> None:
    from geolora.settings.train_config import HEADINGS

    shown = [name for names in HEADINGS.values() for name in names]
    assert sorted(shown) == sorted(TrainConfig.__dataclass_fields__)
