"""Causal language modelling and instruction tuning through TRL's `SFTTrainer`.

Rows are plain texts (`text`, or a .txt file), a prompt and a completion, or `messages` of a chat. The loss is on
all tokens of a text, on the completion, or on what the assistant says.
"""

import gzip
import re
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from geolora.errors import DataError, DataWarning, ModelError, SettingError, nearest
from geolora.processes import one_device
from geolora.settings.train_config import TrainConfig
from geolora.tasks.task import Data, Loaded, Predictions, Rows, Task, loading, rows_of, source_of
from geolora.tasks.tokenizers import limit, max_length, pad

MAX_LENGTH = 1024
EVAL_BATCH = 8
IGNORED = -100
"""Label of a token that is no part of the loss."""
TEXT_FILES = (".txt", ".txt.gz")
ANSWER = re.compile(r"####\s*(.+)")
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")


class CausalLM(Task):
    """Texts to their next tokens."""

    peft_type = "CAUSAL_LM"

    def read(self, config: TrainConfig) -> Data:
        """One input per row: {"text"}, {"prompt", "completion"} or {"messages"}."""
        if find_spec("trl") is None:
            raise SettingError(
                "`--task causal-lm` needs the package `trl`. Install geolora[lm]: "
                "pip install 'geolora[lm]'."
            )
        sides = [_inputs(config, flag) for flag in ("--train", "--eval")]
        if config.metric == "exact_match" and "text" in sides[1][0]:
            raise SettingError(
                "`--metric exact_match` needs a prompt and a completion, or messages; "
                f"{Path(config.eval).name} has plain texts."
            )
        train, held_out = (Rows(inputs, [None] * len(inputs)) for inputs in sides)
        return Data(train, held_out, [])

    def load(self, config: TrainConfig, data: Data) -> Loaded:
        """A causal model as it is, without a new head."""
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        def load(source: str) -> Any:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            return tokenizer, AutoModelForCausalLM.from_pretrained(
                source, dtype=config.dtype, trust_remote_code=False
            )

        tokenizer, model = loading(config, load)
        model.config.use_cache = False  # with a cache packed rows would see each other
        pad(tokenizer, model, config)
        longest = limit(tokenizer, model)
        tokenizer.model_max_length = max_length(tokenizer, model, config, MAX_LENGTH)
        chats = any("messages" in rows.inputs[0] for rows in (data.train, data.held_out))
        if chats and not tokenizer.chat_template:
            raise ModelError(
                f"`--model`: the tokenizer of {config.model} has no chat template, which `messages` need. "
                "Choose a chat model, or give a prompt and a completion."
            )
        collate = DataCollatorForLanguageModeling(
            tokenizer.pad_token_id, padding_free=config.packing
        )
        loaded = Loaded(model, tokenizer, [], collate)
        # what is scored in the end is looked at now
        if config.metric == "exact_match":
            _prompts(tokenizer, data.held_out, longest - config.max_new_tokens)
        else:
            self._plain(loaded, data.held_out, "--eval", warn=True)
        return loaded

    def encode(self, loaded: Loaded, rows: Rows, config: TrainConfig) -> list[dict[str, Any]]:
        """Tokens and labels; longer texts in windows, longer answers cut; packed where asked for.

        Raises:
            DataError: no row has a token to learn from.
        """
        found = self._plain(loaded, rows, "--train", warn=True)
        if not config.packing:
            return found
        from datasets import Dataset
        from datasets.utils import disable_progress_bars
        from trl.data_utils import pack_dataset

        disable_progress_bars()
        packed = pack_dataset(Dataset.from_list(found), loaded.processor.model_max_length)
        return packed.to_list()

    def _plain(
        self, loaded: Loaded, rows: Rows, flag: str, warn: bool = False
    ) -> list[dict[str, Any]]:
        tokenizer, found, lost = loaded.processor, [], 0
        size = tokenizer.model_max_length
        for row in rows.inputs:
            if "text" in row:
                text = row["text"] + (tokenizer.eos_token or "")
                ids = tokenizer(text, verbose=False)["input_ids"]
                windows = (ids[at : at + size] for at in range(0, len(ids), size))
                found += [{"input_ids": some, "labels": some} for some in windows if len(some) > 1]
                continue
            chat = "messages" in row
            example = of_chat(tokenizer, row["messages"]) if chat else of_pair(tokenizer, row)
            cut = {key: value[:size] for key, value in example.items()}
            if any(label != IGNORED for label in cut["labels"][1:]):
                found.append(cut)
            else:
                lost += 1
        if not found:
            raise DataError(
                f"`{flag}`: no row has an answer within {size} tokens. Raise `--max-length`."
            )
        if lost and warn:
            warnings.warn(
                f"`{flag}`: {lost} of {len(rows)} rows have no answer within {size} tokens and are left "
                "out. Raise `--max-length`.",
                DataWarning,
                stacklevel=2,
            )
        return found

    def trainer(
        self,
        loaded: Loaded,
        examples: list[Any],
        order: list[int],
        settings: dict[str, Any],
        **more: Any,
    ) -> Any:
        """TRL's, over examples that are ready."""
        from datasets import Dataset
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        settings = {
            **settings,
            "max_length": None,
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }
        trainer = SFTTrainer(
            args=one_device(SFTConfig(**settings)),
            train_dataset=Dataset.from_list(examples).select(order),
            data_collator=loaded.collate,
            processing_class=loaded.processor,
            **more,
        )
        trainer.add_callback(_counting_on(trainer))
        return trainer

    def predict(self, trainer: Any, loaded: Loaded, rows: Rows, config: TrainConfig) -> Predictions:
        """Sums of negative log-likelihoods and counts of tokens, or which answers are right."""
        model = trainer.model.eval()
        if config.metric == "exact_match":
            return _answers(model, loaded.processor, rows, config.max_new_tokens)
        return _likelihoods(model, loaded, self._plain(loaded, rows, "--eval"))


