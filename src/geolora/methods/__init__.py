"""One paper, one file: pure functions from tensors and knobs to tensors."""

from collections.abc import Callable
from typing import Any, NamedTuple

from geolora.methods import geolora, lora_ga, lora_one, lora_pro, lora_sb, rac_lora, riemannian


class Method(NamedTuple):
    """A row of the table of methods."""

    kind: str
    """"step" (an optimizer) or "start" (an initialiser)."""
    what: str
    function: Callable[..., Any]
    arxiv: str


METHODS: dict[str, Method] = {
    "geolora": Method(
        "step",
        "rank-adaptive descent on the manifold of low-rank matrices",
        geolora.step,
        "2410.18720",
    ),
    "lora-ga": Method(
        "start",
        "a pair along different singular directions of the gradient on its two sides",
        lora_ga.start,
        "2407.05000",
    ),
    "lora-one": Method(
        "start",
        "the best rank-r part of one step along the full gradient",
        lora_one.start,
        "2502.01235",
    ),
    "lora-pro": Method(
        "step",
        "factor gradients whose joint effect on W is the projected gradient",
        lora_pro.factor_gradients,
        "2407.18242",
    ),
    "lora-sb": Method(
        "start",
        "bases fixed by the gradient, only the r x r core is trained",
        lora_sb.start,
        "2411.19557",
    ),
    "rac-lora": Method(
        "step",
        "a chain of adapters, each with one random, frozen factor",
        rac_lora.block_of,
        "2410.08305",
    ),
    "riemannian": Method(
        "step",
        "factor gradients in the metric of the other factor, then AdamW",
        riemannian.precondition,
        "2402.02347",
    ),
}
"""Every method of the library by name."""
