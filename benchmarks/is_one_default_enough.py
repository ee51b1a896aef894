"""Is GeoLoRA at one default better than LoRA with its step size chosen per task? Mean of five tasks.

    python benchmarks/is_one_default_enough.py five_tasks.yaml adalora

Makes no runs: `geolora compare five_tasks.yaml` does, in the same folder. It joins what lies in its output,
also runs that go beyond its grid (more step sizes, more seeds at the one that was chosen), into one table and
figures. A further table has the differences to each method that is named, over the seeds that both have.
"""

import json
import re
import sys

from geolora.comparing.plan import Cell, read_plan
from geolora.comparing.summary import summarise
from geolora.files.writing import write_json
from geolora.report.comparison import figures, table
from geolora.training.run import load

NAME = re.compile(r"([^/]+)/([^/]+)/lr-([^/]+)/seed-(\d+)\.json$")


def main() -> None:
    plan = read_plan(sys.argv[1])
    configs = {cell.task: cell.config for cell in plan.cells}
    labels = {task: load(config).held_out.labels for task, config in configs.items()}
    methods = list(dict.fromkeys(cell.method for cell in plan.cells))
    seeds, results = {cell.seed for cell in plan.cells}, []
    for path in sorted((plan.output / "runs").rglob("seed-*.json")):
        found = NAME.search(path.as_posix())
        if not found or found[1] not in configs or found[2] not in methods:
            continue
        lr = None if found[3] == "default" else float(found[3])
        cell = Cell(found[1], found[2], lr, int(found[4]), configs[found[1]])
        run = json.loads(path.read_text(encoding="utf-8"))
        run.setdefault("targets", labels[cell.task])  # runs of before they were kept
        if cell.seed not in seeds:  # made at the step size that had been chosen: no say in it
            run["choice"] = None
        results.append((cell, run))
    tasks = list(configs)
    results.sort(key=lambda pair: (tasks.index(pair[0].task), methods.index(pair[0].method)))
    summary = summarise(results, plan.against)
    write_json(plan.output / "comparison.json", summary)
    text = table(summary)
    (plan.output / "table.txt").write_text(text + "\n", encoding="utf-8")
    figures(plan.output)
    print(text)
    for method in sys.argv[2:]:
        text = table(summarise(results, method))
        (plan.output / f"against_{method}.txt").write_text(text + "\n", encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
