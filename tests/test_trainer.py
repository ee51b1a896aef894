"""`for_trainer` in a stock Trainer: training, checkpoints, resume."""

import json
import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import geolora
from geolora.errors import SettingError
from geolora.trainer import progress_callback
from models import lora_net, pairs_of, tiny_bert
from rows import reviews

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("model"))


def trainer(folder: Path, out: Path, method: str = "geolora", **settings: object) -> Trainer:
    set_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [
        {**tokenizer(row["text"]), "labels": int(row["label"] == "good")} for row in reviews(64)
    ]
    made = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=12,
            per_device_train_batch_size=8,
            save_steps=5,
            logging_steps=1,
            report_to="none",
            warmup_steps=2,
            disable_tqdm=True,
            max_grad_norm=0.0,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        optimizer_cls_and_kwargs=geolora.for_trainer(method, **settings),
        callbacks=[progress_callback()],
    )
    geolora.log_ranks(made)
    return made


def test_geolora_in_a_stock_trainer_resumes_where_it_was(folder: Path, tmp_path: Path) -> None:
    settings = {"lr": 0.05, "prune_every": 6, "tail": 0.5}
    whole = trainer(folder, tmp_path / "a", **settings)
    whole.train()
    logs = [entry for entry in whole.state.log_history if "loss" in entry]
    assert logs[-1]["rank"] < logs[0]["rank"], "ranks changed before and after the checkpoint"
    assert logs[-1]["rank"] == sum(whole.optimizer.optimizer.settled_ranks().values())
    assert logs[-1]["learning_rate"] == pytest.approx(0.05 / 10), "group 0 is geometric"
    again = trainer(folder, tmp_path / "b", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-10"))
    for (name, p), (_, q) in zip(
        whole.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        assert torch.equal(p, q), name
    ours, theirs = (run.optimizer.optimizer.measures() for run in (whole, again))
    assert ours == theirs
    resumed = [entry for entry in again.state.log_history if "loss" in entry]
    assert resumed == logs


def test_what_is_reported_says_how_the_adapter_changes(folder: Path, tmp_path: Path) -> None:
    """A reporter, as tensorboard's is, sees the numbers; they are those of the factors."""
    seen: list[dict] = []

    class Reporter(TrainerCallback):
        def on_log(
            self, args: object, state: object, control: object, logs: dict, **_: object
        ) -> None:
            seen.append(dict(logs))

    run = trainer(folder, tmp_path, lr=0.05, prune_every=6, tail=0.5)
    run.callback_handler.callbacks.insert(1, Reporter())  # where Trainer puts those of report_to
    run.train()
    logs = [entry for entry in seen if "loss" in entry]
    layers = run.optimizer.optimizer.settled_ranks()
    for before, now in pairwise(logs):
        assert now["rank"] == before["rank"] + now["grown"] - now["pruned"]
        assert now["rank"] == sum(now[f"rank/{name}"] for name in layers)
    assert sum(entry["pruned"] for entry in logs) > 0
    assert logs[-1]["adapter_parameters"] == run.optimizer.optimizer.adapter_parameters()
    sigma = torch.cat([
        torch.linalg.svdvals(scale * B @ A)[: layers[name]]
        for name, A, B, scale in pairs_of(run.model)
    ]).detach()  # fmt: skip
    assert logs[-1]["sigma/largest"] == pytest.approx(float(sigma.max()), rel=1e-4)
    assert logs[-1]["sigma/median"] == pytest.approx(float(sigma.median()), rel=1e-3)
    assert logs[-1]["tangent_norm"] > 0


def test_lora_is_adamw_on_two_groups(folder: Path, tmp_path: Path) -> None:
    run = trainer(folder, tmp_path, "lora", lr=2e-3, rest_lr=5e-4)
    run.train()
    inner = run.optimizer.optimizer
    assert isinstance(inner, torch.optim.AdamW)
    assert [group["initial_lr"] for group in inner.param_groups] == [2e-3, 5e-4]
    assert "rank" not in json.dumps(run.state.log_history)


def test_the_factory_is_picklable_and_settings_are_checked() -> None:
    factory, settings = geolora.for_trainer("geolora", lr=1e-3, budget=None)
    assert pickle.loads(pickle.dumps(factory))() is geolora.GeoLoRA
    assert settings == {"lr": 1e-3, "budget": None}
    with pytest.raises(SettingError, match=r"`method`.*geolora.*'adalora'"):
        geolora.for_trainer("adalora")
    with pytest.raises(SettingError, match="`learning_rate` must be one of"):
        geolora.for_trainer("geolora", learning_rate=1.0)


def test_the_rate_of_training_arguments_is_taken_where_it_was_set(tmp_path: Path) -> None:
    def lr_of(
        method: str = "geolora", rate: float | None = None, **settings: object
    ) -> list[float]:
        given = {} if rate is None else {"learning_rate": rate}
        args = TrainingArguments(output_dir=str(tmp_path), report_to="none", **given)
        factory, kept = geolora.for_trainer(method, args=args, **settings)
        built = pickle.loads(pickle.dumps(factory))()(lora_net(r=2), **kept)
        return [group["lr"] for group in built.param_groups]

    assert lr_of()[0] == 7e-3, "the default of Trainer is no wish"
    assert lr_of(rate=2e-3)[0] == 2e-3
    assert lr_of(rate=2e-3, lr=1e-3)[0] == 1e-3
    assert lr_of("lora", rate=2e-3) == [2e-3, 1e-3]

    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    factory, _ = geolora.for_trainer("riemannian", args=args)
    args.learning_rate, args.weight_decay = 4e-4, 0.1  # as a search does
    (first, *_others) = factory()(lora_net(r=2)).param_groups
    assert (first["lr"], first["weight_decay"]) == (4e-4, 0.1)
    factory, _ = geolora.for_trainer("geolora", args=args)
    with pytest.warns(geolora.errors.GeoloraWarning, match="`weight_decay`.*GeoLoRA has none"):
        factory()(lora_net(r=2))


def test_a_rate_that_does_nothing_is_said(folder: Path, tmp_path: Path) -> None:
    run = trainer(folder, tmp_path, lr=1e-3)
    run.args.learning_rate = 3e-4
    with pytest.warns(geolora.errors.GeoloraWarning, match="`learning_rate`.*does nothing"):
        run.train()
