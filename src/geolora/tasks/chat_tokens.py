"""Tokens of prompts, answers and chats, and labels that say which of them are learnt."""

from collections.abc import Sequence
from typing import Any

from geolora.errors import DataError
from geolora.tasks.tokenizers import IGNORED


def pair_tokens(tokenizer: Any, row: dict[str, str]) -> dict[str, list[int]]:
    """Tokens of a prompt and a completion, each tokenised for itself: where one ends is never in doubt."""
    prompt = prompt_tokens(tokenizer, row["prompt"])
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        completion = [*completion, tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Its tokens, without one that would end it."""
    ids = tokenizer(prompt)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def chat_tokens(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Tokens of a chat by the tokenizer's template; labels where the assistant speaks.

    Where that is follows from comparing the chat with the chat up to a message and after it.

    Raises:
        DataError: the template does not take these messages, or does not show where the assistant speaks.
    """
    ids = render(tokenizer, messages)
    labels = [IGNORED] * len(ids)
    for number, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        asked = render(tokenizer, messages[:number], answer_begun=True) if number else []
        first = _common(asked, ids)
        last = _common(render(tokenizer, messages[: number + 1]), ids)
        if last <= first:
            # a template may render the last answer in another way than earlier ones: see what is gone without it
            without = render(tokenizer, [*messages[:number], *messages[number + 1 :]])
            before = _common(render(tokenizer, messages[:number]), ids)
            last = before + len(ids) - len(without)
        if last <= first:
            raise DataError(
                "`messages`: the chat template does not show where message "
                f"{number + 1}, of the assistant, stands. Give prompts and completions instead."
            )
        labels[first:last] = ids[first:last]
    return {"input_ids": ids, "labels": labels}


def render(
    tokenizer: Any, messages: Sequence[dict[str, Any]], answer_begun: bool = False
) -> list[int]:
    """Tokens of messages by the tokenizer's template.

    Args:
        answer_begun: whether the beginning of an answer follows, as it does when one is generated.

    Raises:
        DataError: the template does not take these messages.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=answer_begun, tokenize=True, return_dict=False
        )
    except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"`messages`: the chat template of the model refuses messages of {roles}: {error}."
        ) from error


def _common(beginning: list[int], ids: list[int]) -> int:
    """How many tokens are the same from the start."""
    return next(
        (at for at, (a, b) in enumerate(zip(beginning, ids, strict=False)) if a != b),
        min(len(beginning), len(ids)),
    )
