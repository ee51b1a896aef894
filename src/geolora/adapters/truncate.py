"""Cuts a LoRA adapter to a budget by PEFT's own conversion, to compare trained ranks with."""

import warnings
from typing import Any

from geolora.pairs.find import check_budget, find_pairs
from geolora.pairs.point import read_pair

TRUNCATED = "truncated"
"""Name of the adapter that is left."""


def truncate(model: Any, budget: int) -> None:
    """Cut a LoRA adapter to at most `budget` parameters by PEFT's `convert_to_lora`.

    Its rule is an energy threshold: every layer keeps the leading singular values that hold this
    share of its energy. The threshold is the largest one within the budget.

    Raises:
        BudgetError: a budget below one direction in every layer.
    """
    from peft import set_peft_model_state_dict
    from peft.tuners.lora.conversion import convert_to_lora

    pairs = find_pairs(model)
    energies, costs = [], [pair.cost for pair in pairs]
    check_budget(costs, budget, "`--budget`", advice="")
    for pair in pairs:
        squares = read_pair(pair.A.flatten(1), pair.B.flatten(1), pair.scale).sigma ** 2
        energies.append((squares.cumsum(0) / squares.sum().clamp(min=1e-300)).tolist())

    def needed(threshold: float) -> int:
        ranks = (1 + sum(share < threshold for share in row) for row in energies)
        return sum(
            min(rank, len(row)) * cost
            for rank, row, cost in zip(ranks, energies, costs, strict=True)
        )

    shares = sorted({share for row in energies for share in row})
    fitting = [share for share in shares if needed(share) <= budget]
    # just below a share, where rounding cannot tip it into the next rank
    threshold = float(min(1.0, fitting[-1] * (1 - 1e-6))) if fitting else 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the model is LoRA already: so it is meant
        lora, tensors = convert_to_lora(model, rank=threshold)
    model.add_adapter(TRUNCATED, lora)
    set_peft_model_state_dict(model, tensors, adapter_name=TRUNCATED)
    model.set_adapter(TRUNCATED)
