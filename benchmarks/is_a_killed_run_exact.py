"""Is a run that was killed and started again the same, bit for bit, as one that never was?

    python benchmarks/is_a_killed_run_exact.py

all-MiniLM-L6-v2 with GeoLoRA's defaults, dropout on, 52 steps over 200 docstrings (two passes), a
checkpoint every 4 steps. The process gets SIGKILL at a random step, a random moment after its
optimizer step: before, amid or after the writing of a checkpoint (every second kill is aimed at a
step that writes one). The same settings are then run again. Compared: every tensor of the adapter,
the whole optimizer state (U, sigma, V, momentum, AdamW's), ranks and cycle, scheduler, random number
states, and the loss of every step (so the order of the data).
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from record import write
from safetensors.torch import load_file

from geolora.cli.demo import model_folder
from geolora.cli.demo_texts import docstring_themes
from geolora.optim import geolora as optim
from geolora.settings.train_config import TrainConfig
from geolora.tasks.task import Data
from geolora.tasks.text_classification import labelled_texts
from geolora.training import run as task

STEPS, EVERY = 52, 4


def config(output: Path) -> TrainConfig:
    return TrainConfig(
        model=str(model_folder()),
        max_steps=STEPS,
        batch_size=8,
        max_length=32,
        save_every=EVERY,
        output=str(output),
    )


def data() -> Data:
    train, held_out = docstring_themes(seed=0)
    train, held_out = train[:200], held_out[:20]
    return labelled_texts(train, held_out)


def in_child(output: Path, rows: Data, kill: tuple[int, float] | None) -> int:
    """Run in a fork; SIGKILL `kill[1]` seconds after optimizer step number `kill[0]`."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    done, step = [0], optim.GeoLoRA.step

    def counted(self: optim.GeoLoRA, closure: None = None) -> None:
        step(self, closure)
        done[0] += 1
        if kill and done[0] == kill[0]:

            def shoot() -> None:
                time.sleep(kill[1])
                os.kill(os.getpid(), signal.SIGKILL)

            threading.Thread(target=shoot).start()

    optim.GeoLoRA.step = counted  # type: ignore[method-assign]
    task.remove_leftovers = lambda _: None  # type: ignore[assignment]
    try:
        task.train(config(output), rows)
    except BaseException as error:  # noqa: BLE001
        print(f"{type(error).__name__}: {error}", file=sys.stdout, flush=True)
        os._exit(1)
    os._exit(0)


def state_of(output: Path) -> dict[str, Any]:
    """All that must be the same, by name."""
    last = output / "checkpoints" / f"checkpoint-{STEPS}"
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)
    found: dict[str, Any] = {
        f"adapter {k}": v for k, v in load_file(last / "adapter_model.safetensors").items()
    }
    for key, values in optimizer["state"].items():
        found |= {f"state {key} {name}": value for name, value in values.items()}
    for i, group in enumerate(optimizer["param_groups"]):
        found |= {f"group {i} {name}": value for name, value in group.items()}
    found["scheduler"] = torch.load(last / "scheduler.pt", weights_only=True)
    numbers = torch.load(last / "rng_state.pth", weights_only=False)
    found["random python"], found["random torch"] = numbers["python"], numbers["cpu"]
    found["losses"] = json.loads((output / "history.json").read_text())
    return found


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return a == b

    names = sorted(set(ours) | set(theirs))
    return [n for n in names if n not in ours or n not in theirs or not same(ours[n], theirs[n])]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, draw = data(), random.Random(arguments.seed)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        whole, again = Path(folder) / "whole", Path(folder) / "again"
        assert in_child(whole, rows, None) == 0
        wanted = state_of(whole)
        for number in range(arguments.kills):
            step = draw.randrange(1, STEPS + 1)
            if number % 2:
                step = EVERY * draw.randrange(1, STEPS // EVERY + 1)
            moment = draw.uniform(0.0, 0.25)
            shutil.rmtree(again, ignore_errors=True)
            killed = in_child(again, rows, (step, moment))
            left = sorted(int(p.name.split("-")[1]) for p in (again / "checkpoints").glob("*-*"))
            sealed = [
                n for n in left if (again / f"checkpoints/checkpoint-{n}/geolora.json").exists()
            ]
            finished = killed == 0
            code = 0 if finished else in_child(again, rows, None)
            wrong = differences(wanted, state_of(again)) if code == 0 else ["did not finish"]
            results.append(
                {
                    "step": step,
                    "seconds_after": round(moment, 3),
                    "killed_by": os.WTERMSIG(killed) if os.WIFSIGNALED(killed) else None,
                    "torn_checkpoints": [n for n in left if n not in sealed],
                    "went_on_from": max(sealed, default=0),
                    "differences": wrong,
                }
            )
            print(results[-1], flush=True)
    exact = sum(not r["differences"] and r["killed_by"] == signal.SIGKILL for r in results)
    print(f"{exact} of {arguments.kills} bit-identical; compared {len(wanted)} entries")
    write("is_a_killed_run_exact", {"exact": exact, "kills": results, "compared": len(wanted)})


if __name__ == "__main__":
    main()
