"""Is the demo's table luck? Its two trainings again, over seeds and over LoRA's step size.

    python benchmarks/is_the_demo_luck.py

The demo's task, model, steps and batch: LoRA (rank 8, AdamW) at four step sizes, GeoLoRA with
nothing given, three seeds each (head, adapter, order and
split of the data). LoRA's step size is the one with the best mean, chosen on the very rows that are
reported, which favours LoRA. GeoLoRA's default was chosen before from few values by seed 0 of this
task, SST-2 and a small Llama (docs/decisions.md).
"""

import tempfile
import warnings
from statistics import mean, stdev
from typing import Any

from record import write

from geolora.cli.demo import MAX_LENGTH, RUNS, model_folder
from geolora.cli.demo_texts import docstring_themes
from geolora.settings.train_config import TrainConfig
from geolora.tasks.text_classification import labelled_texts
from geolora.training.run import train

STEPS = 300
SEEDS = (0, 1, 2)
LORA_LRS = (1e-3, 2e-3, 3e-3, 6e-3)
KEPT = ("value", "train_loss", "adapter_parameters", "exported_parameters", "seconds_per_step")


def one(seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    rows, held_out = docstring_themes(seed=seed)
    data = labelled_texts(rows, held_out)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=str(model_folder()),
            max_steps=STEPS,
            max_length=MAX_LENGTH,
            seed=seed,
            output=f"{folder}/run",
            **settings,
        )
        report = train(config, data).report
    ranks = list(report["ranks"].values())
    return {"seed": seed, **{k: report[k] for k in KEPT}, "ranks": [min(ranks), max(ranks)]}


def main() -> None:
    warnings.simplefilter("ignore")
    arms = {f"lora lr {lr:g}": {**RUNS["lora"], "lr": lr} for lr in LORA_LRS}
    arms["geolora"] = RUNS["geolora"]
    results: dict[str, Any] = {name: [] for name in arms}
    for seed in SEEDS:
        for name, settings in arms.items():
            results[name].append(one(seed, settings))
            print(name, results[name][-1], flush=True)
    for name, runs in results.items():
        values = [run["value"] for run in runs]
        parameters = mean(run["adapter_parameters"] for run in runs)
        print(f"{name:14} {mean(values):.3f} ± {stdev(values):.3f}, {parameters:,.0f} parameters")
    print(write("is_the_demo_luck", results))


if __name__ == "__main__":
    main()
