"""Language models: where the loss is, what is scored, and that stock peft computes what was scored."""

import dataclasses
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from geolora.errors import DataError, DataWarning, ModelError, SettingError
from geolora.settings.train_config import TrainConfig
from geolora.tasks.answers import is_right
from geolora.tasks.causal_lm import CausalLM
from geolora.tasks.chat_tokens import chat_tokens, checked_chat, pair_tokens
from geolora.tasks.tokenizers import IGNORED
from geolora.training import run as training
from models import CHAT, tiny_bert, tiny_llama
from rows import sums

pytest.importorskip("trl")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl.*"),
]
TASK = CausalLM()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama") / "chat", chat=True)


def tiny_headless_llama(folder: Path) -> Path:
    """Saved as `AutoModel` has it."""
    AutoModel.from_pretrained(tiny_llama(folder)).save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def text_file(folder: Path) -> str:
    (folder / "some.txt").write_text("the film is good and the plot is bad")
    return str(folder / "some.txt")


@pytest.fixture
def config(model: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=str(model), task="causal-lm", prompt="question", completion="answer",
        train=write(tmp_path / "train.jsonl", sums(64, 0)),
        eval=write(tmp_path / "dev.jsonl", sums(12, 1)),
        rank=8, lr=3e-2, tail=0.0, max_steps=150, batch_size=16, max_new_tokens=8,
        output=str(tmp_path / "out"),
    )  # fmt: skip


def test_answers_are_learnt_and_scored_as_stock_peft_computes_them(config: TrainConfig) -> None:
    config = dataclasses.replace(config, metric="exact_match")
    outcome = training.train(config, training.load(config))
    folder = Path(config.output) / "adapter"
    assert outcome.report["metric"] == "exact_match"
    assert outcome.report["value"] > 0.9, "sums of nine pairs are learnt by heart"

    base = AutoModelForCausalLM.from_pretrained(config.model)
    loaded = PeftModel.from_pretrained(base, str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hits = []
    for row in sums(12, 1):
        ids = tokenizer(row["question"], return_tensors="pt")
        ids.pop("token_type_ids", None)
        out = loaded.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=1)
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        hits.append(int(is_right(text, row["answer"])))
    assert hits == outcome.predictions
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_perplexity_is_that_of_the_completions(config: TrainConfig) -> None:
    config = dataclasses.replace(config, max_steps=3)
    report = training.run(config)
    base = AutoModelForCausalLM.from_pretrained(config.model)
    loaded = PeftModel.from_pretrained(base, f"{config.output}/adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    lost, count = 0.0, 0
    for row in sums(12, 1):
        prompt = tokenizer(row["question"])["input_ids"]
        ids = torch.tensor([prompt + tokenizer(row["answer"])["input_ids"] + [1]])
        with torch.no_grad():
            log_p = loaded(input_ids=ids).logits.log_softmax(-1)
        for place in range(len(prompt), ids.shape[1]):
            lost, count = lost - float(log_p[0, place - 1, ids[0, place]]), count + 1
    assert report["value"] == pytest.approx(math.exp(lost / count), rel=1e-5)


def test_packed_rows_are_learnt_as_if_alone(config: TrainConfig) -> None:
    """The same rows in one step, packed and padded: the same loss, so no row has seen another."""
    losses = []
    for packing in (False, True):
        one = dataclasses.replace(config, packing=packing, max_length=32, max_steps=1)
        data = training.load(one)
        loaded = TASK.load(one, data)
        examples = TASK.encode(loaded, data.train, one)
        # as a start calls it, and the trainer
        with torch.no_grad():
            losses.append(float(loaded.model(**loaded.collate(examples)).loss))
        assert (len(examples) < len(data.train)) == packing
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_text_file_is_learnt_in_windows(config: TrainConfig, tmp_path: Path) -> None:
    words = "the film is good and the plot is bad " * 30
    (tmp_path / "a.txt").write_text(words)
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write(words)
    config = dataclasses.replace(
        config, train=str(tmp_path / "a.txt"), eval=str(tmp_path / "b.txt.gz"), max_length=20,
        max_steps=40, batch_size=14,
    )  # fmt: skip
    data = training.load(config)
    examples = TASK.encode(TASK.load(config, data), data.train, config)
    assert [len(example["input_ids"]) for example in examples] == [20] * 13 + [
        11
    ]  # 270 words, </s>
    report = training.train(config, data).report  # the same windows are scored
    assert math.log(report["value"]) == pytest.approx(report["train_loss"], rel=1e-2)
    assert report["train_loss"] < 3  # 3.5 before


def test_the_loss_of_a_pair_is_on_the_completion(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = pair_tokens(tokenizer, {"prompt": "the film", "completion": "is good"})
    assert tokenizer.decode(found["input_ids"]) == "the film is good </s>"
    assert found["labels"] == [IGNORED, IGNORED, *found["input_ids"][2:]]


def test_the_loss_of_a_chat_is_on_what_the_assistant_says(chat_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    said = [("system", "not bad"), ("user", "the film"), ("assistant", "good"), ("user", "a plot"),
            ("assistant", "very fine")]  # fmt: skip
    found = chat_tokens(tokenizer, [{"role": role, "content": text} for role, text in said])
    kept = [i for i, label in zip(found["input_ids"], found["labels"], strict=True) if label >= 0]
    assert tokenizer.decode(kept) == "good </s> very fine </s>"
    assert all(label in (IGNORED, i) for i, label in zip(*found.values(), strict=True))


def test_a_chat_is_trained_through_the_command(
    config: TrainConfig, chat_model: Path, tmp_path: Path
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in sums(40, 0)
    ]  # fmt: skip
    file = write(tmp_path / "chat.jsonl", rows)
    config = dataclasses.replace(
        config, model=str(chat_model), train=file, eval=file, metric="exact_match", method="lora",
        init="lora-one", lr=1e-2, max_steps=80,
    )  # fmt: skip
    assert training.run(config)["value"] > 0.8


def test_what_cannot_be_learnt_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, **changes: object) -> None:
        changed = dataclasses.replace(config, **changes)
        with pytest.raises(error, match=match):
            training.train(changed, training.load(changed))
        assert not Path(config.output).exists()

    refused(
        DataError,
        "must have columns `question` and `anwser`, `messages`, or `text`",
        completion="anwser",
    )
    refused(DataError, "no row has a text or an answer within 3 tokens", max_length=3)
    refused(SettingError, "`--max-length` must be at most 64", max_length=65)
    chat = write(
        tmp_path / "chat.jsonl", [{"messages": [{"role": "assistant", "content": "good"}]}]
    )
    refused(ModelError, "has no chat template", train=chat, eval=chat)
    silent = write(tmp_path / "silent.jsonl", [{"messages": [{"role": "user", "content": "good"}]}])
    refused(DataError, "row 1 of silent.jsonl must have `messages`", train=silent)
    empty = write(tmp_path / "empty.jsonl", [{"question": "the", "answer": None}])
    refused(
        DataError,
        "row 1 of empty.jsonl must have text in column `answer`; got nothing",
        train=empty,
    )
    (tmp_path / "no.txt").write_text(" \n")
    refused(DataError, "must have text", train=str(tmp_path / "no.txt"))
    refused(
        DataError,
        "`--eval`: no row has a text or an answer within 3 tokens",
        max_length=3,
        train=text_file(tmp_path),
    )
    refused(
        SettingError,
        "row 1 of --eval has 4 tokens, 0 are left",
        metric="exact_match",
        max_new_tokens=64,
    )
    none = write(tmp_path / "none.jsonl", [{"question": "", "answer": "good"}])
    refused(DataError, "row 1 asks nothing", metric="exact_match", eval=none)
    refused(
        SettingError, "`--train-rows` is for files of rows", train=text_file(tmp_path), train_rows=3
    )
    refused(SettingError, "`--text-pair` belongs to --task text-classification", text_pair="other")
    text = write(tmp_path / "text.jsonl", [{"text": "the film"}])
    refused(SettingError, "`--metric exact_match` needs a prompt", eval=text, metric="exact_match")


@pytest.mark.parametrize(
    "make, line",
    [
        (tiny_bert, r"BertLMHeadModel\) a token sees those after it"),
        (tiny_headless_llama, "saved without weights that LlamaForCausalLM needs: lm_head.weight"),
    ],
)
def test_what_is_no_causal_model_is_refused(
    make: Callable, line: str, config: TrainConfig, tmp_path: Path
) -> None:
    """A BERT read what it was to predict, and a new head was in no adapter: the score was another one's."""
    with pytest.raises(ModelError, match=line) as error:
        training.run(dataclasses.replace(config, model=str(make(tmp_path / "model"))))
    assert "causal language model" in str(error.value)
    assert not Path(config.output).exists()


def test_an_answer_in_the_middle_may_look_another_way_than_the_last(chat_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.chat_template = CHAT.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' and loop.last %}#### {% endif %}{{ m['content'] }}",
    )
    said = [("user", "the film"), ("assistant", "good"), ("user", "a plot"), ("assistant", "bad")]
    found = chat_tokens(tokenizer, [{"role": role, "content": text} for role, text in said])
    kept = [i for i, label in zip(found["input_ids"], found["labels"], strict=True) if label >= 0]
    assert tokenizer.decode(kept) == "good </s> #### bad </s>"
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(DataError, match="refuses messages of user, assistant: no system"):
        chat_tokens(
            tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        )


def test_rows_that_are_left_out_are_told(config: TrainConfig, tmp_path: Path) -> None:
    rows = [*sums(4, 0), {"question": "the " * 30, "answer": "good"}]
    config = dataclasses.replace(
        config, train=write(tmp_path / "long.jsonl", rows), max_length=12, max_steps=1
    )
    with pytest.warns(
        DataWarning, match="`--train`: 1 of 5 rows have no text or answer within 12 tokens"
    ):
        training.run(config)


@pytest.mark.parametrize(
    ("text", "wanted", "right"),
    [
        ("so 3 and 4\n#### 1,234", "#### 1234", True), ("it costs $5.50.", "5.5", True),
        ("12 then -7", "#### -7", True), ("12 then -7", "12", False), ("2.00", "2", True),
        ("1e3", "1000", True), ("a  b", " a b", True), ("CO2", "H2O", False), ("H2O", "H2O", True),
        ("London 1990", "Paris 1990", False), ("#### yes", "well #### yes", True), ("", "3", False),
    ],
)  # fmt: skip
def test_an_answer_is_right(text: str, wanted: str, right: bool) -> None:
    assert is_right(text, wanted) == right


# ---- chats, whole or not at all -----------------------------------------------------------------

CALLS = (
    "{% if tools %}tools {{ tools | tojson }} {% endif %}{% for m in messages %}<|{{ m['role'] }}|> "
    "{% if m['think'] %}not {{ m['think'] }} {% endif %}{{ m['content'] }} "
    "{% for c in m['tool_calls'] or [] %}a {{ c['function']['name'] }} {% endfor %}</s> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
CALL = {"type": "function", "function": {"name": "music", "arguments": {}}}


def talk(**answer: object) -> dict:
    return {"messages": [{"role": "user", "content": "the film"}, {"role": "assistant", **answer}]}


def learnt(tokenizer: object, row: dict) -> str:
    row = checked_chat(row, "row 1")
    found = chat_tokens(tokenizer, row["messages"], row.get("tools"))
    return tokenizer.decode([label for label in found["labels"] if label >= 0])


@pytest.fixture
def caller(chat_model: Path) -> object:
    """A tokenizer whose template knows of tools, calls and thoughts."""
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.chat_template = CALLS
    return tokenizer


@pytest.mark.parametrize(
    "answer, text",
    [
        ({"content": None, "tool_calls": [CALL]}, "a music </s>"),
        ({"content": "", "tool_calls": [CALL]}, "a music </s>"),
        ({"tool_calls": [CALL, CALL]}, "a music a music </s>"),
        ({"content": "good", "tool_calls": [CALL]}, "good a music </s>"),
        ({"content": "good", "think": "bad"}, "not bad good </s>"),
        ({"content": "good", "think": None, "tool_calls": [], "weight": 1}, "good </s>"),
        ({"content": "good", "weight": 0}, ""),
    ],
)
def test_an_answer_is_learnt_whole(caller: object, answer: dict, text: str) -> None:
    assert learnt(caller, talk(**answer)) == text


def test_what_a_template_leaves_out_is_refused_by_key(caller: object, chat_model: Path) -> None:
    plain = AutoTokenizer.from_pretrained(chat_model)
    for key, value in (("tool_calls", [CALL]), ("think", "bad"), ("reasoning_content", "bad")):
        with pytest.raises(DataError, match=f"leaves out `{key}` of message 2, assistant: nothing"):
            learnt(plain, talk(content="good", **{key: value}))
    with pytest.raises(DataError, match="leaves out `reasoning_content` of message 2"):
        learnt(caller, talk(content="good", reasoning_content="bad"))
    row = {**talk(content="good"), "tools": [CALL]}
    with pytest.raises(DataError, match="leaves out `tools`: nothing of it would be learnt"):
        learnt(plain, row)
    checked = checked_chat(row, "row 1")
    wanted = caller.apply_chat_template(row["messages"], tools=[CALL], return_dict=False)
    assert chat_tokens(caller, checked["messages"], checked["tools"])["input_ids"] == wanted
    said = [*talk(tool_calls=[CALL])["messages"], {"role": "tool", "content": "good", "name": "music", "tool_call_id": "7"},
            {"role": "assistant", "content": "fine"}]  # fmt: skip
    assert learnt(caller, {"messages": said}) == "a music </s> fine </s>", "marks may be left out"


def test_a_thought_may_be_shown_at_the_end_only(chat_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.chat_template = CALLS.replace("if m['think']", "if m['think'] and loop.last")
    said = [*talk(content="good", think="bad")["messages"], *talk(content="fine")["messages"]]
    assert learnt(tokenizer, {"messages": said}) == "good </s> fine </s>", "as the template says"


@pytest.mark.parametrize(
    "row, line",
    [
        (talk(content=None), "row 1: message 2 must have text as `content`; got None"),
        (talk(content=""), "row 1: message 2, of the assistant, says nothing"),
        (talk(content=" ", tool_calls=[]), "row 1: message 2, of the assistant, says nothing"),
        (talk(content="", weight=0), "row 1: message 2, of the assistant, says nothing"),
        (talk(content="good", weight=0.5), "row 1: message 2: `weight` must be 0 or 1; got 0.5"),
        (talk(content=[{"type": "text", "text": "good"}]), "message 2 must have text as `content`; got [{"),
        ({"messages": [*talk(content="a")["messages"], "b"]}, "must have `messages` [{role, content}"),
        ({"mesages": []}, "must have `messages` [{role, content}, …]; got None"),
        ({"messages": [{"role": None, "content": "a"}]}, "message 1 must have a `role`; got None"),
        ({**talk(content="a"), "tools": "[]"}, "`tools` must be a list of objects; got '[]'"),
        ({**talk(content="a"), "functions": [{}]}, "has `functions`, which no template is given"),
        (talk(content="a", extra=b"x"), "`messages` must be JSON"),
    ],
)  # fmt: skip
def test_what_is_no_chat_is_refused(row: dict, line: str) -> None:
    with pytest.raises(DataError) as caught:
        checked_chat(row, "row 1")
    assert line in str(caught.value)


def test_the_command_says_the_row_of_a_chat(
    config: TrainConfig, chat_model: Path, tmp_path: Path
) -> None:
    def refused(row: dict, match: str, **changes: object) -> None:
        file = write(tmp_path / "chat.jsonl", [talk(content="good"), row])
        changed = dataclasses.replace(
            config, model=str(chat_model), train=file, eval=file, **changes
        )
        with pytest.raises(DataError, match=match):
            TASK.load(changed, training.load(changed))

    refused(talk(content=""), "`--train`: row 2 of chat.jsonl: message 2, of the assistant, says")
    refused(
        talk(content="a", tool_calls=[CALL]), "`--eval`: row 2: `messages`: the chat template of"
    )
    refused(talk(content="a", weight=0), "row 2.*the last answer", metric="exact_match")
    pair = write(tmp_path / "pair.jsonl", [{"question": "a", "answer": " "}])
    with pytest.raises(DataError, match="row 1 of pair.jsonl has no answer in column `answer`"):
        training.load(dataclasses.replace(config, train=pair))
