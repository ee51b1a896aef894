"""What report.json and comparison.json must hold to be drawn."""

from typing import Any

NUMBER = (int, float)
SOME = (int, float, type(None))
EACH = "*"
"""A key of a shape that stands for every key."""
LARGEST = 2**63
"""Size of a whole number; float64, in which figures are drawn, would hold larger ones."""
LONGEST_NAME, LONGEST = 1_000, 100_000
"""Characters of a key, and of any other text."""

RUN = {
    "method": str, "task": str, "metric": str, "value": NUMBER, "train_loss": NUMBER,
    "steps": int, "seconds": NUMBER, "seconds_per_step": NUMBER, "trainable_parameters": int,
    "adapter_parameters": int, "exported_parameters": int, "ranks": {EACH: int},
    "peak_memory_bytes": NUMBER, "seed": int, "versions": {EACH: str}, "command": str,
}  # fmt: skip
SEARCH = {
    "lr": NUMBER,
    "bounds": {"trust": NUMBER, "length": NUMBER},
    "curve": [{"lr": NUMBER, "trust": SOME, "length": SOME}],
}
HISTORY = [{"step": int, "loss": NUMBER}]

SCORE = {
    "task": str,
    "method": str,
    "lr": SOME,
    "seeds": int,
    "diverged": int,
    "value": SOME,
    "spread": SOME,
}
GAP = {"mean": NUMBER, "low": NUMBER, "high": NUMBER}
COSTS = {
    "adapter_parameters": int, "exported_parameters": int, "seconds_per_step": NUMBER,
    "peak_memory_bytes": NUMBER,
}  # fmt: skip
COMPARISON = {
    "against": str,
    "metrics": {EACH: str},
    "rows": [SCORE],
    "learning_rates": [SCORE],
    "curves": [
        {"task": str, "method": str, "steps": [int], "losses": [NUMBER], "regularised": bool}
    ],
    "maps": [{"task": str, "method": str, "ranks": {EACH: int}}],
}
LATER = {
    "choose_on": SOME,
    "seeds": [int],
    "lower_is_better": [str],
    "means": [{"method": str, "value": NUMBER, "adapter_parameters": int, "exported_parameters": int}],
    "budgets": [
        {
            "task": str, "method": str, "budgets": [int], "lrs": [NUMBER],
            "fields": [{"budget": int, "lr": NUMBER, "seeds": int, "diverged": int, "value": SOME}],
        }
    ],
    "failures": [{"task": str, "method": str, "lr": SOME, "seed": int, "text": str}],
    "settings": [{"task": (str, type(None)), "method": (str, type(None)), "values": {}}],
    "versions": {EACH: [str]},
}  # fmt: skip
"""What a comparison.json of an older version may lack."""


def wrong_run(report: Any) -> str | None:
    """The first thing that is wrong with a report.json, or None."""
    later = {"lr": NUMBER} if "lr" in report else {}  # one of an older version has none
    return _wrong(report, RUN | later, "") or (None if report["ranks"] else "`ranks` is empty")


def wrong_history(history: Any) -> str | None:
    """The first thing that is wrong with a history.json, or None."""
    return _wrong(history, HISTORY, "")


def wrong_search(search: Any) -> str | None:
    """The first thing that is wrong with a step_size.json, or None."""
    return _wrong(search, SEARCH, "")


def wrong_comparison(summary: Any) -> str | None:
    """The first thing that is wrong with a comparison.json, or None."""
    fault = _wrong(summary, COMPARISON, "")
    if not fault:
        present = {key: shape for key, shape in LATER.items() if key in summary}
        fault = _wrong(summary, present, "")
    if fault:
        return fault
    rows = enumerate(summary["rows"])
    return _first(
        None if summary["rows"] else "`rows` is empty",
        *(_wrong(row, COSTS, f"rows[{i}]") for i, row in rows if row["value"] is not None),
        *(
            _wrong(row["difference"], GAP, f"{key}[{i}].difference")
            for key in ("rows", "means")
            for i, row in enumerate(summary.get(key, ()))
            if row.get("difference") is not None
        ),
        *(
            f"`curves[{i}]` has another number of steps than of losses"
            for i, curve in enumerate(summary["curves"])
            if len(curve["steps"]) != len(curve["losses"])
        ),
        *(
            f"`maps[{i}].ranks` is empty"
            for i, entry in enumerate(summary["maps"])
            if not entry["ranks"]
        ),
        *(
            f"`budgets[{i}]` is empty"
            for i, entry in enumerate(summary.get("budgets", ()))
            if not (entry["budgets"] and entry["lrs"])
        ),
    )


def _wrong(value: Any, shape: Any, path: str) -> str | None:
    """Where a value differs first from a shape: a type or several, {key: shape} or [shape]."""
    if not _fits(value, type(shape) if isinstance(shape, dict | list) else shape):
        return f"`{path}` is of another type" if path else "it is of another type"
    if _is_too_large(value):
        return f"`{path}` is too large"
    if isinstance(shape, list):
        return _first(*(_wrong(v, shape[0], f"{path}[{i}]") for i, v in enumerate(value)))
    if isinstance(shape, dict):
        start = f"{path}." if path else ""
        if any(len(key) > LONGEST_NAME for key in value):
            return f"a name in `{path}` has more than {LONGEST_NAME:,} characters"
        if EACH in shape:
            return _first(*(_wrong(v, shape[EACH], f"{start}{k}") for k, v in value.items()))
        missing = (f"`{start}{key}` is missing" for key in shape if key not in value)
        return _first(*missing) or _first(
            *(_wrong(value[k], inner, f"{start}{k}") for k, inner in shape.items())
        )
    return None


def _fits(value: Any, kind: Any) -> bool:
    """isinstance, where True is no number."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _is_too_large(value: Any) -> bool:
    """Whether no figure or table could show a number or text."""
    if isinstance(value, str):
        return len(value) > LONGEST
    return isinstance(value, int) and abs(value) >= LARGEST


def _first(*faults: str | None) -> str | None:
    return next((fault for fault in faults if fault), None)
