"""Causal language modelling and instruction tuning through TRL's `SFTTrainer`.

Rows are plain texts (`text`, or a .txt file), a prompt and a completion, or `messages` of a chat. The loss is on
all tokens of a text, on the completion, or on what the assistant says.
"""

import gzip
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from geolora.errors import (
    DataError,
    DataWarning,
    ModelError,
    SettingError,
    at_most_three,
    first_line,
    install,
    listed,
    nearest,
)
from geolora.processes import one_device
from geolora.settings.train_config import TrainConfig
from geolora.tasks.answers import answer_all, prompts_of
from geolora.tasks.chat_tokens import chat_tokens, checked_chat, pair_tokens
from geolora.tasks.rows import without_bars
from geolora.tasks.task import (
    Data,
    Loaded,
    Predictions,
    Rows,
    Task,
    loading,
    naming_model_errors,
    rows_of,
    source_of,
)
from geolora.tasks.tokenizers import IGNORED, limit, max_length, pad

MAX_LENGTH = 1024
EVAL_BATCH = 8
PROBE = 16
"""Tokens of the rows that show whether packed rows see each other."""
LONGEST_TEXT = 2**28
"""Characters of a text: a small .gz can hold any number."""
TEXT_FILES = (".txt", ".txt.gz")


class CausalLM(Task):
    """Texts to their next tokens."""

    peft_type = "CAUSAL_LM"

    def read(self, config: TrainConfig) -> Data:
        """One input per row: {"text"}, {"prompt", "completion"} or {"messages"}."""
        if find_spec("trl") is None:
            raise SettingError(f"`--task causal-lm` needs the package `trl`. Run: {install('lm')}.")
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
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=config.dtype, trust_remote_code=False, output_loading_info=True
            )
            return tokenizer, *loaded

        tokenizer, model, info = loading(config, load)
        model.config.use_cache = False  # with a cache packed rows would see each other
        longest = limit(tokenizer, model)
        with naming_model_errors(config):
            _demand_causal(model, longest, info["missing_keys"], config.model)
        pad(tokenizer, model, config)
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
        if config.packing:
            _demand_rows_apart(loaded, config.model)
        # rows that cannot be scored are refused now, not after the training
        if config.metric == "exact_match":
            prompts_of(tokenizer, data.held_out, longest - config.max_new_tokens)
        else:
            _examples(loaded, data.held_out, "--eval", warn=True)
        return loaded

    def encode(self, loaded: Loaded, rows: Rows, config: TrainConfig) -> list[dict[str, Any]]:
        """Tokens and labels; longer texts in windows, longer answers cut; packed where asked for.

        Raises:
            DataError: no row has a token to learn from.
        """
        examples = _examples(loaded, rows, "--train", warn=True)
        if not config.packing:
            return examples
        from datasets import Dataset
        from trl.data_utils import pack_dataset

        with without_bars():
            packed = pack_dataset(Dataset.from_list(examples), loaded.processor.model_max_length)
        return packed.to_list()

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
            return answer_all(model, loaded.processor, rows, config.max_new_tokens)
        return _likelihoods(model, loaded, _examples(loaded, rows, "--eval"))


def _demand_causal(model: Any, longest: int, missing: Iterable[str], name: str) -> None:
    """Refuse a model that reads what it is to predict, or whose head was never trained.

    Raises:
        ModelError: a token's logits depend on those after it, or weights are not in the checkpoint.
    """
    known = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(min(PROBE, longest), device=model.device)[None] % known
    other = ids.clone()
    other[0, -1] = 0
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            one, two = (model(input_ids=row).logits[0, :-1].double() for row in (ids, other))
    finally:
        model.train(training)
    change = float((one - two).abs().max()) / max(float(one.abs().max()), 1e-30)
    if not change <= 4 * torch.finfo(model.dtype).eps:
        raise ModelError(
            f"`--model`: in {name} ({type(model).__name__}) a token sees those after it, so there is "
            "nothing to predict. Choose a causal language model."
        )
    if missing := sorted(missing):
        raise ModelError(
            f"`--model`: {name} was saved without weights that {type(model).__name__} needs: "
            f"{at_most_three(missing)}. Choose a checkpoint of a causal language model, with its head."
        )