def _counting_on(trainer: Any) -> Any:
    """A callback for TRL's count of tokens, which is in no checkpoint: it goes on from what was logged."""
    from transformers import TrainerCallback

    class Counting(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            counts = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
            if counts:
                trainer._total_train_tokens = int(counts[-1])

    return Counting()


def of_pair(tokenizer: Any, row: dict[str, str]) -> dict[str, list[int]]:
    """Tokens of a prompt and a completion, each tokenised for itself: where one ends is never in doubt."""
    prompt = _of_prompt(tokenizer, row["prompt"])
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        completion = [*completion, tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}


def _of_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Its tokens, without one that would end it."""
    ids = tokenizer(prompt)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def of_chat(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Tokens of a chat by the tokenizer's template; labels where the assistant speaks.

    Raises:
        DataError: the template does not take these messages, or does not show where the assistant speaks.
    """
    whole = _rendered(tokenizer, messages, False)
    labels = [IGNORED] * len(whole)
    for place, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        first = _common(_rendered(tokenizer, messages[:place], True), whole) if place else 0
        last = _common(_rendered(tokenizer, messages[: place + 1], False), whole)
        if last <= first:
            # the last answer may look another way than one in the middle: see what is gone without it
            rest = _rendered(tokenizer, [*messages[:place], *messages[place + 1 :]], False)
            begin = _common(_rendered(tokenizer, messages[:place], False), whole)
            last = begin + len(whole) - len(rest)
        if last <= first:
            raise DataError(
                "`messages`: the chat template does not show where message "
                f"{place + 1}, of the assistant, stands. Give prompts and completions instead."
            )
        labels[first:last] = whole[first:last]
    return {"input_ids": whole, "labels": labels}


def _rendered(tokenizer: Any, messages: Sequence[dict[str, Any]], begun: bool) -> list[int]:
    """Tokens of messages by the template, with the beginning of an answer or without."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=begun, tokenize=True, return_dict=False
        )
    except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"`messages`: the chat template of the model refuses messages of {roles}: {error}."
        ) from error


def _common(part: list[int], whole: list[int]) -> int:
    """Length of the common beginning."""
    return next(
        (at for at, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b),
        min(len(part), len(whole)),
    )


# ---- reading ------------------------------------------------------------------------------------


def _inputs(config: TrainConfig, flag: str) -> list[dict[str, Any]]:
    path = source_of(config, flag)
    if path.endswith(TEXT_FILES):
        if flag == "--train" and config.train_rows is not None:
            raise SettingError("`--train-rows` is for files of rows; a .txt file is one text.")
        return [{"text": _text(Path(path), flag)}]
    rows = rows_of(config, flag)
    columns = _columns(config, rows[0], flag, path)
    return [_checked(row, columns, number, flag, path) for number, row in enumerate(rows, 1)]


def _text(path: Path, flag: str) -> str:
    try:
        opened = gzip.open if path.name.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"`{flag}`: {path} cannot be read: {error}.") from error
    if not text.strip():
        raise DataError(f"`{flag}` must have text; {path} is empty.")
    return text


def _columns(config: TrainConfig, row: dict[str, Any], flag: str, path: str) -> dict[str, str]:
    """{what it is: its column}: prompt and completion, messages, or text, the first that is there."""
    pair = {"prompt": config.prompt, "completion": config.completion}
    if all(name in row for name in pair.values()):
        return pair
    if "messages" in row:
        return {"messages": "messages"}
    if config.text in row:
        return {"text": config.text}
    known = sorted(key for key in row if key is not None)
    raise DataError(
        f"`{flag}`: {Path(path).name} must have columns `{config.prompt}` and `{config.completion}`, "
        f"`messages`, or `{config.text}`; it has {known}. Name them by --prompt and --completion, or --text."
        f"{nearest(config.text, known)}"
    )


def _checked(
    row: dict[str, Any], columns: dict[str, str], number: int, flag: str, path: str
) -> dict[str, Any]:
    found = {kind: row.get(name) for kind, name in columns.items()}
    where = f"`{flag}`: row {number} of {Path(path).name}"
    if "messages" in found:
        given = found["messages"]
        messages = [m for m in given if isinstance(m, dict)] if isinstance(given, list) else []
        messages = [{key: m.get(key) for key in ("role", "content")} for m in messages]
        good = all(isinstance(value, str) for m in messages for value in m.values())
        if not good or not any(m["role"] == "assistant" for m in messages):
            raise DataError(
                f"{where} must have `messages` [{{role, content}}, …] with an assistant's among them."
            )
        return {"messages": messages}
    for kind, value in found.items():
        if not isinstance(value, str):
            shown = "nothing" if value is None else type(value).__name__
            raise DataError(f"{where} must have text in column `{columns[kind]}`; got {shown}.")
    return found


# ---- scoring ------------------------------------------------------------------------------------


@torch.inference_mode()
def _likelihoods(model: Any, loaded: Loaded, examples: list[dict[str, Any]]) -> Predictions:
    """Per example the sum of -log p over the tokens with a label, in nats, and their number."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    sums, counts = [0.0] * len(examples), [0] * len(examples)
    width = torch.nn.utils.rnn.pad_sequence
    for at in range(0, len(order), EVAL_BATCH):
        places = order[at : at + EVAL_BATCH]
        ids = [torch.tensor(examples[i]["input_ids"]) for i in places]
        batch = {
            "input_ids": width(ids, True, loaded.processor.pad_token_id),
            "attention_mask": width([torch.ones_like(row) for row in ids], True, 0),
        }
        labels = width([torch.tensor(examples[i]["labels"]) for i in places], True, IGNORED)
        batch = {key: value.to(model.device) for key, value in batch.items()}
        logits = model(**batch).logits[:, :-1].float()
        labels = labels[:, 1:].to(model.device)
        lost = torch.nn.functional.cross_entropy(
            logits.mT, labels, reduction="none", ignore_index=IGNORED
        )
        for i, total, count in zip(
            places, lost.double().sum(1).tolist(), (labels != IGNORED).sum(1).tolist(), strict=True
        ):
            sums[i], counts[i] = total, count
    return Predictions(sums, counts)


def _prompts(tokenizer: Any, rows: Rows, longest: int) -> tuple[list[list[int]], list[str]]:
    """Tokens of what is asked, at most so many, and the texts that are wanted.

    Raises:
        DataError: a prompt without a token. SettingError: one that leaves no room for an answer.
    """
    prompts, wanted = [], []
    for number, row in enumerate(rows.inputs, 1):
        if "messages" in row:
            last = max(i for i, m in enumerate(row["messages"]) if m["role"] == "assistant")
            wanted.append(row["messages"][last]["content"])
            prompts.append(_rendered(tokenizer, row["messages"][:last], True) if last else [])
        else:
            wanted.append(row["completion"])
            prompts.append(_of_prompt(tokenizer, row["prompt"]))
        if not prompts[-1]:
            raise DataError(f"`--eval`: row {number} asks nothing. Take it out.")
        if len(prompts[-1]) > longest:
            raise SettingError(
                f"`--max-new-tokens` must leave room for the prompts; row {number} of --eval has "
                f"{len(prompts[-1])} tokens, {max(longest, 0)} are left of what the model can hold. Lower it."
            )
    return prompts, wanted


@torch.inference_mode()
def _answers(model: Any, tokenizer: Any, rows: Rows, new: int) -> Predictions:
    """1 for every row whose greedy answer is the wanted one, else 0; and what is wanted, ones."""
    prompts, wanted = _prompts(tokenizer, rows, sys.maxsize)
    hits = [0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), EVAL_BATCH):
        places = order[at : at + EVAL_BATCH]
        size = max(len(prompts[i]) for i in places)
        batch = tokenizer.pad(
            {"input_ids": [prompts[i] for i in places]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        out = model.generate(
            **batch, max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        for i, text in zip(
            places, tokenizer.batch_decode(out[:, size:], skip_special_tokens=True), strict=True
        ):
            hits[i] = int(is_right(text, wanted[i]))
    return Predictions(hits, [1] * len(hits))


def is_right(text: str, wanted: str) -> bool:
    """Whether a text answers what is wanted: what follows `####` in it, else all of it.

    Where that is a number, the last number of the text's answer must equal it; else the words must be the same.
    """
    found, right = (" ".join(_answer(side).split()) for side in (text, wanted))
    if NUMBER.fullmatch(right):
        numbers = NUMBER.findall(found)
        return bool(numbers) and _value(numbers[-1]) == _value(right)
    return found == right


def _answer(text: str) -> str:
    marked = ANSWER.search(text)
    return marked[1] if marked else text


def _value(number: str) -> float:
    return float(number.replace(",", "").replace("$", ""))
