"""Does the paper's mode, which judges ranks at every step, find the rank of a matrix from a start of 2?

    python benchmarks/does_judging_at_every_step_find_the_rank.py

½||W - W*||², W* (100, 100) of rank 5 with singular values 1, 1/2, …, 1/5, through a PEFT layer in float64: five
seeds of W* and of the start, steps 0.1, 0.5 and 1, 600 steps, tail 1e-3; beside it a cycle of 25 steps, and ranks judged once.
A run has found it at a relative error of 1e-6 and rank 5.
"""

import does_it_find_the_rank as regression
from record import write

import geolora

NAME = "does_judging_at_every_step_find_the_rank"
SCHEDULES = {"every step": {"prune_every": 1}, "cycle of 25": {"prune_every": 25}, "once": {}}
SEEDS, LRS = range(5), (0.1, 0.5, 1.0)


def one(schedule: dict, seed: int, lr: float) -> dict:
    """Error and rank at the end."""
    wanted = regression.target(100, seed=seed)
    layer = regression.Layer(100, regression.R, seed=seed)
    optimizer = geolora.GeoLoRA(
        layer.model, lr=lr, moments="none", start_rank=2, tail=1e-3, **schedule
    )
    for _ in regression.train(layer, optimizer, lambda W: 0.5 * (W - wanted).square().sum()):
        pass
    error = regression.relative(layer.W, wanted)
    return {"seed": seed, "lr": lr, "error": error, "rank": optimizer.settled_ranks()["0"]}


def main() -> None:
    results = {}
    for name, schedule in SCHEDULES.items():
        runs = [one(schedule, seed, lr) for seed in SEEDS for lr in LRS]
        found = sum(run["error"] <= 1e-6 and run["rank"] == 5 for run in runs)
        results[name] = {"found": found, "of": len(runs), "runs": runs}
        print(f"{name}: {found} of {len(runs)}, worst {max(run['error'] for run in runs):.1e}")
    write(NAME, results)


if __name__ == "__main__":
    main()
