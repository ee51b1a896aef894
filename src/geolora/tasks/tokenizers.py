"""Tokenizers made fit for training: a padding token, a length; and the label of tokens without one."""

from typing import Any

from geolora.errors import ModelError, SettingError
from geolora.settings.train_config import TrainConfig

IGNORED = -100
"""Label of a token that the loss and the scores leave out; torch's default of `ignore_index`."""


def pad(tokenizer: Any, model: Any, config: TrainConfig) -> None:
    """Give tokenizer and model a padding token, the end token where they have none.

    Raises:
        ModelError: there is neither.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(f"`--model`: the tokenizer of {config.model} has no padding token.")
    for settings in (model.config, getattr(model, "generation_config", None)):
        if settings is not None:
            settings.pad_token_id = tokenizer.pad_token_id


def limit(tokenizer: Any, model: Any) -> int:
    """Tokens that the model can hold."""
    longest = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    return min(longest, tokenizer.model_max_length)


def max_length(tokenizer: Any, model: Any, config: TrainConfig, usual: int) -> int:
    """Tokens per row: `--max-length`, or the usual number, or fewer where the model has its limit.

    Raises:
        SettingError: `--max-length` is beyond the model's limit.
    """
    longest = limit(tokenizer, model)
    if config.max_length is not None and config.max_length > longest:
        raise SettingError(f"`--max-length` must be at most {longest}; got {config.max_length}.")
    return min(config.max_length or usual, longest)
