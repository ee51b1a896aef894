"""What users of other tools type: the nearest of our words, or that there is none."""

import pytest

from geolora.cli.__main__ import build_parser
from geolora.errors import nearest
from geolora.settings.other_tools import NONE_YET, OURS, meant
from geolora.settings.train_config import DEFAULTS

FLAGS = ["--help", "--config", *(f"--{name.replace('_', '-')}" for name in DEFAULTS)]


def test_the_table_is_sorted_and_names_flags_of_train() -> None:
    assert list(OURS) == sorted(OURS)
    for word, ours in OURS.items():
        assert ours == NONE_YET or f"--{ours}" in FLAGS, word
        assert f"--{word}" not in FLAGS, "it has become one of ours"


@pytest.mark.parametrize(
    "word, hint",
    [
        ("--load-in-4bit", " There is no such flag yet."),
        ("--lora-alpha", " There is no such flag yet."),
        ("--lora_alpha", " There is no such flag yet."),
        ("--warmup-steps", " There is no such flag yet."),
        ("--lora-r", " Did you mean `--rank`?"),
        ("--learning-rate", " Did you mean `--lr`?"),
        ("--learning_rate", " Did you mean `--lr`?"),
        ("--num-train-epochs", " Did you mean `--epochs`?"),
        ("--per-device-train-batch-size", " Did you mean `--batch-size`?"),
        ("--gradient-accumulation-steps", " Did you mean `--gradient-accumulation`?"),
        ("--output_dir", " Did you mean `--output`?"),
        ("--batch_size", " Did you mean `--batch-size`?"),
        ("--max-step", " Did you mean `--max-steps`?"),
        ("--rnak", " Did you mean `--rank`?"),
        ("--frobnicate", ""),
        ("--lora-foo", ""),
        ("--" + "x" * 100_000, ""),
    ],
)
def test_hints_for_flags(word: str, hint: str) -> None:
    assert meant(word, FLAGS, "flag") == hint


def test_hints_for_settings_are_spelt_as_settings() -> None:
    assert meant("gradient-accumulation-steps", DEFAULTS, "setting") == (
        " Did you mean `gradient_accumulation`?"
    )
    assert meant("lora-alpha", DEFAULTS, "setting") == " There is no such setting yet."


def test_other_commands_promise_nothing() -> None:
    assert meant("--lora-alpha", ["--rank", "--overwrite"], "flag") == ""
    assert meant("--lora-r", ["--rank", "--overwrite"], "flag") == " Did you mean `--rank`?"


def test_a_hint_is_a_slip_of_the_pen_and_never_another_word() -> None:
    for word, known in (
        ("--init4", "--init"),
        ("txt", "text"),
        ("rnak", "rank"),
        ("goods", "good"),
    ):
        assert nearest(word, ["other", known]) == f" Did you mean `{known}`?"
    for word, known in (
        ("--load-in-4bit", "--init"),
        ("--lora-alpha", "--label"),
        ("tail", "rank"),
    ):
        assert nearest(word, [known]) == ""
    assert nearest("x" * 10**6, ["x" * 10**6]) == "", "and takes no time over long ones"


def test_the_parser_knows_all_of_it(capsys: pytest.CaptureFixture) -> None:
    from geolora.cli.__main__ import main

    assert build_parser()
    with pytest.raises(SystemExit) as caught:
        main(["train", "--learning-rate=1e-3"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "geolora: unknown argument `--learning-rate`. Did you mean `--lr`? See geolora train --help.\n"
    )
