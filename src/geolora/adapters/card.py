"""The model card of an adapter folder: Markdown under a head of YAML, neither of which a foreign name can change."""

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path, PureWindowsPath

from geolora.adapters.names import HUB_NAME
from geolora.errors import escaped

NOT_IN_CODE = "`|<>&"
"""What would end a span of code or a cell of a table, or begin a tag."""
LONGEST = 200
"""Characters of a name."""


def model_card(
    base: object,
    form: str,
    ranks: dict[str, int],
    adapter_parameters: int,
    exported_parameters: int,
    others: Sequence[str],
    probes: bool = True,
) -> str:
    """README.md of an adapter folder.

    The head names the base only where it is a name on the Hub: a folder of this machine is nobody else's.

    Args:
        base: what `base_model_name_or_path` says, whatever that is.
        form: how it is written, and for what.
        ranks: {layer: rank}.
        adapter_parameters, exported_parameters: numbers in use, and in the file.
        others: tensors beside the pairs.
        probes: whether those for `geolora verify` lie beside it: it is pairs and nothing else.
    """
    published = base if isinstance(base, str) and is_on_hub(base) else None
    check = "`geolora verify` checks that it computes what was trained; `geolora inspect` shows its spectra."
    lines = [
        "---",
        *([f'base_model: "{published}"'] if published else []),
        "library_name: peft",
        "tags:",
        "- lora",
        "- geolora",
        "---",
        "",
        f"# LoRA adapter for {code(published) if published else _local(base)}",
        "",
        f"Written by geolora {metadata.version('geolora')} {form}.",
        "",
        f"- directions in use: {sum(ranks.values())} in {len(ranks)} layers, {adapter_parameters:,} parameters",
        f"- numbers in the file: {exported_parameters:,}",
        f"- beside the pairs: {', '.join(map(code, others)) or 'nothing'}",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base_model, "this folder")',
        "```",
        "",
        *([check, ""] if probes else []),
        "| layer | rank |",
        "|---|---|",
        *(f"| {code(name)} | {rank} |" for name, rank in ranks.items()),
    ]
    return "\n".join(lines) + "\n"


def is_on_hub(base: str) -> bool:
    """Whether a base is named as models on the Hub are, and is no folder here."""
    return HUB_NAME.fullmatch(base) is not None and not Path(base).exists()


def code(name: str) -> str:
    """A name as a span of code: on one line, and what could end the span is shown escaped."""
    text = escaped(name, NOT_IN_CODE)
    return f"`{text if len(text) <= LONGEST else text[: LONGEST - 1] + '…'}`"


def _local(base: object) -> str:
    """A base that is not on the Hub: the last name of its path, of any system, without the folders."""
    name = PureWindowsPath(base).name if isinstance(base, str) else ""
    return f"a local model, {code(name)}" if name else "a model without a name"
