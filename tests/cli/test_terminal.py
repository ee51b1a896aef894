"""What reaches a terminal: no name out of a file or an argument breaks, colours or forges a line."""

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import geolora
from geolora import errors
from geolora.adapters.names import CONFIG
from geolora.cli.__main__ import main
from geolora.cli.terminal import say
from models import lora_net

EVIL = "a\x1b[31m\u202e\r\ngeolora: all is well\x9b2J\ud800"
"""Colours, turns the text round, forges a line, clears the screen; half of a character."""
SHOWN = r"a\x1b[31m\u202e\r\ngeolora: all is well\x9b2J\ud800"


def lines_of(captured: str) -> list[str]:
    lines = captured.split("\n")
    assert all(line.isprintable() for line in lines), captured
    return lines


def test_lines_are_escaped_and_fit_the_terminal() -> None:
    for encoding, name in (("utf-8", "é▁"), ("ascii", r"\xe9\u2581"), ("latin-1", r"é\u2581")):
        file = io.BytesIO()
        stream = io.TextIOWrapper(file, encoding)
        say(EVIL, Path("é▁"), to=stream)
        assert file.getvalue().decode(encoding).split("\n") == [SHOWN, name, ""]


@pytest.mark.parametrize("evil", [EVIL, "a" * 300, "a\0b"], ids=["escapes", "long", "nul"])
@pytest.mark.parametrize(
    "words",
    [
        "{}", "--{}", "train --{}", "train {}", "train --lr {}", "train --batch-size {}", "train --config {}",
        "train --model {} --train {} --eval {}", "train --model m --method {}", "train --model m --report-to {}",
        "train --model m --train {} --eval {} --output {}", "train --model m --train {} --eval {} --output out",
        "train --model m --train {} --eval {} --output out --task image-classification",
        "compare {}", "demo --steps {}", "plot {}", "inspect {}", "inspect out --figures {}", "verify {}",
        "export {} {}",
    ],
)  # fmt: skip
def test_arguments(
    words: str,
    evil: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main([word.replace("{}", evil) for word in words.split()]))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(lines_of(err)) == 2, err
    assert err.startswith("geolora: ")
    if evil == EVIL:
        assert r"a\x1b[31m" in err
    assert not list(tmp_path.iterdir())


def test_settings_printed_as_yaml(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from geolora.settings.strict_yaml import read_yaml

    whole = EVIL.removesuffix("\ud800")
    assert main(["train", "--model", whole, "--print-config"]) == 0
    out = capsys.readouterr().out
    lines_of(out)
    (tmp_path / "run.yaml").write_text(out)
    assert read_yaml(tmp_path / "run.yaml")["model"] == whole


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = lora_net()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    geolora.export(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.filterwarnings("always::geolora.errors.GeoloraWarning")
def test_keys_of_an_adapter(adapter: Path, capsys: pytest.CaptureFixture) -> None:
    """They come in a warning: of one line, on the command line and in Python."""
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, EVIL: 1}))
    show = warnings.showwarning
    try:
        assert main(["inspect", str(adapter)]) == 0
    finally:
        warnings.showwarning = show
    out, err = capsys.readouterr()
    lines_of(out)
    assert len(lines_of(err)) == 2
    assert SHOWN[:20] in err
    with pytest.warns(errors.GeoloraWarning) as caught:
        geolora.inspect(adapter)
    lines_of(str(caught[0].message))


@pytest.mark.parametrize(
    "kind",
    [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)],
)  # fmt: skip
def test_every_message_is_a_line(kind: Callable[[str], Exception]) -> None:
    assert str(kind(EVIL)) == SHOWN
