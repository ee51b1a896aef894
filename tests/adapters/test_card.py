"""Model cards: what a foreign name, of a base or a layer, can make of them."""

from pathlib import Path

import pytest
import yaml

from geolora.adapters.card import model_card

FIXED = {"library_name": "peft", "tags": ["lora", "geolora"]}


def card(
    base: object, layer: str = "layer.0", other: str = "head.weight"
) -> tuple[dict, list[str]]:
    """Its head, read as YAML, and the lines below."""
    text = model_card(base, "in the uniform layout, for peft", {layer: 3}, 7, 8, [other])
    start, head, body = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(head), body.splitlines()


@pytest.mark.parametrize("base", ["gpt2", "Qwen/Qwen3-0.6B", "null", "yes", "1e5", "0x10"])
def test_names_of_the_hub_are_published(base: str) -> None:
    head, body = card(base)
    assert head == {"base_model": base, **FIXED}
    assert body[1] == f"# LoRA adapter for `{base}`"


@pytest.mark.parametrize(
    "base, title",
    [
        ("x\nlicense: cc0-1.0", r"a local model, `x\nlicense: cc0-1.0`"),
        ('x"\nlicense: mit\ny: "', r'a local model, `x"\nlicense: mit\ny: "`'),
        ("<script>alert(1)</script>", r"a local model, `script\x3e`"),
        ("a`b|c", r"a local model, `a\x60b\x7cc`"),
        ("\x1b[31m\u202eevil", r"a local model, `\x1b[31m\u202eevil`"),
        ("half \ud800", r"a local model, `half \ud800`"),
        ("/home/me/secret/llama", "a local model, `llama`"),
        ("C:\\Users\\me\\llama", "a local model, `llama`"),
        ("../models/llama", "a local model, `llama`"),
        ("org/name--x", "a local model, `name--x`"),
        ("org/name.git", "a local model, `name.git`"),
        ("gpt2\n", r"a local model, `gpt2\n`"),
        ("a" * 500, f"a local model, `{'a' * 199}…`"),
        ("", "a model without a name"),
        (None, "a model without a name"),
        ({"x": 1}, "a model without a name"),
    ],
)  # fmt: skip
def test_any_other_name_stays_out_of_the_head(base: object, title: str) -> None:
    head, body = card(base)
    assert head == FIXED
    assert body[1] == f"# LoRA adapter for {title}"


def test_a_folder_is_no_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert card("org/model")[0]["base_model"] == "org/model"
    monkeypatch.chdir(tmp_path)
    head, body = card("org/model")
    assert head == FIXED
    assert body[1] == "# LoRA adapter for a local model, `model`"


def test_names_of_layers_stay_in_their_cells() -> None:
    _, body = card("gpt2", "a|b`\n<b>", "c`<i>")
    assert body[-1] == r"| `a\x7cb\x60\n\x3cb\x3e` | 3 |"
    assert r"- beside the pairs: `c\x60\x3ci\x3e`" in body
