"""Generated answers, and whether they are right (`--metric exact_match`)."""

import re
import sys
from typing import Any

import torch

from geolora.errors import DataError, SettingError
from geolora.tasks.chat_tokens import WEIGHT, demand_all_is_used, prompt_tokens, render
from geolora.tasks.task import Predictions, Rows

BATCH = 8
"""Rows that are answered at a time."""
ANSWER = re.compile(r"####\s*(.+)")
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")


def prompts_of(tokenizer: Any, rows: Rows, longest: int) -> tuple[list[list[int]], list[str]]:
    """Tokens of what is asked, at most so many, and the texts that are wanted.

    Raises:
        DataError: a prompt without a token. SettingError: one that leaves no room for an answer.
    """
    prompts, wanted = [], []
    for number, row in enumerate(rows.inputs, 1):
        if "messages" in row:
            last = max(i for i, m in enumerate(row["messages"]) if m["role"] == "assistant")
            answer, asked = row["messages"][last], row["messages"][:last]
            where = f"`--eval`: row {number}: `messages`"
            if not answer["content"].strip() or answer.get(WEIGHT) == 0:
                raise DataError(
                    f"{where}: the last answer, which `--metric exact_match` compares, must have text and not "
                    "the weight 0. Take the row out, or use --metric perplexity."
                )
            wanted.append(answer["content"])
            demand_all_is_used(tokenizer, asked, row.get("tools"), where)
            prompts.append(render(tokenizer, asked, True, row.get("tools"), where) if asked else [])
        else:
            wanted.append(row["completion"])
            prompts.append(prompt_tokens(tokenizer, row["prompt"]))
        if not prompts[-1]:
            raise DataError(f"`--eval`: row {number} asks nothing. Take it out.")
        if len(prompts[-1]) > longest:
            raise SettingError(
                f"`--max-new-tokens` must leave room for the prompts; row {number} of --eval has "
                f"{len(prompts[-1])} tokens, {max(longest, 0)} are left of what the model can hold. Lower it."
            )
    return prompts, wanted


@torch.inference_mode()
def answer_all(model: Any, tokenizer: Any, rows: Rows, max_new_tokens: int) -> Predictions:
    """1 for every row whose greedy answer is the wanted one, else 0; and what is wanted, ones."""
    prompts, wanted = prompts_of(tokenizer, rows, sys.maxsize)
    hits = [0] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(by_length), BATCH):
        indices = by_length[start : start + BATCH]
        size = max(len(prompts[i]) for i in indices)
        batch = tokenizer.pad(
            {"input_ids": [prompts[i] for i in indices]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        out = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(out[:, size:], skip_special_tokens=True)
        for i, text in zip(indices, texts, strict=True):
            hits[i] = int(is_right(text, wanted[i]))
    return Predictions(hits, [1] * len(hits))


def is_right(text: str, wanted: str) -> bool:
    """Whether a text answers what is wanted: what follows `####` in it, else all of it.

    Where that is a number, the last number of the text's answer must equal it; else the words must be the same.
    """
    given, right = (" ".join(_answer(side).split()) for side in (text, wanted))
    if NUMBER.fullmatch(right):
        numbers = NUMBER.findall(given)
        return bool(numbers) and _value(numbers[-1]) == _value(right)
    return given == right


def _answer(text: str) -> str:
    marked = ANSWER.search(text)
    return marked[1] if marked else text


def _value(number: str) -> float:
    return float(number.replace(",", "").replace("$", ""))
