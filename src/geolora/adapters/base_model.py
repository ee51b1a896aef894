"""A saved adapter over its base model, both loaded without running code that lies beside them."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError
from torch import nn

from geolora.adapters.names import CONFIG, HUB_NAME
from geolora.adapters.patterns import demand_quick
from geolora.adapters.read import SavedAdapter, read_adapter, read_object
from geolora.errors import AdapterError, first_line, shown
from geolora.files.reading import is_folder
from geolora.pairs.find import PREFIX

AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""PEFT's task types, and what transformers loads for them."""
PRIME = 7919
"""A number of classes that no other size of a model is."""
FAILURES = (
    OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, re.error,
    SafetensorError,
)  # fmt: skip
"""What peft and transformers raise for files that do not fit; their reason is passed on."""


@contextmanager
def quietly() -> Iterator[None]:
    """Silence transformers' log and progress bars; at the end, also of a failure, both are as they were."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars = not hub.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # and the Hub's
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        (hub.enable_progress_bars if hub_bars else hub.disable_progress_bars)()


def load_adapter(path: str | Path, base: str | Path | None = None) -> Any:
    """A saved LoRA adapter over its base model, as a PeftModel.

    Raises:
        AdapterError: no adapter that can be read, or a base model that cannot be loaded.
    """
    saved = read_adapter(path)
    return over_base(load_base(saved, base), saved)


def over_base(base: nn.Module, saved: SavedAdapter) -> Any:
    """PeftModel of a base and a saved adapter; model and file must have the same tensors of it."""
    from peft import PeftModel, get_peft_model_state_dict

    name = type(base).__name__
    modules = {module for module, _ in base.named_modules()}
    known = sum(pair.name in modules for pair in saved.pairs)
    names = [*modules, *(parameter for parameter, _ in base.named_parameters())]
    demand_quick(saved.folder / CONFIG, saved.config, names, known)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing keys: told below, by name
            loaded = PeftModel.from_pretrained(base, str(saved.folder))
            expected = get_peft_model_state_dict(loaded)
    except FAILURES as error:
        raise AdapterError(
            f"{saved.folder} does not fit {name}: {first_line(error)}. Give the model the adapter "
            "was trained on as `base`."
        ) from error
    wrong = sorted(set(expected) ^ set(saved.tensors))
    if wrong:
        where = "the adapter" if wrong[0] in saved.tensors else "the model"
        raise AdapterError(
            f"{saved.folder} does not fit {name}: `{wrong[0]}` is only in {where}. Give the model "
            "the adapter was trained on, with its head."
        )
    return loaded


def load_base(saved: SavedAdapter, base: str | Path | None = None) -> nn.Module:
    """The base model of an adapter, loaded with `transformers`; code beside it is never run.

    Args:
        saved: the adapter.
        base: a model folder or a name on the Hub; None for the one the adapter names, which must
            not climb out of the working directory.

    Raises:
        AdapterError: there is no such model, or it cannot be loaded.
    """
    name = _base_name(saved, base)
    try:
        with quietly():  # a new head is no news: the trained one comes with the adapter
            auto = _class_of(name, saved.config)
            options = _labels_of(auto, name, saved)
            return auto.from_pretrained(name, trust_remote_code=False, **options)
    except FAILURES as error:
        raise AdapterError(
            f"base model `{name}` cannot be loaded: {first_line(error)}. Say another one with `base`."
        ) from error


def _class_of(name: str, config: dict[str, Any]) -> Any:
    """The class to load a base model as.

    The auto class of PEFT's task type; else the class of transformers that the adapter names, which is only looked
    up there; else the class that the base was saved as.
    """
    import transformers

    if auto := AUTO_CLASSES.get(str(config.get("task_type"))):
        return getattr(transformers, auto)
    mapping = config.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    base = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    for known in (named, *(base.architectures or [])[:1]):
        found = getattr(transformers, known, None) if isinstance(known, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModel


def _labels_of(kind: Any, name: str, saved: SavedAdapter) -> dict[str, int]:
    """{"num_labels": n} as the saved head has it; nothing where no head is saved.

    Which module gives the classes is seen in a model without numbers and with a count of classes that nothing else has.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        name, trust_remote_code=False, num_labels=PRIME
    )
    with torch.device("meta"):
        empty = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    for module, layer in empty.named_modules():
        weight = getattr(layer, "weight", None)
        trained = saved.tensors.get(f"{PREFIX}{module}.weight")
        if weight is not None and weight.shape[:1] == (PRIME,) and trained is not None:
            return {"num_labels": trained.shape[0]}
    return {}


def _base_name(saved: SavedAdapter, given: str | Path | None) -> str:
    """The folder or Hub name of the base model, as far as it may be loaded."""
    name = str(given) if given else saved.config.get("base_model_name_or_path")
    file = saved.folder / CONFIG
    if not name:
        raise AdapterError(f"{file} names no base model. Say which one with `base`.")
    what = "`base`" if given else f"{file}: `base_model_name_or_path`"
    needed = f"{what} must be a model folder that exists, or a name on the Hub; got {shown(name)}"
    if not isinstance(name, str):
        raise AdapterError(f"{needed}. Say which one with `base`.")
    if not given and ".." in name.replace("\\", "/").split("/"):
        raise AdapterError(
            f"{needed}, which climbs out of the folder it was written in. If that is the model, "
            "say so with `base`."
        )
    if is_folder(name):
        _check_model_folder(Path(name))
    elif not HUB_NAME.fullmatch(name):
        raise AdapterError(f"{needed}, which is neither. Say where it is with `base`.")
    return name


def _check_model_folder(folder: Path) -> None:
    """Refuse a base model folder that would lead transformers to files elsewhere."""
    if (folder / CONFIG).exists():
        raise AdapterError(
            f"base model `{folder}` cannot be loaded: it holds {CONFIG}, so it is an adapter itself. "
            "Say which model it was trained on with `base`."
        )
    for file in sorted(folder.glob("*.index.json")):
        shards = read_object(file).get("weight_map")
        for shard in shards.values() if isinstance(shards, dict) else [shards]:
            if not isinstance(shard, str) or _leads_elsewhere(shard):
                raise AdapterError(
                    f"{file}: `weight_map` must name files of its own folder; got {shown(shard)}. "
                    "Save the model again."
                )


def _leads_elsewhere(name: str) -> bool:
    """Whether a path is absolute or climbs, on any system."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return any(path.anchor or ".." in path.parts for path in paths)
