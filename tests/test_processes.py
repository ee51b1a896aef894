"""Two processes (gloo, CPU) against one that has all rows: DDP, FSDP2, what is not finite, and `geolora train`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import geolora
from geolora.errors import SettingError
from geolora.settings.train_config import TrainConfig
from geolora.training.check import check
from models import Net, backward, batch, lora_net, products, tiny_bert
from optimizers import CASES, OURS, made
from rows import reviews

STEPS = 100
CYCLE = {"prune_every": 12, "budget": 120}
"""Ranks grow and are judged eight times."""
SETTINGS = {
    "adaptive": ({"lr": 0.005, **CYCLE}, 1e-6),
    "momentum": ({"lr": 0.5, "moments": "momentum", **CYCLE}, 1e-9),
}
"""With a bound on how far rounding carries in STEPS: the mean of two halves, in one process, is 1.4e-8
and 2e-14 from the mean of all (an adaptive step moves small directions as far as large ones)."""

CHILD = """
import sys
sys.path[:0] = {path!r}
import warnings
import torch
from torch import distributed, nn
import geolora
from geolora.errors import SettingError
from geolora.settings.train_config import TrainConfig
from geolora.training.check import check
from models import Net, batch, lora_net, products
rank, how = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method="file://{file}", rank=rank, world_size=2)
torch.manual_seed(rank)  # other numbers in every process, until the model is wrapped
model = lora_net()
if how == "fsdp2":
    from torch.distributed.fsdp import fully_shard
    torch.manual_seed(0)
    model = lora_net()
    for layer in ("first", "second", "down", "head"):
        fully_shard(model.base_model.model.get_submodule(layer))
    fully_shard(model)
    optimizer, run = geolora.GeoLoRA(model, **{settings!r}), model
else:
    if rank == 0:
        torch.manual_seed(0)
        model = lora_net()
    optimizer = geolora.GeoLoRA(model, **{settings!r})
    run = nn.parallel.DistributedDataParallel(model)
x, labels = batch()
mine = slice(0, 12) if rank == 0 else slice(12, 24)
said = []
warnings.showwarning = lambda message, *_, **__: said.append(str(message))
warnings.simplefilter("always")
for step in range({steps}):
    model.zero_grad()
    nn.functional.cross_entropy(run(x[mine]), labels[mine]).backward()
    optimizer.step()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


found = {{name: whole(p.detach()).clone() for name, p in model.named_parameters() if p.requires_grad}}
before = {{name: p.clone() for name, p in found.items()}}
model.zero_grad()
bad = x[mine].clone()
if rank == 1:
    bad[0, 0] = float("nan")
nn.functional.cross_entropy(run(bad), labels[mine]).backward()
optimizer.step()
after = {{name: whole(p.detach()) for name, p in model.named_parameters() if p.requires_grad}}
untouched = all(torch.equal(before[name], after[name]) for name in before)
torch.save((found, optimizer.settled_ranks(), untouched, said), sys.argv[3])
distributed.destroy_process_group()
"""


SHARDED = """
import sys
sys.path[:0] = {path!r}
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
import geolora
from models import batch, lora_net
rank, folder = int(sys.argv[1]), "{folder}"
torch.distributed.init_process_group("gloo", init_method="file://" + folder + "/meet", rank=rank, world_size=2)
plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
accelerator.state.fsdp_plugin = plugin
x, labels = batch()
mine = slice(0, 12) if rank == 0 else slice(12, 24)


def prepared(seed):
    torch.manual_seed(seed)
    model = lora_net()
    optimizer = geolora.GeoLoRA(model, **{settings!r})  # before sharding, which swaps the parameters
    # accelerate takes FSDP on accelerators only, and looks again whenever it is asked
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator.prepare(model, optimizer)


def trained(model, optimizer, steps):
    for _ in range(steps):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[mine]), labels[mine]).backward()
        optimizer.step()


def parameters(model):
    return {{n: p.full_tensor() for n, p in model.named_parameters() if p.requires_grad}}


def states(model, optimizer):
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer.optimizer)))


model, optimizer = prepared(0)
trained(model, optimizer, 30)
dcp.save(states(model, optimizer), checkpoint_id=folder + "/checkpoint")
torch.save((model.state_dict(), optimizer.optimizer.state_dict()), folder + f"/state-{{rank}}.pt")
exported = geolora.export(model, folder + "/adapter")
trained(model, optimizer, 20)
found = parameters(model)

