"""THE table of methods: what an adapter can be trained with, and what it can start from.

`for_trainer`, `geolora train --method` and `--init`, `compare`, the documentation and the tests read it. One
paper is one file beside this one: pure functions from tensors and knobs to tensors. Nothing here loads torch:
implementations are named "module:attribute", and `resolve` imports them when they are used.
"""

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from geolora.errors import SettingError

KINDS = {
    "optimizer": "an optimizer over stock LoRA pairs",
    "start": "an initialiser of stock LoRA pairs",
    "peft": "another configuration of PEFT's, trained by AdamW",
}
ADAMW = "geolora.optim.lora:adamw"
"""AdamW on LoRA's tensors: what trains everything of PEFT's."""


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: the word of `--method`, `--init` and `for_trainer`.
        title: its name in prose. summary: what is done. arxiv: the paper, "" where there is none.
        kind: a key of KINDS.
        mathematics: the pure function of the paper, where it is ours.
        public: names in `geolora` that it is used by in Python, the main one first.
        optimizer: class or function called as (model, **settings), of what trains.
        start: of a row of kind "start" its initialiser; of an optimizer, the initialiser that must run first.
            Called as (model, batches).
        recipe: how `geolora train` makes, trains and saves the adapter; plain LoRA pairs where an optimizer names none.
        takes_budget: whether `--budget` means something.
        own_start: whether it brings its start, so that `--init` must be left alone.
        starts: the starts that may come before it.
        can_resume: whether a checkpoint holds all it needs to go on exactly.
        clips_gradients: whether Trainer's clipping of the factors' gradients is wanted.
        regularises: whether the loss that is logged holds a regulariser of its own.
        start_recipe: of a start, what `geolora train` does for it.
        defaults: its constants, for the documentation. notes: what differs from the paper or, of PEFT's methods,
            what `geolora train` adds.
        refusal: of a start, what is said where it cannot come before a method, {} standing for that.
    """

    name: str
    title: str
    summary: str
    arxiv: str
    kind: str
    mathematics: str = ""
    public: tuple[str, ...] = ()
    optimizer: str = ""
    start: str = ""
    recipe: str = ""
    takes_budget: bool = False
    own_start: bool = False
    starts: tuple[str, ...] = ("lora-one",)
    can_resume: bool = True
    clips_gradients: bool = True
    regularises: bool = False
    start_recipe: str = "geolora.training.recipes:Start"
    refusal: str = ""
    defaults: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        """Refuse a row that would be trained as something else; plain pairs are made by `Recipe`."""
        if self.kind == "optimizer" and not self.recipe:
            object.__setattr__(self, "recipe", "geolora.training.recipes:Recipe")
        needed = {"optimizer": "optimizer", "peft": "recipe", "start": "start"}.get(self.kind)
        if needed is None or not getattr(self, needed):
            raise SettingError(f"methods: the row of {self.name} must have `{needed or 'kind'}`.")


ROWS = (
    Method(
        "geolora",
        "GeoLoRA",
        "rank-adaptive descent on the manifold of low-rank matrices",
        "2410.18720",
        "optimizer",
        mathematics="geolora.methods.geolora:step",
        public=("GeoLoRA",),
        optimizer="geolora.optim.geolora:GeoLoRA",
        recipe="geolora.training.recipes:RankAdaptive",
        takes_budget=True,
        clips_gradients=False,  # it would change lr per W
        defaults=(
            "`lr` 7e-3 (adaptive), 1e-2 (momentum), 0.1 (none); momentum 0.8; tail 0.2, of the gain; judged "
            "once, after 10 % of the steps"
        ),
        notes=(
            "no S⁻¹; nothing is invented where a gradient adds no direction; ranks are judged once;"
            " momentum is carried to the new point; the adaptive step is ours"
        ),
    ),
    Method(
        "lora",
        "LoRA",
        "LoRA, alpha = rank, AdamW",
        "2106.09685",
        "optimizer",
        optimizer=ADAMW,
        starts=("lora-one", "lora-ga"),
    ),
    Method(
        "lora-plus",
        "LoRA+",
        "LoRA, AdamW with a larger step for B than for A, by PEFT's optimizer",
        "2402.12354",
        "optimizer",
        optimizer="geolora.optim.lora_plus:lora_plus",
        notes=(
            "`lr` is the step of A, 7e-4 if not given, B takes 16 times as much; heads keep "
            "`--rest-lr`, where PEFT would give them the step of A or B"
        ),
    ),
    Method(
        "rslora",
        "rsLoRA",
        "LoRA with s = alpha / sqrt(rank)",
        "2312.03732",
        "peft",
        optimizer=ADAMW,
        recipe="geolora.training.peft_recipes:RSLoRA",
        starts=("lora-one", "lora-ga"),
    ),
    Method(
        "dora",
        "DoRA",
        "LoRA and a magnitude per row of W",
        "2402.09353",
        "peft",
        optimizer=ADAMW,
        recipe="geolora.training.peft_recipes:DoRA",
        starts=(),
    ),
    Method(
        "pissa",
        "PiSSA",
        "LoRA from the leading singular vectors of W0 (exact SVD)",
        "2404.02948",
        "peft",
        optimizer=ADAMW,
        recipe="geolora.training.peft_recipes:PiSSA",
        own_start=True,
        starts=(),
        notes=(
            "saved in PEFT's converted form, of twice the rank; the trained head is put back into the"
            " file"
        ),
    ),
    Method(
        "eva",
        "EVA",
        "LoRA from the principal directions of the activations, ranks shared out",
        "2410.07170",
        "peft",
        optimizer=ADAMW,
        recipe="geolora.training.peft_recipes:EVA",
        own_start=True,
        starts=(),
        notes="batches large enough for every layer",
    ),
    Method(
        "adalora",
        "AdaLoRA",
        "three factors, ranks by importance, from --rank to 2/3 of it",
        "2303.10512",
        "peft",
        optimizer=ADAMW,
        recipe="geolora.training.peft_recipes:AdaLoRA",
        own_start=True,
        starts=(),
        regularises=True,
        can_resume=False,  # PEFT keeps its importance scores outside every checkpoint
        notes=(
            "its allocator is called in every step; its rank goes from `--rank` to two thirds, "
            "between 10 and 60 % of the steps; it cannot be resumed"
        ),
    ),
    Method(
        "riemannian",
        "Riemannian preconditioned LoRA",
        "factor gradients in the metric of the other factor, then AdamW",
        "2402.02347",
        "optimizer",
        mathematics="geolora.methods.riemannian:precondition",
        public=("RiemannianAdamW",),
        optimizer="geolora.optim.riemannian:RiemannianAdamW",
        defaults="`lr` 1e-3, damping 1e-2",
        notes=(
            "both sides see the pair as it was before the step; a solve never falls back to the "
            "identity; MoE experts are the pairs they are"
        ),
    ),
    Method(
        "lora-pro",
        "LoRA-Pro",
        "the factors move so that W does what Adam does to the projected gradient",
        "2407.18242",
        "optimizer",
        mathematics="geolora.methods.lora_pro:factor_gradients",
        public=("LoRAPro",),
        optimizer="geolora.optim.lora_pro:LoRAPro",
        defaults='`lr` 1e-4, moments "tangent", ridge 1e-8',
        notes=(
            's is the pair\'s own; "tangent" keeps moments of an adapter\'s size and is ours, "full" is'
            " the paper's"
        ),
    ),
    Method(
        "lora-sb",
        "LoRA-SB",
        "bases fixed by the gradient, only the r x r core between them is trained",
        "2411.19557",
        "optimizer",
        mathematics="geolora.methods.lora_sb:start",
        public=("LoRASB", "initialize_lora_sb"),
        optimizer="geolora.optim.lora_sb:LoRASB",
        start="geolora.starts.lora_sb:initialize_lora_sb",
        own_start=True,
        starts=(),
        defaults="`lr` 1e-3; the start's size as for LoRA-One",
        notes=(
            "the start is the gradient's best rank-r part, not that of the sign of its sum; no layer "
            "is replaced; bases are float32"
        ),
    ),
    Method(
        "rac-lora",
        "RAC-LoRA",
        "A random and frozen, columns of B trained in four blocks, one by one",
        "2410.08305",
        "optimizer",
        mathematics="geolora.methods.rac_lora:block_of",
        public=("RACLoRA",),
        optimizer="geolora.optim.rac_lora:RACLoRA",
        recipe="geolora.training.recipes:Chained",
        starts=(),
        defaults="`lr` 1e-3, 4 blocks",
        notes=(
            "nothing is merged into the base: each block is some slots of one pair; the factor that "
            "starts at zero is trained, and only that; AdamW starts anew in every block"
        ),
    ),
    Method(
        "lora-muon",
        "LoRA-Muon",
        "steepest descent of W under the spectral norm, half of it by each factor",
        "2606.12921",
        "optimizer",
        mathematics="geolora.methods.lora_muon:directions",
        public=("LoRAMuon",),
        optimizer="geolora.optim.lora_muon:LoRAMuon",
        defaults="`lr` 3e-2, momentum 0.9, decay 0.01",
        notes="roots and signs are exact; B = 0 is an ordinary point; `lr` is the spectral norm of a step of W",
    ),
    Method(
        "lora-then-truncate",
        "LoRA, then truncated",
        "LoRA, cut to --budget at the end by PEFT's convert_to_lora",
        "",
        "peft",
        optimizer=ADAMW,
        recipe="geolora.training.peft_recipes:Truncated",
        takes_budget=True,
        notes="the largest of PEFT's energy thresholds that fits the budget",
    ),
    Method(
        "lora-one",
        "LoRA-One",
        "the best rank-r part of one step along the full gradient",
        "2502.01235",
        "start",
        mathematics="geolora.methods.lora_one:start",
        public=("initialize_lora_one", "get_lora_one_state"),
        start="geolora.starts.lora_one:initialize_lora_one",
        refusal="needs plain LoRA pairs that start from B = 0; not {}'s",
        defaults=(
            "norm 0.05, halved while that lowers the loss; twice the rank looked along; up to 6 "
            "passes"
        ),
        notes=(
            "the gradient is never formed; the size is given in W, whatever LoRA's scale; a budget "
            "may share directions out"
        ),
    ),
    Method(
        "lora-ga",
        "LoRA-GA",
        "a pair along different singular directions of the gradient on its two sides",
        "2407.05000",
        "start",
        mathematics="geolora.methods.lora_ga:start",
        public=("initialize_lora_ga", "keep_second_half"),
        start="geolora.starts.lora_ga:initialize_lora_ga",
        start_recipe="geolora.training.recipes:HalfTrained",
        refusal="belongs to lora and rslora; got {}",
        defaults="gamma 16",
        notes=(
            "the offset is in frozen slots of the pair, not in the base weights; half of the rank is "
            "trained; with `--method lora` or `rslora`. PEFT's own `lora_ga` multiplies B by the "
            "gradient's singular values; this does not"
        ),
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in ROWS}
"""Every method of the library by name, in the order in which they are shown."""
TRAINABLE = tuple(row.name for row in ROWS if row.kind != "start")
"""What `--method` takes."""
OPTIMIZERS = tuple(row.name for row in ROWS if row.kind == "optimizer")
"""What `for_trainer` takes."""
STARTS = tuple(row.name for row in ROWS if row.kind == "start")
"""What `--init` takes beside PEFT's own starts."""


def method_of(name: str, among: tuple[str, ...] = tuple(METHODS), what: str = "`method`") -> Method:
    """The row of a name; nothing stands in for one that is not there.

    Raises:
        SettingError: there is no such row. `what` is what the user called it.
    """
    if name not in among:
        raise SettingError(f"{what} must be one of {', '.join(among)}; got {name}.")
    return METHODS[name]


def settings_of(optimizer: Any) -> list[str]:
    """Names of the settings that an optimizer takes beside its model, from its signature."""
    return [name for name in inspect.signature(optimizer).parameters if name != "model"]


def resolve(implementation: str) -> Any:
    """What a "module:attribute" of a row names; imports its module."""
    module, _, attribute = implementation.partition(":")
    return getattr(importlib.import_module(module), attribute)
