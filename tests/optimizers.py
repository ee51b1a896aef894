"""Every optimizer of the table of methods, ready to be built: a new row is enrolled by being there."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from geolora.methods import METHODS, OPTIMIZERS, resolve
from geolora.pairs.find import find_pairs
from geolora.pairs.sharded import gathered
from models import batch

TORCHS = {name for name in OPTIMIZERS if not METHODS[name].mathematics}
"""AdamW of torch and PEFT, which keep their own rules for closures, gradients that are not finite and states."""


class Case(NamedTuple):
    """An optimizer with settings: `make(model, **more)`, and the plain steps it must equal."""

    name: str
    settings: dict[str, Any]
    plain: dict[str, Any]
    """Settings of the reference."""
    learns_at: float
    """A step size at which it has learnt something after 100 steps."""
    tolerance: float = 1e-9
    """How near the reference, which solves least squares and singular values another way, comes."""


CASES = {name: Case(name, {"lr": 1e-2}, {}, 1e-2) for name in OPTIMIZERS}
CASES["geolora"] = Case("geolora", {"lr": 1e-3}, {}, 1e-2, 1e-7)
CASES["lora-pro"] = Case("lora-pro", {"lr": 1e-3}, {}, 3e-3, 1e-7)
for fewer in ("lora-sb", "rac-lora"):  # fewer numbers are trained
    CASES[fewer] = CASES[fewer]._replace(learns_at=3e-2)
CASES["geolora"].settings.update(start_rank=2, prune_every=12, tail=0.1)
CASES["rac-lora"].settings.update(steps_per_block=3, blocks=2)  # of one slot and of two
CASES["rac-lora"].plain.update(each=3, blocks=2)
CASES["lora-pro"].settings.update(ridge=0.0)
CASES |= {
    "lora-pro, full": Case(
        "lora-pro", {"lr": 1e-3, "ridge": 0.0, "moments": "full"}, {"moments": "full"}, 3e-3, 1e-7
    ),
    "geolora, momentum": Case(
        "geolora",
        {**CASES["geolora"].settings, "moments": "momentum"},
        {"moments": "momentum"},
        0.5,
        1e-7,
    ),
}
OURS = [key for key, case in CASES.items() if case.name not in TORCHS]


def made(case: Case, model: nn.Module, **more: Any) -> torch.optim.Optimizer:
    """The optimizer of a case over a model, whose pairs are started where the method needs it."""
    first = METHODS[case.name].start
    if first and not bool(gathered(find_pairs(model, with_sharded=True)[0].B).any()):
        resolve(first)(model, [batch()], one_loss)
    return resolve(METHODS[case.name].optimizer)(model, **{**case.settings, **more})


def one_loss(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(given[0]), given[1])