again, other = prepared(5)
loaded = states(again, other)
dcp.load(loaded, checkpoint_id=folder + "/checkpoint")
set_state_dict(again, other.optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
trained(again, other, 20)
by_checkpoint = parameters(again)

again, other = prepared(6)
of_model, of_optimizer = torch.load(folder + f"/state-{{rank}}.pt")
again.load_state_dict(of_model)
other.optimizer.load_state_dict(of_optimizer)
trained(again, other, 20)
by_file = parameters(again)

cut = geolora.prune(again, tail=0.0, budget=80)
torch.save((found, by_checkpoint, by_file, exported.ranks, cut, geolora.ranks(again)), sys.argv[3])
torch.distributed.destroy_process_group()
"""


EVERY = """
import sys
sys.path[:0] = {path!r}
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from models import batch, lora_net
from optimizers import CASES, OURS, made
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method="file://{file}", rank=rank, world_size=2)
x, labels = batch()
mine = slice(0, 12) if rank == 0 else slice(12, 24)
results = {{}}
for key in OURS:
    torch.manual_seed(0)
    model = lora_net(r=3)
    made(CASES[key], model)  # starts the pairs of those that need it
    for layer in ("first", "second", "down", "head"):
        fully_shard(model.base_model.model.get_submodule(layer))
    fully_shard(model)
    optimizer = made(CASES[key], model)
    for step in range(6):
        if step == 4:  # through a state of its own
            other = made(CASES[key], model)
            other.load_state_dict(optimizer.state_dict())
            optimizer = other
        model.zero_grad()
        nn.functional.cross_entropy(model(x[mine]), labels[mine]).backward()
        optimizer.step()
    named = ((n, p.detach()) for n, p in model.named_parameters() if p.requires_grad)
    results[key] = {{n: p.full_tensor().clone() for n, p in named}}
torch.save(results, sys.argv[3])
distributed.destroy_process_group()
"""


SEARCH = """
import sys
sys.path[:0] = {path!r}
import torch
from torch import distributed, nn
import geolora
from models import batch, lora_net
rank, how = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method="file://{file}", rank=rank, world_size=2)
torch.manual_seed(0)
model = lora_net()
if how == "fsdp2":
    from torch.distributed.fsdp import fully_shard
    for layer in ("first", "second", "down", "head"):
        fully_shard(model.base_model.model.get_submodule(layer))
    fully_shard(model)
x, labels = batch()
mine = slice(0, 12) if rank == 0 else slice(12, 24)
loss_fn = lambda model, rows: nn.functional.cross_entropy(model(rows[0]), rows[1])
found = geolora.find_lr(model, [(x[mine], labels[mine])], loss_fn=loss_fn, probes=6)
ours = [(x[mine], labels[mine])] * (4 if rank else 6)
fewer = geolora.find_lr(model, iter(ours), loss_fn=loss_fn, probes=6)
def fails(model, rows):
    if rank:
        raise ValueError("only here")
    return loss_fn(model, rows)
said = ""
try:
    if how == "ddp":  # what FSDP2's own forward pass waits for, nobody can help
        geolora.find_lr(model, ours, loss_fn=fails)
except Exception as error:
    said = type(error).__name__ + ": " + str(error)
