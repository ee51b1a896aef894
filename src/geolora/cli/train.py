"""geolora train: fine-tune a model on your texts, pictures or chats, and write a PEFT adapter."""

import argparse
import dataclasses
import types
import typing

from geolora.cli.plot import draw_run
from geolora.cli.terminal import say
from geolora.settings.train_config import HEADINGS, TrainConfig

EXAMPLES = """examples:
  geolora train --model bert-base-uncased --train train.jsonl --eval dev.jsonl \\
      --text sentence --output out
  geolora train --model ./my-model --train pairs.csv --eval dev.csv --text premise \\
      --text-pair hypothesis --budget 100000 --output out
  geolora train --model ./my-model --train train.csv --eval dev.csv --print-config > run.yaml
  geolora train --config run.yaml --seed 1
  geolora train --model ./my-model --train sts.csv --eval dev.csv --task text-regression \\
      --text a --text-pair b --label score --method lora --lr 1e-3 --output lora-out

  geolora train --task image-classification --model ./my-vit --train photos/train --eval photos/dev
  geolora train --task causal-lm --model ./my-llama --train qa.jsonl --eval dev.jsonl \\
      --prompt question --completion answer --output lm

The output folder holds adapter/ (a PEFT adapter), report.json, history.json, figures and report.html,
a page to send that needs no other file. A run that was stopped goes on when started again with the
same flags: after Ctrl-C from the step it was at, after a crash from its last checkpoint
(--save-every), exactly as if it had never stopped.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per field of `TrainConfig`; what is not given is not in the namespace."""
    parser.usage = "geolora train --model MODEL --train FILE --eval FILE [options]"
    parser.add_argument("--config", help="YAML file of the flags below; flags given here win")
    parser.add_argument(
        "--print-config", action="store_true", help="print all settings as YAML, and train nothing"
    )
    for heading, names in HEADINGS.items():
        group = parser.add_argument_group(heading)
        for name in names:
            _add_flag(group, TrainConfig.__dataclass_fields__[name])


def _add_flag(group: typing.Any, spec: dataclasses.Field) -> None:
    flag, text = f"--{spec.name.replace('_', '-')}", spec.metadata["help"]
    hint, choices = typing.get_type_hints(TrainConfig)[spec.name], spec.metadata["choices"]
    kind = number_or_auto if spec.name == "lr" else _plain(hint)
    if hint is bool:
        group.add_argument(
            flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
        )
        return
    default = "" if spec.default in (None, "") else f" ({spec.default})"
    group.add_argument(
        flag,
        type=kind,
        default=argparse.SUPPRESS,
        metavar=spec.name.upper(),
        help=text + (f": {', '.join(choices)}" if choices else "") + default,
    )


def run(arguments: argparse.Namespace) -> None:
    """Train, and print the result."""
    from geolora import processes
    from geolora.settings.strict_yaml import as_yaml, read_yaml, settings_of
    from geolora.training import run as training

    path, names = arguments.config, [spec.name for spec in dataclasses.fields(TrainConfig)]
    given = {name: value for name, value in vars(arguments).items() if name in names}
    of_file = settings_of(read_yaml(path), TrainConfig, path) if path else {}
    config = TrainConfig(**{**of_file, **given})
    if arguments.print_config:
        say(*as_yaml(config).splitlines())
        return
    report = training.run(config, then=draw_run)
    if processes.is_first():
        say(*summary(report, config.output, config.budget))


def summary(report: dict, output: str, budget: int | None = None) -> list[str]:
    """What a person wants to know when a run ends."""
    limit = f" of a budget of {budget:,}" if budget is not None else ""
    ranks = list(report["ranks"].values())
    return [
        f"{report['metric']} {report['value']:.4f} after {report['steps']} steps "
        f"({report['seconds_per_step']:.3f} s each) of size {report['lr']:.2g}",
        f"adapter: {report['adapter_parameters']:,} parameters{limit} in {len(ranks)} layers, "
        f"ranks {min(ranks)} to {max(ranks)} (file: {report['exported_parameters']:,})",
        f"written: {output}/adapter, {output}/report.json, {output}/report.html",
    ]


def number_or_auto(text: str) -> float | None:
    """What `--lr` takes: None stands for a search."""
    return None if text == "auto" else float(text)


def _plain(hint: typing.Any) -> typing.Any:
    """int for `int | None`, and so on."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint
