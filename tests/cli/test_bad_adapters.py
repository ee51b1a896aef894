"""Adapter folders that cannot or must not be read: one clear line from every command."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertModel

import geolora as library
from geolora.adapters.names import CONFIG, PROBES, WEIGHTS
from geolora.cli.__main__ import main
from models import tiny_bert

COMMANDS = ("inspect", "verify", "export")
LAYER = "encoder.layer.0.attention.self.query"
KEY = f"base_model.model.{LAYER}.lora_"
SIZE = 32


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model and a right adapter of rank 3."""
    folder = tmp_path_factory.mktemp("good")
    base = BertModel.from_pretrained(tiny_bert(folder / "base"))
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["query", "dense"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    library.export(model, folder / "adapter")
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture) -> Callable:
    def run(*words: object) -> tuple[int, str, str]:
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


# ---- how a folder is spoilt ----------------------------------------------------------------------


def config(**changes: Any) -> Callable:
    """Other values in adapter_config.json; None removes a key."""

    def spoil(folder: Path) -> None:
        found = {**json.loads((folder / CONFIG).read_text()), **changes}
        found = {key: value for key, value in found.items() if value is not None}
        (folder / CONFIG).write_text(json.dumps(found))

    return spoil


def text(words: str, name: str | Path = CONFIG) -> Callable:
    return lambda folder: (folder / name).write_text(words)


def tensors(change: Callable, name: str | Path = WEIGHTS) -> Callable:
    """The weights, changed by a function of {key: tensor}."""

    def spoil(folder: Path) -> None:
        found = load_file(folder / name)
        change(found)
        save_file(found, folder / name, metadata={"format": "pt"})

    return spoil


def put(key: str, value: torch.Tensor, name: str | Path = WEIGHTS) -> Callable:
    return tensors(lambda found: found.update({key: value}), name)


def drop(key: str, name: str | Path = WEIGHTS) -> Callable:
    return tensors(lambda found: found.pop(key), name)


def remove(name: str | Path) -> Callable:
    return lambda folder: (folder / name).unlink()


def cut(name: str | Path, size: int) -> Callable:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(PICKLE)


def link_to_nothing(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder.parent / "gone")


def in_its_place(name: str | Path) -> Callable:
    """A folder where a file should be."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


def with_one(value: float) -> torch.Tensor:
    tensor = torch.ones(3, SIZE)
    tensor[1, 2] = value
    return tensor


PICKLE = b"cos\nmkdir\n(Vopened\ntR."
"""Unpickled, it makes a folder called `opened`."""

SLOW = "(([a-z0-9._])+)+!"
"""It looks at a name in more ways than there are atoms."""

FOLDERS: dict[str, tuple[Callable, str]] = {
    "without config": (remove(CONFIG), "`path` must be a PEFT adapter folder; {f} has no adapter_config.json."),
    "config is a folder": (in_its_place(CONFIG), "has no adapter_config.json"),
    "without weights": (remove(WEIGHTS), "{f} has no adapter_model.safetensors. Save the adapter again"),
    "link to nothing": (link_to_nothing, "{f} has no adapter_model.safetensors"),
    "pickle": (pickled, "adapter_model.bin is a pickle, which can run code and is not opened. Convert it in a trusted environment, with peft's save_pretrained(safe_serialization=True)."),
    "config empty": (text(""), "{f}/adapter_config.json must hold JSON: Expecting value"),
    "config no JSON": (text("{r: 8}"), "must hold JSON: Expecting property name"),
    "config no text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe{}"), "must hold JSON: 'utf-8' codec can't decode"),
    "config too deep": (text("[" * 100_000), "must hold JSON: maximum recursion depth"),
    "config a list": (text("[]"), "must hold a JSON object; got a list."),
    "no peft_type": (config(peft_type=None), "must have `peft_type`; it does not. Save the adapter again"),
    "no r": (config(r=None), "must have `r`; it does not"),
    "no alpha": (config(lora_alpha=None), "must have `lora_alpha`; it does not"),
    "r zero": (config(r=0), "`r` must be an integer above 0; got 0."),
    "r negative": (config(r=-4), "`r` must be an integer above 0; got -4."),
    "r a fraction": (config(r=2.5), "`r` must be an integer above 0; got 2.5."),
    "r a word": (config(r="3"), "`r` must be an integer above 0; got '3'."),
    "r true": (config(r=True), "`r` must be an integer above 0; got True."),
    "r enormous": (config(r=10**400), "`r` must be an integer above 0; got 1000"),
    "r another": (config(r=4, lora_alpha=4), "must have A (4, d_in) and B (d_out, 4), the rank in adapter_config.json; got A (3, 32) and B (32, 3)"),
    "alpha a word": (config(lora_alpha="16"), "`lora_alpha` must be a number above 0; got '16'."),
    "alpha zero": (config(lora_alpha=0), "`lora_alpha` must be a number above 0; got 0."),
    "alpha NaN": (config(lora_alpha=float("nan")), "must hold JSON: NaN is no finite number."),
    "alpha infinite": (text('{"r": 3, "lora_alpha": 1e999}'), "must hold JSON: 1e999 is no finite number."),
    "a key twice": (text('{"r": 3, "r": 4}'), "must hold JSON: the key 'r' stands twice."),
    "alpha enormous": (config(lora_alpha=10**400), "`lora_alpha` must be a number above 0; got 1000"),
    "rslora a word": (config(use_rslora="no"), "`use_rslora` must be true or false; got 'no'."),
    "pattern a list": (config(rank_pattern=[4]), "`rank_pattern` must be an object of names and values; got [4]."),
    "pattern of words": (config(rank_pattern={"query": "4"}), "`rank_pattern` of 'query' must be an integer above 0; got '4'."),
    "pattern no regex": (config(alpha_pattern={"(": 4}), "`alpha_pattern` must be names or regular expressions; got '('."),
    "pattern nested": (config(rank_pattern={"(" * 500 + ")" * 500: 4}), "`rank_pattern` must be names or regular expressions; got '((("),
    "pattern with flags": (config(rank_pattern={"(?i)query": 4}), "`rank_pattern` must be names or regular expressions; got '(?i)query'."),
    "pattern too long": (config(rank_pattern={"a" * 1001: 4}), "a pattern of `rank_pattern` must have at most 1,000 characters; got 1,001"),
    "patterns too many": (config(alpha_pattern={f"a{i}": 4 for i in range(200_000)}), "`alpha_pattern` must have at most 512 patterns (512, or one for each layer); got 200,000."),
    "pattern for ever": (config(rank_pattern={"query": 3, SLOW: 4}), f"`rank_pattern` has a pattern that takes more than 0.5 s to match: '{SLOW}'. Write the names of the layers instead."),
    "rank larger than the file": (config(r=2**31 - 1, rank_pattern={"": 3, ".*": 3}), "a rank must be at most 48, the longest side in adapter_model.safetensors; got 2147483647."),
    "name too long": (put("a" * 1001, torch.ones(1)), "names must be printable, and of 1,000 characters at most; got 'aaa"),
    "alpha pattern": (config(alpha_pattern={"query": -1}), "`alpha_pattern` of 'query' must be a number above 0; got -1."),
    **{
        f"method {name}": (config(peft_type=name), f"`peft_type` must be LORA; got '{name}'. Only LoRA is W0 + s B A.")
        for name in ("LOHA", "ADALORA", "IA3", "PREFIX_TUNING", "lora")
    },
    "method a number": (config(peft_type=7), "`peft_type` must be LORA; got 7."),
    "dora": (config(use_dora=True), "`use_dora` is set: DoRA rescales W0 + s B A with trained magnitudes, so the singular values of s B A are not those of the update."),
    "alora": (config(alora_invocation_tokens=[1]), "`alora_invocation_tokens` is set: aLoRA acts on some tokens only"),
    "experts": (config(target_parameters=["w"], r=1), "`target_parameters` is set: the factors of all experts"),
    "megatron": (config(megatron_config={"x": 1}, megatron_core="planted"), "`megatron_config` is set: a layer holds a part of its factors, and a module is imported by name"),
    "pissa": (config(init_lora_weights="pissa_niter_4"), "the start 'pissa_niter_4' changed the base weights, so s B A is not the whole update."),
    "weights empty": (cut(WEIGHTS, 0), "{f}/adapter_model.safetensors cannot be read"),
    "weights cut in the header": (cut(WEIGHTS, 50), "{f}/adapter_model.safetensors cannot be read"),
    "weights cut in the data": (cut(WEIGHTS, 6000), "It is no whole safetensors file; copy or save it again."),
    "weights a pickle": (lambda f: (f / WEIGHTS).write_bytes(PICKLE), "adapter_model.safetensors cannot be read"),
    "weights a folder": (in_its_place(WEIGHTS), "{f} has no adapter_model.safetensors"),
    "no pairs": (tensors(lambda t: [t.pop(k) for k in list(t) if "lora_" in k] and t.update(x=torch.ones(1))), "`path` must hold LoRA pairs; {f} has none."),
    "key with adapter name": (put(f"{KEY}A.default.weight", torch.ones(3, SIZE)), "lora_A.default.weight' is no tensor of a PEFT LoRA file"),
    "key of another library": (put("lora_unet_mid.lora_down.weight", torch.ones(3, SIZE)), "'lora_unet_mid.lora_down.weight' is no tensor of a PEFT LoRA file"),
    "key of AdaLoRA": (put(f"{KEY}E", torch.ones(3, 1)), "lora_E' is no tensor of a PEFT LoRA file"),
    "key of DoRA": (put(f"{KEY}magnitude_vector", torch.ones(SIZE)), "lora_magnitude_vector' is no tensor"),
    "key with controls": (put("head\x1b[2J\n", torch.ones(1)), r"names must be printable, and of 1,000 characters at most; got 'head\x1b[2J\n'."),
    "A alone": (drop(f"{KEY}B.weight"), f"'{LAYER}' has lora_A without lora_B."),
    "B alone": (drop(f"{KEY}A.weight"), f"'{LAYER}' has lora_B without lora_A."),
    "shapes": (put(f"{KEY}A.weight", torch.ones(2, SIZE)), f"'{LAYER}' must have A (3, d_in) and B (d_out, 3), the rank in adapter_config.json; got A (2, 32) and B (32, 3)."),
    "rank of a pattern": (config(rank_pattern={"query": 7}), "must have A (7, d_in) and B (d_out, 7)"),
    "a vector": (put(f"{KEY}A.weight", torch.ones(3)), f"lora_A of '{LAYER}' must be a matrix of floating-point numbers; got torch.float32 (3,)."),
    "integers": (put(f"{KEY}B.weight", torch.ones(SIZE, 3, dtype=torch.int8)), "got torch.int8 (32, 3)."),
    "nothing in it": (put(f"{KEY}A.weight", torch.ones(3, 0)), "got torch.float32 (3, 0)."),
    "NaN": (put(f"{KEY}A.weight", with_one(float("nan"))), f"lora_A of '{LAYER}' must be finite; 1 of 96 numbers are NaN or infinite. Take an earlier checkpoint."),
    "Inf": (put(f"{KEY}B.weight", torch.full((SIZE, 3), float("inf"))), f"lora_B of '{LAYER}' must be finite; 96 of 96"),
    "overflow": (put(f"{KEY}A.weight", torch.full((3, SIZE), 1e200, dtype=torch.float64)), "must be below 1e+60"),
}  # fmt: skip

MODELS: dict[str, tuple[Callable, str]] = {
    "none named": (config(base_model_name_or_path=None), "names no base model. Say which one with `base`."),
    "no name": (config(base_model_name_or_path=["x"]), "`base_model_name_or_path` must be a model folder that exists, or a name on the Hub; got ['x']."),
    "gone": (config(base_model_name_or_path="/no/such/model"), "must be a model folder that exists, or a name on the Hub; got '/no/such/model', which is neither. Say where it is with `base`."),
    "gone, relative": (config(base_model_name_or_path="./my/model"), "got './my/model', which is neither"),
    "too long": (config(base_model_name_or_path="m" * 5000), "which is neither"),
    "controls": (config(base_model_name_or_path="a\x1b[2J\n\0"), r"got 'a\x1b[2J\n\x00', which is neither"),
    "climbs": (config(base_model_name_or_path="../.."), "got '../..', which climbs out of the folder it was written in."),
    "climbs within": (config(base_model_name_or_path="x/..\\../etc"), "which climbs out of the folder"),
    "not on this disk": (config(base_model_name_or_path="nobody/nothing"), "base model `nobody/nothing` cannot be loaded: "),
    "no target": (config(target_modules=["nothing"]), "does not fit BertModel: Target modules {{'nothing'}} not found"),
    "layers again": (config(layer_replication=[[0, 10**9]]), "`layer_replication` must be ranges of layers, 1,000 in all at most; got [[0, 1000000000]]."),
    "layers again, a word": (config(layer_replication=["0"]), "`layer_replication` must be ranges of layers"),
    "target no regex": (config(target_modules="("), "`target_modules` must be names or regular expressions; got '('."),
    "target that repeats": (config(target_modules="a{99999999999999999999}"), "`target_modules` must be names or regular expressions"),
    "target too long": (config(target_modules="a" * 100_001), "a pattern of `target_modules` must have at most 100,000 characters; got 100,001: 'aaa"),
    "targets too many": (config(target_modules=["a"] * 100_001), "`target_modules` must have at most 100,000 entries; got 100,001."),
    "tokens too many": (config(trainable_token_indices={"x": [1] * 100_001}), "`trainable_token_indices` must have at most 100,000 entries"),
    "saved too many": (config(modules_to_save=[f"a{i}" for i in range(513)]), "`modules_to_save` must have at most 512 patterns (512, or one for each layer); got 513."),
    **{
        f"{name} for ever": (config(**{key: [SLOW] if several else SLOW}), f"`{key}` has a pattern that takes more than 0.5 s to match: '{SLOW}'. Write the names")
        for name, key, several in (("target", "target_modules", False), ("exclude", "exclude_modules", False), ("save", "modules_to_save", True), ("layers", "layers_pattern", True), ("layer", "layers_pattern", False))
    },
    "target a number": (config(target_modules=3), "does not fit BertModel: "),
    "task unknown": (config(task_type="COOKING"), "does not fit BertModel: Invalid task type: 'COOKING'"),
    "tensor too many": (put("base_model.model.head.weight", torch.ones(2)), "does not fit BertModel: `base_model.model.head.weight` is only in the adapter."),
}  # fmt: skip

CHECKED: dict[str, tuple[Callable, str]] = {
    "no probes": (remove(PROBES), "verify: `path` must hold geolora/probes.safetensors; {f} does not."),
    "probes empty": (cut(PROBES, 0), "probes.safetensors cannot be read"),
    "probes without y": (drop(f"{LAYER}.y", PROBES), f"layer '{LAYER}' must have x (d_in, n) and y (d_out, n)."),
    "probes of another size": (put(f"{LAYER}.x", torch.ones(9, 4), PROBES), f"the probes of '{LAYER}' must be for 32 inputs and 32 outputs; got 9 and 32."),
    "probes of NaN": (put(f"{LAYER}.y", torch.full((SIZE, 4), float("nan")), PROBES), f"layer `{LAYER}` must compute what was trained; relative error nan"),
    "probes climb": (tensors(lambda t: t.update({"../../x.x": torch.ones(9, 4), "../../x.y": torch.ones(9, 4)}), PROBES), "../../x is only in the probes"),
}  # fmt: skip

WRITTEN: dict[str, tuple[Callable, str]] = {
    "another base": (put(f"{KEY}A.weight", torch.ones(3, 20)), "does not fit BertModel: Error(s) in loading state_dict for PeftModel: size mismatch for base_model.model.encoder.layer.0.attention.self.query.lora_A"),
}  # fmt: skip

ROWS = [
    (commands, name, *row)
    for commands, table in (
        (COMMANDS, FOLDERS),
        (COMMANDS[1:], MODELS),
        (("verify",), CHECKED),
        (("export",), WRITTEN),
    )
    for name, row in table.items()
]


@pytest.mark.parametrize("commands, name, spoil, message", ROWS, ids=[row[1] for row in ROWS])
def test_one_clear_line(
    good: Path, tmp_path: Path, call: Callable, monkeypatch: pytest.MonkeyPatch,
    commands: tuple[str, ...], name: str, spoil: Callable, message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("geolora.adapters.patterns.LIMIT", 0.5)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "adapter"
    shutil.copytree(good / "adapter", folder)
    spoil(folder)
    for command in commands:
        code, out, err = call(command, folder, *(["out"] if command == "export" else []))
        assert code == 2, (command, out, err)
        assert out == ""
        assert len(err.strip().splitlines()) == 1, err
        assert err.startswith("geolora: ")
        assert err.strip().isprintable()
        assert message.format(f=folder) in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"], "nothing was made"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "path, message",
    [
        ("gone", "`path` must be a PEFT adapter folder; gone does not exist"),
        ("some/lora", "some/lora does not exist; an adapter of the Hub has to be here first: hf download some/lora --local-dir adapter"),
        ("file", "file is a file. Give the folder that holds adapter_config.json."),
        ("empty", "empty has no adapter_config.json."),
    ],
)  # fmt: skip
def test_no_folder(
    tmp_path: Path, call: Callable, monkeypatch: pytest.MonkeyPatch, command: str, path: str, message: str
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    code, out, err = call(command, path, *(["out"] if command == "export" else []))
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def index(*shards: Any) -> Callable:
    """A base whose weights index names these files."""
    table = {f"w{i}": shard for i, shard in enumerate(shards)}
    return text(json.dumps({"weight_map": table, "metadata": {}}), "model.safetensors.index.json")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (index("a.safetensors", "/etc/hostname"), "`weight_map` must name files of its own folder; got '/etc/hostname'."),
        (index("../elsewhere.safetensors"), "must name files of its own folder; got '../elsewhere.safetensors'."),
        (index("..\\elsewhere.safetensors"), "must name files of its own folder"),
        (index("C:\\elsewhere.safetensors"), "must name files of its own folder"),
        (index(3), "must name files of its own folder; got 3."),
        (text("[]", "model.safetensors.index.json"), "must hold a JSON object; got a list."),
        (text("{}", CONFIG), "it holds adapter_config.json, so it is an adapter itself."),
        (text("", "config.json"), "cannot be loaded"),
        (text("[]", "config.json"), "cannot be loaded"),
        (text('{"architectures": [5], "model_type": "bert"}', "config.json"), "cannot be loaded"),
        (remove("config.json"), "cannot be loaded"),
        (cut("model.safetensors", 0), "cannot be loaded"),
        (cut("model.safetensors", 999), "cannot be loaded"),
        (remove("model.safetensors"), "cannot be loaded"),
    ],
)  # fmt: skip
def test_base_folders(
    good: Path, tmp_path: Path, call: Callable, spoil: Callable, message: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(good / "base", base)
    spoil(base)
    for command, *rest in (("verify",), ("export", tmp_path / "out")):
        code, out, err = call(command, good / "adapter", *rest, "--base", base)
        assert (code, out) == (2, ""), err
        assert message in err, err
        assert len(err.strip().splitlines()) == 1, err


def test_nothing_in_a_folder_is_run(
    good: Path, tmp_path: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code of a base, a module named by an adapter, a pickle: all stay closed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    planted = "open('opened', 'w').close()\nclass Planted: pass\n"
    (tmp_path / "planted_module.py").write_text(planted)
    shutil.copytree(good / "adapter", "adapter")
    mapping = {"base_model_class": "Planted", "parent_library": "planted_module"}
    config(auto_mapping=mapping, megatron_core="planted_module")(Path("adapter"))
    (Path("adapter") / "adapter_model.bin").write_bytes(PICKLE)
    assert call("inspect", "adapter")[0] == 0
    assert call("verify", "adapter")[0] == 0
    assert call("export", "adapter", "again")[0] == 0
    assert "planted_module" not in sys.modules

    shutil.copytree(good / "base", "base")
    (Path("base") / "modeling.py").write_text(planted)
    found = json.loads((Path("base") / "config.json").read_text())
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel"), "modeling.Planted")
    found |= {"auto_map": auto_map, "model_type": "planted"}
    (Path("base") / "config.json").write_text(json.dumps(found))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked"))
    code, _, err = call("verify", "adapter", "--base", "base")
    assert code == 2
    assert "cannot be loaded" in err
    assert not Path("opened").exists()


def test_a_base_that_climbs_may_be_said_by_hand(
    good: Path, tmp_path: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = os.path.relpath(good / "base", tmp_path)
    assert base.startswith("..")
    code, _, err = call("verify", good / "adapter", "--base", base)
    assert code == 0, err
    code, _, err = call("verify", good / "adapter", "--base", "../gone")
    assert code == 2
    assert "`base` must be a model folder that exists" in err


def test_links_are_followed_as_in_the_cache_of_the_hub(
    good: Path, tmp_path: Path, call: Callable
) -> None:
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).symlink_to(good / "adapter" / name)
    code, out, err = call("inspect", tmp_path)
    assert code == 0, err
    assert out == call("inspect", good / "adapter")[1]


@pytest.mark.filterwarnings("always::geolora.errors.GeoloraWarning")
def test_keys_of_a_newer_peft_are_left_out_with_one_line(
    good: Path, tmp_path: Path, call: Callable
) -> None:
    shutil.copytree(good / "adapter", tmp_path / "adapter")
    config(use_newest={"a": 1}, use_other=True, use_off=False)(tmp_path / "adapter")
    for command in ("inspect", "verify"):
        code, _, err = call(command, tmp_path / "adapter")
        assert code == 0
        line = r"geolora: .*adapter_config.json: peft \S+ does not know `use_newest`, `use_other` and leaves them out.*\n"
        assert re.fullmatch(line, err), err


@pytest.mark.filterwarnings("always::geolora.errors.GeoloraWarning")
def test_embeddings_are_left_out_with_one_line(good: Path, tmp_path: Path, call: Callable) -> None:
    shutil.copytree(good / "adapter", tmp_path / "adapter")
    name = "base_model.model.embeddings.word_embeddings.lora_embedding_"
    put(f"{name}A", torch.ones(3, 21))(tmp_path / "adapter")
    put(f"{name}B", torch.ones(SIZE, 3))(tmp_path / "adapter")
    code, out, err = call("inspect", tmp_path / "adapter")
    assert code == 0
    assert "LoRA on embeddings (embeddings.word_embeddings) is left out" in err
    assert "word_embeddings" not in out
