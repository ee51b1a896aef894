"""Tokenizers made fit for training: a padding token, a length; and the label of tokens without one."""

from typing import Any

from geolora.errors import ModelError, SettingError
from geolora.settings.train_config import TrainConfig

IGNORED = -100
"""Label of a token that the loss and the scores leave out; torch's default of `ignore_index`."""


def pad(tokenizer: Any, model: Any, config: TrainConfig) -> None:
    """Give tokenizer and model one padding token, the end token where neither has one.

    A classifier of the GPT kind looks for the last token that is not the padding of its configuration: who loads
    the adapter over the base has that one, so it comes before the tokenizer's.

    Raises:
        ModelError: there is neither.
    """
    of_model = getattr(model.config, "pad_token_id", None)
    if of_model is not None and (tokenizer.pad_token is None or config.task != "causal-lm"):
        known = 0 <= of_model < len(tokenizer)
        tokenizer.pad_token = (
            tokenizer.convert_ids_to_tokens(of_model) if known else tokenizer.pad_token
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(f"`--model`: the tokenizer of {config.model} has no padding token.")
    for settings in (model.config, getattr(model, "generation_config", None)):
        if settings is not None:
            settings.pad_token_id = tokenizer.pad_token_id


def limit(tokenizer: Any, model: Any) -> int:
    """Tokens that the model can hold: positions it has, without those that it keeps for padding."""
    longest = getattr(model.config, "max_position_embeddings", None) or 0
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            longest = module.num_embeddings - module.padding_idx - 1  # positions begin behind it
    known = [length for length in (longest, tokenizer.model_max_length) if length > 0]
    return min(known)


def max_length(tokenizer: Any, model: Any, config: TrainConfig, usual: int) -> int:
    """Tokens per row: `--max-length`, or the usual number, or fewer where the model has its limit.

    Raises:
        SettingError: `--max-length` is beyond the model's limit.
    """
    longest = limit(tokenizer, model)
    if config.max_length is not None and config.max_length > longest:
        raise SettingError(f"`--max-length` must be at most {longest}; got {config.max_length}.")
    return min(config.max_length or usual, longest)