def _counting_on(trainer: Any) -> Any:
    """A callback for TRL's count of tokens, which is in no checkpoint: it goes on from what was logged."""
    from transformers import TrainerCallback

    class Counting(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            counts = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
            if counts:
                trainer._total_train_tokens = int(counts[-1])

    return Counting()


def _examples(loaded: Loaded, rows: Rows, flag: str, warn: bool = False) -> list[dict[str, Any]]:
    """Tokens and labels of rows: texts in windows, pairs and chats cut to the longest row.

    Args:
        flag: of the rows. warn: whether to say how many have no answer left, and so are left out.

    Raises:
        DataError: no row has a token to learn from.
    """
    tokenizer, examples, unanswered = loaded.processor, [], 0
    size = tokenizer.model_max_length
    for number, row in enumerate(rows.inputs, 1):
        if "text" in row:
            text = row["text"] + (tokenizer.eos_token or "")
            ids = tokenizer(text, verbose=False)["input_ids"]
            windows = (ids[start : start + size] for start in range(0, len(ids), size))
            kept = [{"input_ids": w, "labels": w} for w in windows if len(w) > 1]
            examples += kept
            unanswered += not kept
            continue
        chat = "messages" in row
        where = f"`{flag}`: row {number}: `messages`"
        example = (
            chat_tokens(tokenizer, row["messages"], row.get("tools"), where)
            if chat
            else pair_tokens(tokenizer, row)
        )
        cut = {key: value[:size] for key, value in example.items()}
        if any(label != IGNORED for label in cut["labels"][1:]):
            examples.append(cut)
        else:
            unanswered += 1
    if not examples:
        raise DataError(
            f"`{flag}`: no row has a text or an answer within {size} tokens. Raise `--max-length`."
        )
    if unanswered and warn:
        warnings.warn(
            f"`{flag}`: {unanswered} of {len(rows)} rows have no text or answer within {size} tokens and are left "
            "out. Raise `--max-length`.",
            DataWarning,
            stacklevel=2,
        )
    return examples


# ---- packing ------------------------------------------------------------------------------------


def _demand_rows_apart(loaded: Loaded, name: str) -> None:
    """Refuse packing for a model in which packed rows see each other, or stand at other positions than alone.

    Many models make their mask or positions themselves and know nothing of rows. So two short rows go through the
    model packed, packed with another first row, and alone, as they do in training.

    Raises:
        SettingError: the second row's logits depend on the first row.
    """
    size = min(PROBE, loaded.processor.model_max_length // 2)
    known = min(len(loaded.processor), loaded.model.get_input_embeddings().num_embeddings)
    special = set(loaded.processor.all_special_ids)
    words = [i for i in range(known) if i not in special] or [*range(known)]
    random = torch.Generator().manual_seed(0)
    first, other, second = (
        [words[i] for i in torch.randint(len(words), (size,), generator=random).tolist()]
        for _ in range(3)
    )

    def of_second(*rows: list[int]) -> torch.Tensor:
        batch = loaded.collate([{"input_ids": row, "labels": row} for row in rows])
        batch.pop("labels")
        batch = {k: v.to(model.device) if hasattr(v, "to") else v for k, v in batch.items()}
        return model(**batch).logits[0, -size:].double()

    model, training = loaded.model, loaded.model.training
    model.eval()
    try:
        with torch.inference_mode():
            packed, beside, alone = (
                of_second(*rows) for rows in ((first, second), (other, second), (second,))
            )
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise SettingError(
            f"`--packing`: {name} does not take packed rows: {first_line(error)}. Leave --packing out."
        ) from error
    finally:
        model.train(training)
    # what another first row changes is 0 where rows are apart; alone the sums are rounded in another order
    rounding = torch.finfo(model.dtype).eps * float(alone.abs().max())
    leak, moved = (float((packed - logits).abs().max()) for logits in (beside, alone))
    if not (leak <= max(rounding, 1e-6) and moved <= max(16 * rounding, 1e-5)):
        raise SettingError(
            f"`--packing`: in {name} a row sees the rows packed before it (its logits change by up to "
            f"{max(leak, moved) / max(float(alone.abs().max()), 1e-30):.1%}). Leave --packing out."
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
        with opened(path, "rt", encoding="utf-8-sig") as file:
            text = file.read(LONGEST_TEXT + 1)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"`{flag}`: {path} cannot be read: {error}.") from error
    if len(text) > LONGEST_TEXT:
        raise DataError(
            f"`{flag}`: {path} has more than {LONGEST_TEXT:,} characters, too many for one text. Cut it into rows "
            "of a .jsonl file."
        )
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
    known = sorted(row)
    raise DataError(
        f"`{flag}`: {Path(path).name} must have columns `{config.prompt}` and `{config.completion}`, "
        f"`messages`, or `{config.text}`; it has {listed(known)}. Name them by --prompt and --completion, or --text."
        f"{nearest(config.text, known)}"
    )


def _checked(
    row: dict[str, Any], columns: dict[str, str], number: int, flag: str, path: str
) -> dict[str, Any]:
    values = {kind: row.get(name) for kind, name in columns.items()}
    where = f"`{flag}`: row {number} of {Path(path).name}"
    if "messages" in values:
        return checked_chat(row, where)
    for kind, value in values.items():
        if not isinstance(value, str):
            got = "nothing" if value is None else type(value).__name__
            raise DataError(f"{where} must have text in column `{columns[kind]}`; got {got}.")
        if kind == "completion" and not value.strip():
            raise DataError(f"{where} has no answer in column `{columns[kind]}`. Take it out.")
    return values


# ---- scoring ------------------------------------------------------------------------------------


@torch.inference_mode()
def _likelihoods(model: Any, loaded: Loaded, examples: list[dict[str, Any]]) -> Predictions:
    """Per example the sum of -log p over the tokens with a label, in nats, and their number."""
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    sums, counts = [0.0] * len(examples), [0] * len(examples)
    padded = torch.nn.utils.rnn.pad_sequence
    for start in range(0, len(by_length), EVAL_BATCH):
        indices = by_length[start : start + EVAL_BATCH]
        ids = [torch.tensor(examples[i]["input_ids"]) for i in indices]
        batch = {
            "input_ids": padded(ids, True, loaded.processor.pad_token_id),
            "attention_mask": padded([torch.ones_like(row) for row in ids], True, 0),
        }
        labels = padded([torch.tensor(examples[i]["labels"]) for i in indices], True, IGNORED)
        batch = {key: value.to(model.device) for key, value in batch.items()}
        logits = model(**batch).logits[:, :-1].float()
        labels = labels[:, 1:].to(model.device)
        losses = torch.nn.functional.cross_entropy(
            logits.mT, labels, reduction="none", ignore_index=IGNORED
        )
        totals, tokens = losses.double().sum(1).tolist(), (labels != IGNORED).sum(1).tolist()
        for i, total, count in zip(indices, totals, tokens, strict=True):
            sums[i], counts[i] = total, count
    return Predictions(sums, counts)
