"""One paper, one file: pure functions from tensors and knobs to tensors."""

from collections.abc import Callable
from typing import Any, NamedTuple

from geolora.methods import geolora, lora_one, lora_pro, riemannian


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
    "riemannian": Method(
        "step",
        "factor gradients in the metric of the other factor, then AdamW",
        riemannian.precondition,
        "2402.02347",
    ),
}
"""Every method of the library by name."""
