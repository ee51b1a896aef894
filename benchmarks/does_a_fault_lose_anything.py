"""Does a kill or a full disk at any moment lose anything, and does the same command go on, bit for bit?

    python benchmarks/does_a_fault_lose_anything.py

`train`, `compare`, `export`, `plot`, `inspect --figures`, and `geolora.prune` with `export`, over new folders and
over old ones, on tiny models. Every folder holds files of a user. A library that is loaded before all
others (tests/faults.c) counts the calls that change the folders, whatever language makes them, and at a
random one kills the process, or has the disk full from there on; or sends SIGINT or SIGTERM; or halts
the process until a second one has run the same command. What must hold is in tests/fault_cases.py.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from record import write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fault_cases import CASES, FULL, KILLS, SECOND, SIGNALS, Lab

KINDS = {"kills": KILLS, "full disks": FULL, "signals": SIGNALS, "second processes": SECOND}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--each", type=int, default=5, help="faults of a kind per command")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder) / "lab")
        for number, (kind, modes) in enumerate(KINDS.items(), 10 * arguments.seed):
            rows = []
            for seed, name in enumerate(CASES, 100 * number):
                for row in lab.trials(name, modes, arguments.each, seed):
                    print(row, flush=True)
                    rows.append(row)
            held = sum(not row["wrong"] for row in rows)
            by_command = Counter(row["command"] for row in rows if row["wrong"])
            results[kind] = {"held": held, "of": len(rows), "wrong": by_command, "faults": rows}
        lab.close()
    for kind, found in results.items():
        print(f"{kind}: {found['held']} of {found['of']} held")
    write("does_a_fault_lose_anything", results)


if __name__ == "__main__":
    main()
