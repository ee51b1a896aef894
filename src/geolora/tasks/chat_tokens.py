"""Tokens of prompts, answers and chats, and labels that say which of them are learnt."""

import json
from collections.abc import Sequence
from typing import Any

from geolora.errors import DataError, first_line, listed, shown
from geolora.tasks.tokenizers import IGNORED

NAMES = ("tool_call_id",)
"""Keys of a message that say nothing but which call it answers: a template may leave them out."""
NOT_PASSED = ("functions", "documents", "chat_template_kwargs")
"""Columns that a chat template of another tool would see."""
WEIGHT = "weight"
"""0 for a message of the assistant that is not learnt: ours to read, not the template's."""


def pair_tokens(tokenizer: Any, row: dict[str, str]) -> dict[str, list[int]]:
    """Tokens of a prompt and a completion, each tokenised for itself: where one ends is never in doubt.

    A completion without a token of its own has no label.
    """
    prompt = prompt_tokens(tokenizer, row["prompt"])
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None and completion:
        completion = [*completion, tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Its tokens, without one that would end it."""
    ids = tokenizer(prompt)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def checked_chat(row: dict[str, Any], where: str) -> dict[str, Any]:
    """{"messages"}, with {"tools"} where there are any: what the template is given, without keys that are empty.

    Args:
        where: the flag, row and file, for messages.

    Raises:
        DataError: what is no chat; an answer that says nothing; a column that would be left out.
    """
    given, tools = row.get("messages"), row.get("tools")
    if not isinstance(given, list) or not all(isinstance(m, dict) for m in given):
        raise DataError(f"{where} must have `messages` [{{role, content}}, …]; got {shown(given)}.")
    messages = [_checked_message(m, f"{where}: message {i}") for i, m in enumerate(given, 1)]
    if not any(m["role"] == "assistant" for m in messages):
        raise DataError(
            f"{where} must have `messages` [{{role, content}}, …] with an assistant's among them."
        )
    for key in NOT_PASSED:
        if row.get(key):
            raise DataError(f"{where} has `{key}`, which no template is given. Take it out.")
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{where}: `tools` must be a list of objects; got {shown(tools)}.")
    result = {"messages": messages, **({"tools": tools} if tools else {})}
    try:
        json.dumps(result)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: `messages` must be JSON: {first_line(error)}.") from error
    return result


def _checked_message(given: dict[str, Any], where: str) -> dict[str, Any]:
    message = {key: value for key, value in given.items() if value not in (None, [], {})}
    if not isinstance(message.get("role"), str):
        raise DataError(f"{where} must have a `role`; got {shown(given.get('role'))}.")
    more = set(message) - {"role", "content", WEIGHT, *NAMES, "name"}
    if message["role"] == "assistant" and more:
        message.setdefault("content", "")
    content = message.get("content")
    if not isinstance(content, str):
        raise DataError(f"{where} must have text as `content`; got {shown(given.get('content'))}.")
    if message["role"] == "assistant" and not content.strip() and not more:
        raise DataError(f"{where}, of the assistant, says nothing. Give its `content`.")
    if message.get(WEIGHT, 1) not in (0, 1):
        raise DataError(f"{where}: `weight` must be 0 or 1; got {shown(message[WEIGHT])}.")
    return message


def chat_tokens(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    tools: list[Any] | None = None,
    where: str = "`messages`",
) -> dict[str, list[int]]:
    """Tokens of a chat by the tokenizer's template; labels where the assistant speaks, its `weight` not being 0.

    Where that is follows from comparing the chat with the chat up to a message and after it.

    Args:
        tools: what the assistant may call. where: what the messages are of, for errors.

    Raises:
        DataError: the template does not take these messages, or leaves a key of them out, or does not show where the
            assistant speaks.
    """

    def rendered(some: Sequence[dict[str, Any]], answer_begun: bool = False) -> list[int]:
        return render(tokenizer, some, answer_begun, tools, where)

    ids = rendered(messages)
    demand_all_is_used(tokenizer, messages, tools, where)
    labels = [IGNORED] * len(ids)
    for number, message in enumerate(messages):
        if message.get("role") != "assistant" or message.get(WEIGHT) == 0:
            continue
        asked = rendered(messages[:number], answer_begun=True) if number else []
        first = _common(asked, ids)
        last = _common(rendered(messages[: number + 1]), ids)
        if last <= first:
            # a template may render the last answer in another way than earlier ones: see what is gone without it
            without = rendered([*messages[:number], *messages[number + 1 :]])
            before = _common(rendered(messages[:number]), ids)
            last = before + len(ids) - len(without)
        if last <= first:
            raise DataError(
                f"{where}: the chat template does not show where message "
                f"{number + 1}, of the assistant, stands. Give prompts and completions instead."
            )
        labels[first:last] = ids[first:last]
    return {"input_ids": ids, "labels": labels}


def demand_all_is_used(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: list[Any] | None, where: str
) -> None:
    """Refuse a key of a message, or tools, without which the template gives the same text: it would be lost.

    Raises:
        DataError: saying which.
    """

    def used(whole: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]], some: Any) -> bool:
        try:
            full = render(tokenizer, whole, False, tools)
        except DataError:  # as a part of the chat it is none
            return False
        try:
            return render(tokenizer, kept, False, some) != full
        except DataError:  # the template asks for it
            return True

    lost = "tools`" if tools and not used(messages, messages, None) else ""
    for number, message in enumerate(messages):
        marks = {*NAMES, "name"} if message["role"] == "tool" else set(NAMES)
        for key in sorted(set(message) - {"role", "content", WEIGHT} - marks):
            less = {name: value for name, value in message.items() if name != key}
            kept = [*messages[:number], less, *messages[number + 1 :]]
            # a template may show it only where the chat ends, or only where it goes on
            if not any(used(messages[:end], kept[:end], tools) for end in (number + 1, None)):
                lost = f"{shown(key)[1:-1]}` of message {number + 1}, {message['role']}"
    if lost:
        raise DataError(
            f"{where}: the chat template of the model leaves out `{lost}: nothing of it would be learnt. "
            "Take it out, or choose a model whose template knows it."
        )


def render(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    answer_begun: bool = False,
    tools: list[Any] | None = None,
    where: str = "`messages`",
) -> list[int]:
    """Tokens of messages by the tokenizer's template.

    Args:
        answer_begun: whether the beginning of an answer follows, as it does when one is generated.
        tools: what the assistant may call. where: what the messages are of, for errors.

    Raises:
        DataError: the template does not take these messages.
    """
    from jinja2 import TemplateError

    given = [{key: value for key, value in m.items() if key != WEIGHT} for m in messages]
    try:
        return tokenizer.apply_chat_template(
            given,
            tools=tools,
            add_generation_prompt=answer_begun,
            tokenize=True,
            return_dict=False,
        )
    except (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        roles = listed(message["role"] for message in messages)
        raise DataError(
            f"{where}: the chat template of the model refuses messages of {roles}: {first_line(error)}."
        ) from error


def _common(beginning: list[int], ids: list[int]) -> int:
    """How many tokens are the same from the start."""
    return next(
        (at for at, (a, b) in enumerate(zip(beginning, ids, strict=False)) if a != b),
        min(len(beginning), len(ids)),
    )