torch.save(([tuple(probe) for probe in found.curve], len(fewer.curve), said), sys.argv[3])
distributed.destroy_process_group()
"""


def in_two(code: str, how: str, folder: Path) -> list[Any]:
    """What two processes that run the code save."""
    files = [folder / f"{rank}.pt" for rank in range(2)]
    told = {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), how, str(file)],
            env={**os.environ, **told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank, file in enumerate(files)
    ]
    try:
        for run in runs:
            _, errors = run.communicate(timeout=240)
            assert run.returncode == 0, errors.decode()[-3000:]
    finally:
        for run in runs:
            run.kill()
            run.communicate()
    return [torch.load(file) for file in files]


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(moments, marks=pytest.mark.guard) if moments == "adaptive" else moments
        for moments in SETTINGS
    ],
)
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_trains_on_all_rows(
    how: str, moments: str, tmp_path: Path
) -> None:
    settings, bound = SETTINGS[moments]
    code = CHILD.format(
        path=[str(Path(__file__).parent)], file=tmp_path / "meet", settings=settings, steps=STEPS
    )
    (left, ranks, untouched, said), (right, other, *_rest) = in_two(code, how, tmp_path)
    assert ranks == other
    assert all(torch.equal(left[name], right[name]) for name in left), (
        "the same in both, bit for bit"
    )

    torch.manual_seed(0)
    model = lora_net()
    optimizer = geolora.GeoLoRA(model, **settings)
    for _ in range(STEPS):
        backward(model)
        optimizer.step()
    assert optimizer.settled_ranks() == ranks
    theirs = lora_net()
    parameters = dict(theirs.named_parameters())
    for name, value in left.items():
        parameters[name].data.copy_(value)
    for name, W in products(model).items():
        gap = torch.linalg.matrix_norm(W - products(theirs)[name]) / torch.linalg.matrix_norm(W)
        assert gap < bound, name

    assert untouched, "a step with what is no number in one process moves nothing in any"
    assert len([line for line in said if "skipped, gradients not finite" in line]) == 1


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp2", marks=pytest.mark.guard)])
def test_two_processes_find_the_step_size_of_one_on_all_rows(how: str, tmp_path: Path) -> None:
    code = SEARCH.format(path=[str(Path(__file__).parent)], file=tmp_path / "meet")
    (left, few, there), (right, fewer, here) = in_two(code, how, tmp_path)
    assert left == right, "the same in both, bit for bit"
    assert few == fewer == 4, "no process waits for another that has no more batches"
    if how == "ddp":
        assert here == "ValueError: only here"
        assert there.startswith("GradientError: find_lr: another process failed")
    torch.manual_seed(0)
    model = lora_net()

    def loss_fn(model: Any, rows: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(rows[0]), rows[1])

    found = geolora.find_lr(model, [batch()], loss_fn=loss_fn, probes=6)
    for theirs, ours in zip(left, found.curve, strict=True):
        assert theirs == pytest.approx(tuple(ours), rel=1e-5)


def test_every_optimizer_over_sharded_factors_is_that_of_one_process(tmp_path: Path) -> None:
    code = EVERY.format(path=[str(Path(__file__).parent)], file=tmp_path / "meet")
    left, right = in_two(code, "", tmp_path)
    for key in OURS:
        torch.manual_seed(0)
        model = lora_net(r=3)
        optimizer = made(CASES[key], model)
        for _ in range(6):
            backward(model)
            optimizer.step()
        theirs = lora_net(r=3)
        parameters = dict(theirs.named_parameters())
        for name, value in left[key].items():
            assert torch.equal(value, right[key][name]), (key, name)
            parameters[name].data.copy_(value)
        for name, W in products(model).items():
            gap = torch.linalg.matrix_norm(W - products(theirs)[name])
            assert gap < 1e-8 * torch.linalg.matrix_norm(W), (key, name)


@pytest.mark.guard
def test_what_accelerate_shards_trains_goes_on_and_is_exported(tmp_path: Path) -> None:
    settings, bound = SETTINGS["adaptive"]
    path = [str(Path(__file__).parent)]
    code = SHARDED.format(path=path, folder=tmp_path, settings=settings)
    (found, by_checkpoint, by_file, ranks, cut, left), other = in_two(code, "", tmp_path)
    for name, value in found.items():
        assert torch.equal(value, other[0][name])
        assert torch.equal(value, by_checkpoint[name])
        assert torch.equal(value, by_file[name])

    torch.manual_seed(0)
    model = lora_net()
    optimizer = geolora.GeoLoRA(model, **settings)
    for step in range(50):
        if step == 30:
            assert geolora.ranks(model) == ranks
            errors = geolora.verify(tmp_path / "adapter", Net().double())
            assert set(errors) == set(ranks)
        backward(model)
        optimizer.step()
    theirs = lora_net()
    for name, parameter in theirs.named_parameters():
        parameter.data.copy_(found.get(name, parameter))
    for name, W in products(model).items():
        assert torch.linalg.matrix_norm(
            W - products(theirs)[name]
        ) < bound * torch.linalg.matrix_norm(W)
    assert cut == left == geolora.prune(theirs, tail=0.0, budget=80) != optimizer.settled_ranks()


@pytest.mark.guard
def test_train_in_two_processes_is_that_in_one_and_goes_on_exactly(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BigBirdConfig, BigBirdModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert(tmp_path / "model"))
    config = BigBirdConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64, sep_token_id=tokenizer.sep_token_id,
        attention_type="original_full", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0,
    )  # fmt: skip
    BigBirdModel(config).save_pretrained(tmp_path / "model")
    for name, rows in (("train", reviews(120)), ("dev", reviews(41, seed=1))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    def started(output: str, processes: int, *more: str) -> subprocess.Popen:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(processes), "-m", "geolora.cli", "train", "--model", "model",
            "--train", "train.jsonl", "--eval", "dev.jsonl", "--rank", "4", "--lr", "0.01",
            "--max-steps", "40", "--batch-size", "16", "--save-every", "4", "--output", output, *more,
        ]  # fmt: skip
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=env, **pipes)

    def ended(run: subprocess.Popen, code: int = 0) -> str:
        out, errors = run.communicate(timeout=240)
        assert (run.returncode == 0) == (code == 0), errors[-3000:]
        return out + errors

    def read(output: str, name: str) -> Any:
        return json.loads((tmp_path / output / name).read_text())

    def adapter(output: str) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / output / "adapter" / "adapter_model.safetensors")

    assert ended(started("two", 2)).count("written:") == 1
    ended(started("one", 1, "--gradient-accumulation", "2"))
    ranks = read("two", "report.json")["ranks"]
    assert {layer for layer, rank in ranks.items() if not rank} == {"bert.pooler"}, (
        "nobody reads it"
    )
    histories = [read(name, "history.json")[:5] for name in ("two", "one")]
    for left, right in zip(*histories, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-3)

    run = started("stopped", 2)
    sealed = tmp_path / "stopped" / "checkpoints" / "checkpoint-4" / "geolora.json"
    while not sealed.exists() and run.poll() is None:
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    assert "geolora: stopped after step" in ended(run, 1)
    assert not (tmp_path / "stopped" / "report.json").exists()
    ended(started("stopped", 2))
    assert read("stopped", "report.json")["ranks"] == read("two", "report.json")["ranks"]
    ours, theirs = adapter("stopped"), adapter("two")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_rows_that_cannot_be_shared_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = TrainConfig(model="m", train="t", eval="e", batch_size=6, gradient_accumulation=2)
    with pytest.raises(SettingError, match="`--batch-size` must be a multiple of 4 .*; got 6"):
        check(config)
