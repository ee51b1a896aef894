"""`geolora compare`: the plan, the runs that are not repeated, and the numbers that follow."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from geolora.comparing import run as comparison
from geolora.comparing.plan import Cell, read_plan
from geolora.comparing.run import run_all, split
from geolora.comparing.summary import summarise
from geolora.errors import NonFiniteGradientError, OutputError, SettingError
from geolora.files.folders import alone
from geolora.report.comparison import table
from geolora.settings.train_config import TrainConfig
from geolora.tasks.task import Data, Rows
from geolora.training.run import Outcome
from rows import reviews

PLAN = """
output: {output}
common: {{model: m, max-steps: 3}}
tasks:
  one: {{train: {files}/train.jsonl, eval: {files}/dev.jsonl}}
  two: {{train: {files}/train.jsonl, eval: {files}/dev.jsonl, max_steps: 4, text: other}}
methods:
  lora: {{rank: 4, lr: [1e-3, 1e-2]}}
  ours: {{method: geolora, rank: 6, max_steps: 5}}
seeds: [0, 1]
choose_on: 0.25
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, rows in (("train", reviews(40)), ("dev", reviews(20, seed=1))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def plan_file(files: Path, text: str = PLAN) -> Path:
    path = files / "plan.yaml"
    path.write_text(text.format(files=files, output=files / "out"))
    return path


def test_the_plan_is_the_grid_and_nearer_settings_win(files: Path) -> None:
    plan = read_plan(plan_file(files))
    assert [cell.name for cell in plan.cells][:6] == [
        "one/lora/lr-0.001/seed-0",
        "one/lora/lr-0.01/seed-0",
        "one/ours/lr-default/seed-0",
        "two/lora/lr-0.001/seed-0",
        "two/lora/lr-0.01/seed-0",
        "two/ours/lr-default/seed-0",
    ]
    assert len(plan.cells) == 12
    assert plan.against == "lora"
    steps = {cell.name.split("/")[0] + cell.method: cell.config.max_steps for cell in plan.cells}
    assert steps == {"onelora": 3, "oneours": 5, "twolora": 4, "twoours": 5}
    assert plan.cells[1].config.lr == 1e-2
    assert plan.cells[2].config.method == "geolora"
    assert plan.cells[8].config.seed == 1


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("seeds:", "seed:", "unknown key `seed`. Did you mean `seeds`?"),
        ("seeds: [0, 1]", "seeds: 3", "`seeds` must be a list of whole numbers; got 3"),
        ("seeds: [0, 1]", "seeds: [0, 0]", "must not name a value twice"),
        ("seeds: [0, 1]", "seeds: [0, -1]", "`seeds` must be 0 or above and below 2.32; got -1"),
        ("seeds: [0, 1]", "seeds: [0, x]", "`seeds` must be a whole number; got the word 'x'"),
        ("output: {output}\n", "", "`output` must be given"),
        ("rank: 6", "rnak: 6", "methods: ours: unknown key `rnak`. Did you mean `rank`?"),
        (
            "rank: 6",
            "rank: six",
            "methods: ours: `rank` must be a whole number; got the word 'six'",
        ),
        ("rank: 6", "seed: 6", "methods: ours: `seed` belongs to the comparison"),
        ("rank: 6", "train_rows: 6", "methods: ours: `train_rows` belongs to a task"),
        ("[0, 1]", str([*range(30_000)]), "must make 100,000 runs at most. Take some out"),
        ("lr: [1e-3, 1e-2]", "lr: []", "`lr` must have one step size or more"),
        ("lr: [1e-3, 1e-2]", "lr: [fast]", "`lr` must be a number; got the word 'fast'"),
        ("choose_on: 0.25", "choose_on: 1.5", "`choose_on` must be between 0 and 1; got 1.5"),
        ("choose_on: 0.25", "against: dora", "`against`: unknown key `dora`"),
        (
            "max_steps: 4,",
            "max_steps: 4, max-steps: 4,",
            "`max-steps` is given twice|`max_steps` is",
        ),
        ("  lora:", "  ours:", "`ours` is given twice"),
        ("{{rank: 4, lr: [1e-3, 1e-2]}}", "8", "methods: lora must be a mapping"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line(files: Path, old: str, new: str, message: str) -> None:
    assert old in PLAN
    with pytest.raises(SettingError, match=message.replace("?", r"\?")):
        read_plan(plan_file(files, PLAN.replace(old, new)))


@pytest.mark.parametrize(
    "name",
    [
        "../../x", "/x", "a/b", "a\\b", "..", ".", "", " ", "a ", " a", "a.", "C:", "a\0b", "a\nb", "\x1b[2J", "nul",
        "COM1.txt", "a" * 101, "é" * 51, "\u202ex", "a|b", "\ud800",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["  two:", "  ours:"])
def test_a_name_is_that_of_one_folder(files: Path, kind: str, name: str) -> None:
    """Of a task and of a method: each run lies in a folder of theirs, and nowhere else."""
    path = plan_file(files)
    path.write_text(path.read_text().replace(kind, f"  {json.dumps(name)}:"))
    with pytest.raises(SettingError, match="must be a name that a folder can have|half of a") as e:
        read_plan(path)
    assert str(e.value).isprintable()


@pytest.mark.parametrize("one, other", [("  two:", "  One:"), ("  lora:", "  OURS:")])
def test_names_differ_by_more_than_case(files: Path, one: str, other: str) -> None:
    with pytest.raises(SettingError, match="would be one folder where a disk does not tell"):
        read_plan(plan_file(files, PLAN.replace(one, other)))


def test_plain_names_are_taken(files: Path) -> None:
    text = PLAN.replace("  two:", "  Ünïcode (2 of 3), r=8:").replace("  ours:", "  .one:")
    assert {(cell.task, cell.method) for cell in read_plan(plan_file(files, text)).cells} >= {
        ("Ünïcode (2 of 3), r=8", ".one")
    }


# ---- running ------------------------------------------------------------------------------------


def fake(config: TrainConfig, data: Data, choice: Rows | None) -> Outcome:
    """A training that knows `lr` / 1e-2 of the rows; at seed 1 and the larger lr it diverges."""
    if config.lr == 1e-2 and config.seed == 1 and config.text == "other":
        raise NonFiniteGradientError("GeoLoRA.step: gradients must be finite")
    share = {1e-3: 0.5, 1e-2: 0.75, None: 1.0}[config.lr]
    count = round(share * len(data.held_out))
    wrong = [1 - label for label in data.held_out.labels]
    predictions = [*data.held_out.labels[:count], *wrong[count:]]
    report = {
        "metric": "accuracy", "value": share, "train_loss": 1 - share, "seconds": 1.0,
        "seconds_per_step": 0.1, "adapter_parameters": 100, "exported_parameters": 120,
        "peak_memory_bytes": 1_000_000, "ranks": {"layer.0.query": 3}, "command": "secret",
    }  # fmt: skip
    return Outcome(report, [{"step": 1, "loss": 0.7}], predictions, data.held_out.labels, share)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    seen: list[TrainConfig] = []

    def train(config: TrainConfig, data: Data, choice: Rows | None) -> Outcome:
        seen.append(config)
        return fake(config, data, choice)

    monkeypatch.setattr(comparison, "train", train)
    return seen


def test_runs_are_made_once_and_what_is_missing_is_made(
    files: Path, trained: list[TrainConfig]
) -> None:
    plan = read_plan(plan_file(files))
    lines: list[str] = []
    summary = run_all(plan, lines.append)
    assert len(trained) == 12
    assert lines[0] == "12 runs, 0 of them done"
    assert lines[1].startswith("1/12  one/lora/lr-0.001/seed-0  accuracy 0.5000 (0.5000 on the")
    assert any("diverged" in line for line in lines)
    saved = json.loads((plan.output / "runs/one/ours/lr-default/seed-0.json").read_text())
    assert saved["settings"]["rank"] == 6
    assert "command" not in saved["report"]
    assert str(files / "out") not in (plan.output / "comparison.json").read_text()
    assert not (plan.output / "running").exists()

    (plan.output / "runs/two/ours/lr-default/seed-1.json").unlink()
    assert run_all(plan, lines.append) == summary
    assert len(trained) == 13
    assert trained[-1].text == "other"


def test_a_stopped_comparison_goes_on(
    files: Path, trained: list[TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = read_plan(plan_file(files))
    whole = comparison.train

    def stopping(config: TrainConfig, data: Data, choice: Rows | None) -> Outcome:
        if len(trained) == 5:
            raise KeyboardInterrupt
        return whole(config, data, choice)

    monkeypatch.setattr(comparison, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_all(plan, lambda _: None)
    monkeypatch.setattr(comparison, "train", whole)
    run_all(plan, lambda _: None)
    assert len(trained) == 12


def test_runs_of_other_settings_or_data_are_not_mixed_in(
    files: Path, trained: list[TrainConfig]
) -> None:
    run_all(read_plan(plan_file(files)), lambda _: None)
    other = PLAN.replace("rank: 6", "rank: 5")
    with pytest.raises(SettingError, match="was run with `rank` 6, now it is 5. Remove the file"):
        run_all(read_plan(plan_file(files, other)), lambda _: None)
    with pytest.raises(SettingError, match="was run on other data or another base"):
        run_all(read_plan(plan_file(files, PLAN.replace("0.25", "0.5"))), lambda _: None)
    (files / "out/runs/one/ours/lr-default/seed-0.json").write_text("{")
    with pytest.raises(SettingError, match="is not the file of a run. Remove it"):
        run_all(read_plan(plan_file(files)), lambda _: None)
    assert len(trained) == 12


def test_notes_stay_and_what_a_killed_process_left_goes(
    files: Path, trained: list[TrainConfig]
) -> None:
    plan = read_plan(plan_file(files))
    run_all(plan, lambda _: None)
    running, done = plan.output / "running", plan.cells[0]
    (plan.output / "runs" / f"{plan.cells[-1].name}.json").unlink()
    left = running / done.name / "adapter" / "geolora" / "probes.safetensors"
    left.parent.mkdir(parents=True)
    left.write_text("left")
    (running / "mine.md").write_text("mine")
    run_all(plan, lambda _: None)
    assert [path.name for path in running.rglob("*")] == ["mine.md"]

    (plan.output / "runs" / f"{plan.cells[-1].name}.json").unlink()
    folder = running / plan.cells[-1].name
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("mine")
    run_all(plan, lambda _: None)
    assert trained[-1].overwrite
    assert (folder / "thesis.tex").read_text() == "mine"


def test_an_output_that_is_a_file_or_in_use(files: Path, trained: list[TrainConfig]) -> None:
    plan = read_plan(plan_file(files))
    run_all(plan, lambda _: None)
    made = len(trained)
    (plan.output / "runs/one/ours/lr-default/seed-0.json").unlink()
    with alone(plan.output), pytest.raises(OutputError, match="another process works in"):
        run_all(plan, lambda _: None)
    shutil.rmtree(plan.output)
    plan.output.write_text("words")
    with pytest.raises(OutputError, match="is a file. Choose a folder"):
        run_all(plan, lambda _: None)
    assert len(trained) == made


def test_a_folder_of_something_else_is_left_alone(files: Path, trained: list[TrainConfig]) -> None:
    (files / "out").mkdir()
    (files / "out" / "thesis.tex").write_text("words")
    with pytest.raises(OutputError, match="is no comparison that was written by geolora"):
        run_all(read_plan(plan_file(files)), lambda _: None)
    assert not trained


def test_the_held_back_rows_are_the_same_for_all_and_not_trained_on() -> None:
    texts = [(str(i),) for i in range(50)]
    data = Data(Rows(texts, list(range(50))), Rows([("x",)], [0]), ["0", "1"])
    kept, back = split(data, 0.2)
    assert (len(kept.train), len(back.inputs)) == (40, 10)
    assert sorted(kept.train.inputs + back.inputs) == sorted(texts)
    assert [int(text) for (text,) in back.inputs] == back.labels
    assert split(data, 0.2)[1] == back
    with pytest.raises(SettingError, match="too few"):
        split(Data(Rows(texts[:1], [0]), Rows([], []), []), 0.5)


# ---- what follows -------------------------------------------------------------------------------


def result(
    task: str, method: str, lr: float | None, seed: int, hits: list[int] | None, choice: float = 0.5
) -> tuple[Cell, dict]:
    cell = Cell(task, method, lr, seed, TrainConfig())
    if hits is None:
        return cell, {"failure": "diverged"}
    value = sum(hits) / len(hits)
    report = {
        "metric": "accuracy", "value": value, "train_loss": 0.1, "seconds_per_step": 0.1 + seed,
        "adapter_parameters": 100 + seed, "exported_parameters": 200, "peak_memory_bytes": 10 + seed,
        "ranks": {"layer.0.q": 2},
    }  # fmt: skip
    history = [{"step": 1, "loss": 0.5}]
    return cell, {
        "settings": {"method": method}, "failure": None, "report": report, "choice": choice, "history": history,
        "predictions": hits, "targets": [1] * len(hits),
    }  # fmt: skip


def test_the_step_size_is_chosen_on_the_held_back_rows_alone() -> None:
    good, bad = [1] * 10, [1] * 5 + [0] * 5
    results = [
        result("t", "a", 0.1, 0, good, choice=0.6),  # better on the evaluation set
        result("t", "a", 0.2, 0, bad, choice=0.7),  # better on the rows for choosing
        result("t", "b", 0.1, 0, bad, choice=0.8),
        result("t", "b", 0.1, 1, bad, choice=0.8),
        result("t", "b", 0.3, 0, good, choice=0.9),
        result("t", "b", 0.3, 1, None),  # diverged once: not taken
    ]
    summary = summarise(results, "a")
    rows = {row["method"]: row for row in summary["rows"]}
    assert (rows["a"]["lr"], rows["a"]["value"]) == (0.2, 0.5)
    assert rows["b"]["lr"] == 0.1
    sweep = {(r["method"], r["lr"]): r for r in summary["learning_rates"]}
    assert sweep["b", 0.3]["diverged"] == 1
    assert sweep["a", 0.1]["value"] == 1.0
    assert rows["b"]["adapter_parameters"] == round(100.5)
    assert rows["b"]["seconds_per_step"] == pytest.approx(0.6)
    assert rows["b"]["peak_memory_bytes"] == 11
    assert rows["b"]["spread"] == 0.0
    assert "b " in table(summary)


def test_a_method_that_always_diverges_has_no_score() -> None:
    results = [result("t", "a", None, 0, [1, 0]), result("t", "b", 1.0, 0, None)]
    summary = summarise(results, "a")
    assert summary["rows"][1]["value"] is None
    assert "none (1 of 1 diverged)" in table(summary)


def test_the_interval_is_the_one_of_a_plain_bootstrap() -> None:
    generator = torch.Generator().manual_seed(5)
    rows, seeds = 80, 3
    ours = [(torch.rand(rows, generator=generator) < 0.8).int().tolist() for _ in range(seeds)]
    theirs = [(torch.rand(rows, generator=generator) < 0.7).int().tolist() for _ in range(seeds)]
    results = [result("t", "theirs", None, s, theirs[s]) for s in range(seeds)]
    results += [result("t", "ours", None, s, ours[s]) for s in range(seeds)]
    found = summarise(results, "theirs")["rows"][1]["difference"]

    gaps = torch.tensor(ours).double() - torch.tensor(theirs).double()  # (seeds, rows)
    draws = []
    for _ in range(4000):
        row = torch.randint(rows, (rows,), generator=generator)
        seed = torch.randint(seeds, (seeds,), generator=generator)
        draws.append(float(gaps[seed][:, row].mean()))
    low, high = torch.tensor(draws).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert found["mean"] == pytest.approx(float(gaps.mean()))
    assert found["low"] == pytest.approx(low, abs=0.01)
    assert found["high"] == pytest.approx(high, abs=0.01)
    assert found["seeds"] == 3


def test_the_mean_over_tasks_has_an_interval_of_its_own() -> None:
    """Two tasks of 60 rows: +0.2 and -0.1 on average; a method without a task has no mean."""
    generator = torch.Generator().manual_seed(6)
    shares = {"s": {"theirs": 0.6, "ours": 0.8}, "t": {"theirs": 0.8, "ours": 0.7}}
    rows, seeds, results, drawn = 60, 4, [], {}
    for task, of_task in shares.items():
        for method, share in of_task.items():
            hits = (torch.rand(seeds, rows, generator=generator) < share).int()
            drawn[task, method] = hits.double()
            results += [result(task, method, None, s, hits[s].tolist()) for s in range(seeds)]
    results.append(result("s", "third", None, 0, [1] * rows))
    summary = summarise(results, "theirs")
    theirs, ours = summary["means"]
    assert (theirs["method"], ours["method"]) == ("theirs", "ours")
    assert "difference" not in theirs
    gaps = [drawn[task, "ours"] - drawn[task, "theirs"] for task in shares]
    assert ours["value"] == pytest.approx(
        float(sum(drawn[task, "ours"].mean() for task in shares)) / 2
    )
    assert ours["difference"]["mean"] == pytest.approx(float(sum(gap.mean() for gap in gaps)) / 2)
    means = []
    for _ in range(4000):
        total = 0.0
        for gap in gaps:
            row = torch.randint(rows, (rows,), generator=generator)
            seed = torch.randint(seeds, (seeds,), generator=generator)
            total += float(gap[seed][:, row].mean())
        means.append(total / 2)
    low, high = torch.tensor(means).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert ours["difference"]["low"] == pytest.approx(low, abs=0.01)
    assert ours["difference"]["high"] == pytest.approx(high, abs=0.01)
    assert "mean  ours" in table(summary)


def test_runs_made_after_the_choice_do_not_change_it() -> None:
    results = [
        result("t", "a", 0.1, 0, [1, 0], choice=0.8),
        result("t", "a", 0.2, 0, [1, 1], choice=0.7),
        result("t", "a", 0.1, 1, [1, 1], choice=0.1),
    ]
    (row,) = summarise(results, "a")["rows"]
    assert (row["lr"], row["seeds"]) == (0.2, 1)
    results[2][1]["choice"] = None  # another seed at the step size that had been chosen
    (row,) = summarise(results, "a")["rows"]
    assert (row["lr"], row["seeds"], row["value"]) == (0.1, 2, 0.75)
    assert row["choice"] == 0.8


def test_only_common_seeds_are_paired() -> None:
    results = [
        result("t", "a", None, 0, [1, 1, 0, 0]),
        result("t", "a", None, 1, None),
        result("t", "b", None, 0, [1, 1, 1, 0]),
        result("t", "b", None, 1, [0, 0, 0, 0]),
    ]
    row = summarise(results, "a")["rows"][1]
    assert row["difference"]["mean"] == pytest.approx(0.25)
    assert row["difference"]["seeds"] == 1


def test_figures_are_drawn_from_the_file_alone(files: Path, trained: list[TrainConfig]) -> None:
    from geolora.report.comparison import figures

    plan = read_plan(plan_file(files))
    run_all(plan, lambda _: None)
    drawn = figures(plan.output)
    assert [path.name for path in drawn] == [
        "score_against_parameters.png", "learning_rates.png", "loss_curves.png", "rank_maps.png",
    ]  # fmt: skip
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_settings_stand_as_far_out_as_they_go(files: Path, trained: list[TrainConfig]) -> None:
    plan = read_plan(plan_file(files))
    summary = run_all(plan, lambda _: None)
    scopes = {(s["task"], s["method"]): s["values"] for s in summary["settings"]}
    assert scopes[None, None]["model"] == "m"
    assert scopes[None, None]["train"] == "train.jsonl", "no folder of the machine"
    assert scopes["one", None] == {"text": "text"}
    assert scopes["two", None] == {"text": "other"}
    assert scopes[None, "lora"] == {"method": "lora", "rank": 4, "lr": [1e-3, 1e-2]}
    assert scopes[None, "ours"] == {"method": "geolora", "rank": 6, "lr": [None]}
    assert scopes["two", "lora"] == {"max_steps": 4}
    assert str(files) not in (plan.output / "comparison.json").read_text()
    assert (summary["choose_on"], summary["seeds"]) == (0.25, [0, 1])
    assert [(f["task"], f["method"], f["lr"], f["seed"]) for f in summary["failures"]] == [
        ("two", "lora", 1e-2, 1)
    ]


def test_methods_that_differ_by_budget_alone_make_a_map() -> None:
    results = []
    for method, budget, rank in (("a", 10, 4), ("b", 20, 4), ("c", 30, 8), ("d", None, 4)):
        for lr in (0.1, 0.2):
            cell, run = result("t", method, lr, 0, None if lr == 0.2 else [1, 0])
            config = TrainConfig(budget=budget, rank=rank, lr=lr)
            results.append((cell._replace(config=config), run))
    (found,) = summarise(results, "d")["budgets"]
    assert (found["budgets"], found["lrs"]) == ([10, 20], [0.1, 0.2])
    fields = {
        (f["budget"], f["lr"]): (f["method"], f["value"], f["diverged"]) for f in found["fields"]
    }
    assert fields == {
        (10, 0.1): ("a", 0.5, 0), (10, 0.2): ("a", None, 1),
        (20, 0.1): ("b", 0.5, 0), (20, 0.2): ("b", None, 1),
    }  # fmt: skip


def test_scores_that_point_in_other_directions_have_no_mean() -> None:
    results = [result(task, "a", None, 0, [1, 0]) for task in ("s", "t")]
    assert len(summarise(results, "a")["means"]) == 1
    results[1][1]["report"]["metric"] = "perplexity"
    summary = summarise(results, "a")
    assert summary["means"] == []
    assert summary["lower_is_better"] == ["t"]
    assert "t: perplexity (lower is better)" in table(summary)
