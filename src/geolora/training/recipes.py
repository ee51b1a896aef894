"""The methods of `geolora train`: GeoLoRA, its relatives, and what PEFT has to compare them with.

The optimizers of geolora, riemannian, lora-pro, lora-sb and rac-lora are ours, all else is PEFT's own code:

| method             | what is done                                                        | paper            |
|--------------------|---------------------------------------------------------------------|------------------|
| lora               | LoRA, alpha = rank, AdamW                                           | arXiv 2106.09685 |
| rslora             | LoRA with s = alpha / sqrt(rank)                                    | arXiv 2312.03732 |
| dora               | LoRA and a magnitude per row of W                                   | arXiv 2402.09353 |
| pissa              | LoRA from the leading singular vectors of W0 (exact SVD)            | arXiv 2404.02948 |
| eva                | LoRA from the principal directions of the activations, ranks shared | arXiv 2410.07170 |
| adalora            | three factors, importance-driven ranks; from --rank to 2/3 of it    | arXiv 2303.10512 |
| riemannian         | LoRA, gradients preconditioned by (B^T B)^-1 and (A A^T)^-1, AdamW  | arXiv 2402.02347 |
| lora-pro           | LoRA, the factors move so that W does what Adam does to P(W)G       | arXiv 2407.18242 |
| lora-sb            | bases fixed by the gradient's, the r x r core between them is trained | arXiv 2411.19557 |
| rac-lora           | A random and frozen, columns of B trained in four blocks, one by one | arXiv 2410.08305 |
| lora-then-truncate | LoRA, then `convert_to_lora` down to --budget parameters            |                  |
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from geolora.adapters.export import export
from geolora.errors import SettingError
from geolora.pairs.find import find_pairs
from geolora.pairs.point import read_pair
from geolora.starts.gradient_state import (
    initialize_lora_ga,
    initialize_lora_one,
    initialize_lora_sb,
    keep_second_half,
)
from geolora.trainer import FACTORIES, for_trainer

if TYPE_CHECKING:
    from geolora.settings.train_config import TrainConfig

METHODS = (
    "geolora", "lora", "rslora", "dora", "pissa", "eva", "adalora", "riemannian",
    "lora-pro", "lora-sb", "rac-lora", "lora-then-truncate",
)  # fmt: skip
TAKES_BUDGET = ("geolora", "lora-then-truncate")
OWN_START = ("pissa", "eva", "adalora", "lora-sb")
CAN_RESUME = tuple(method for method in METHODS if method != "adalora")
NO_GRADIENT_START = (*OWN_START, "dora", "rac-lora")
START_ROWS = 64
"""Training rows of which the gradient of a start is taken, rounded up to whole batches."""
STARTS = {
    "lora-one": initialize_lora_one,
    "lora-ga": initialize_lora_ga,
    "lora-sb": initialize_lora_sb,
}
EVA_BATCHES = 64
"""Batches EVA's start may look at; it stops by itself when its directions are stable."""
RAC_BLOCKS = 4
"""Adapters in RAC-LoRA's chain."""
JUDGE = 0.1
"""Share of the steps after which GeoLoRA's ranks are judged, once, and then kept."""
ADALORA_WARMUP, ADALORA_FINAL = 0.1, 0.4
"""Shares of the steps before AdaLoRA's ranks fall and after they are final: PEFT has no default
that works (0 and 0: the final mask is then never made), the paper's GLUE runs are near these."""
TRUNCATED = "truncated"
Batches = Callable[[int, int], list[Any]]
"""(rows per batch, number) -> tokenised training batches, fewer where the data ends."""


@dataclass(frozen=True)
class Kept:
    """The adapter that a run leaves.

    Attributes:
        ranks: {layer: rank}.
        adapter_parameters: sum of rank * (d_in + d_out), and DoRA's magnitudes.
        exported_parameters: numbers of the adapter in the file.
    """

    ranks: dict[str, int]
    adapter_parameters: int
    exported_parameters: int


def check_method(config: "TrainConfig") -> None:
    """Refuse flags that do not belong to the method.

    Raises:
        SettingError: which flag, and what it belongs to.
    """
    method = config.method
    if config.budget is not None and method not in TAKES_BUDGET:
        raise SettingError(f"`--budget` belongs to {', '.join(TAKES_BUDGET)}; got {method}.")
    if config.budget is None and method == "lora-then-truncate":
        raise SettingError("`--budget` must be given with lora-then-truncate: what to cut to.")
    if config.start_rank is not None and method != "geolora":
        raise SettingError(f"`--start-rank` belongs to --method geolora; got {method}.")
    if config.init != "default" and method in OWN_START:
        raise SettingError(f"`--init` must be default with {method}, which has its own start.")
    if config.init == "lora-one" and method in NO_GRADIENT_START:
        raise SettingError(
            f"`--init lora-one` needs plain LoRA pairs that start from B = 0; not {method}'s."
        )
    if config.init == "lora-one" and config.start_rank is not None:
        raise SettingError(
            "`--start-rank` belongs to --init default: lora-one fills all of --rank."
        )
    if config.init == "lora-ga" and method not in ("lora", "rslora"):
        raise SettingError(f"`--init lora-ga` belongs to lora and rslora; got {method}.")
    if config.init == "lora-ga" and config.rank % 2:
        raise SettingError(f"`--rank` must be even with --init lora-ga; got {config.rank}.")
    if config.rank < 2 and method == "adalora":
        raise SettingError("`--rank` must be 2 or more with adalora, which cuts it to two thirds.")
    if config.save_every is not None and method not in CAN_RESUME:
        raise SettingError(
            f"`--save-every` cannot be used with {method}: PEFT keeps its importance scores outside "
            "every checkpoint. Leave it out."
        )


def add_adapter(
    model: nn.Module,
    config: "TrainConfig",
    new: list[str],
    kind: str,
    total: int,
    batches: Batches,
) -> Any:
    """A PeftModel with the method's adapter on all linear layers.

    Args:
        new: names of modules that are trained whole and saved (heads).
        kind: PEFT's name of the task, "SEQ_CLS" say, or "" where it has none.
        total: steps of the run. batches: gives tokenised training batches of a size, for EVA.

    Raises:
        SettingError: a rank or budget that does not fit the model.
    """
    from peft import AdaLoraConfig, EvaConfig, LoraConfig, TaskType, get_peft_model

    common: dict[str, Any] = {
        "lora_alpha": config.rank,
        "target_modules": "all-linear",
        "exclude_modules": new or None,
        "modules_to_save": new or None,
    }
    if config.method == "adalora":
        lora: Any = AdaLoraConfig(
            **common,
            init_r=config.rank,
            target_r=round(config.rank * 2 / 3),  # as PEFT's defaults, 12 and 8
            tinit=round(ADALORA_WARMUP * total),
            tfinal=round(ADALORA_FINAL * total),
            total_step=total,
        )
    else:
        usual: Any = config.init if config.init == "gaussian" else True
        lora = LoraConfig(
            **common,
            r=config.rank,
            use_rslora=config.method == "rslora",
            use_dora=config.method == "dora",
            init_lora_weights=config.method if config.method in ("pissa", "eva") else usual,
            eva_config=EvaConfig() if config.method == "eva" else None,
        )
    # the task type only now: with it, PEFT would take any module whose name ends like a head
    with warnings.catch_warnings():  # a hint how EVA's start needs less memory
        warnings.filterwarnings("ignore", "lora with eva initialization used", UserWarning)
        peft_model = get_peft_model(model, lora)
    peft_model.peft_config["default"].task_type = TaskType[kind] if kind else None
    if config.method == "eva":
        _eva_start(peft_model, config, batches)
    if config.method not in ("dora", "adalora"):
        find_pairs(peft_model)
    return peft_model


def optimizer_of(config: "TrainConfig", total: int) -> tuple[type, dict[str, Any]]:
    """What Trainer's `optimizer_cls_and_kwargs` takes for the method."""
    settings: dict[str, Any] = {"rest_lr": config.rest_lr}
    if config.lr is not None:
        settings["lr"] = config.lr
    if config.method == "geolora":
        settings |= {
            "start_rank": config.start_rank,
            "tail": config.tail,
            "budget": config.budget,
            "prune_every": None,
            "settle_after": int(JUDGE * total),
        }
        return for_trainer("geolora", **settings)
    if config.method == "rac-lora":
        blocks = min(RAC_BLOCKS, config.rank)
        settings |= {"blocks": blocks, "steps_per_block": -(-total // blocks)}
    return for_trainer(config.method if config.method in FACTORIES else "lora", **settings)


def callbacks_of(model: Any, config: "TrainConfig") -> list[Any]:
    """Trainer callbacks the method needs: AdaLoRA's allocator, which nobody else would call."""
    if config.method != "adalora":
        return []
    from transformers import TrainerCallback

    class Allocate(TrainerCallback):
        """After the step and before zero_grad: importance is |weight * gradient|."""

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            model.base_model.update_and_allocate(state.global_step)

    return [Allocate()]


def start(model: Any, config: "TrainConfig", batches: Batches, resumed: bool) -> None:
    """The start that looks at the gradient of `START_ROWS` rows, before the first step of a run."""
    if config.init == "lora-ga" and resumed:
        keep_second_half(model)
    name = "lora-sb" if config.method == "lora-sb" else config.init
    if name in STARTS and not resumed:
        STARTS[name](model, batches(config.batch_size, -(-START_ROWS // config.batch_size)))


def keep_start(model: Any, config: "TrainConfig", folder: Path) -> None:
    """Write what the method needs later from before its first step (PiSSA's start)."""
    if config.method == "pissa":
        # PEFT asks that the start be saved as an ordinary one
        held = model.peft_config["default"]
        held.init_lora_weights, start = True, held.init_lora_weights
        model.save_pretrained(folder)
        held.init_lora_weights = start


def finish(model: Any, config: "TrainConfig") -> None:
    """What is left to do when training ends: the truncation of lora-then-truncate, in place."""
    if config.method == "lora-then-truncate":
        assert config.budget is not None  # noqa: S101 (check_method)
        truncate(model, config.budget)


def save(model: Any, config: "TrainConfig", folder: Path, start: Path) -> Kept:
    """Write the adapter: by `geolora.export` where it is made of LoRA pairs, else by PEFT.

    Args:
        folder: where to. start: where `keep_start` wrote to.
    """
    if config.method not in ("dora", "pissa", "adalora"):
        done = export(model, folder)
        return Kept(done.ranks, done.adapter_parameters, done.exported_parameters)
    shapes = {name: (d_in, d_out) for name, d_in, d_out in _lora_shapes(model)}
    ranks = dict.fromkeys(shapes, config.rank)
    if config.method == "adalora":
        ranks = {name: _adalora_rank(model.base_model.model.get_submodule(name)) for name in shapes}
    used = sum(ranks[name] * sum(shapes[name]) for name in shapes)
    if config.method == "dora":
        used += sum(d_out for _, d_out in shapes.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the base model's config is not looked up: nothing is new
        if config.method == "pissa":
            _save_converted(model, folder, start)
        else:
            model.save_pretrained(folder)
    return Kept(ranks, used, _lora_numbers(folder))


def _save_converted(model: Any, folder: Path, start: Path) -> None:
    """PEFT's conversion of a PiSSA adapter to an ordinary one, of twice the rank.

    peft 0.21 leaves the trained head out of the converted file: it is put back.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    trained = get_peft_model_state_dict(model)
    model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(start))
    file = folder / "adapter_model.safetensors"
    converted = load_file(file)
    heads = {
        key: value.cpu().contiguous() for key, value in trained.items() if key not in converted
    }
    save_file({**heads, **converted}, file, metadata={"format": "pt"})


def truncate(model: Any, budget: int) -> None:
    """Cut a LoRA adapter to at most `budget` parameters by PEFT's `convert_to_lora`.

    Its rule is an energy threshold: every layer keeps the leading singular values that hold this
    share of its energy. The threshold is the largest one within the budget.

    Raises:
        SettingError: a budget below one direction in every layer.
    """
    from peft import set_peft_model_state_dict
    from peft.tuners.lora.conversion import convert_to_lora

    pairs = find_pairs(model)
    energies, costs = [], [pair.d_in + pair.d_out for pair in pairs]
    for pair in pairs:
        squares = read_pair(pair.A.flatten(1), pair.B.flatten(1), pair.scale).sigma ** 2
        energies.append((squares.cumsum(0) / squares.sum().clamp(min=1e-300)).tolist())
    if budget < sum(costs):
        raise SettingError(
            f"`--budget` must hold one direction in every layer, {sum(costs)} parameters; got {budget}."
        )

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
        warnings.simplefilter(
            "ignore"
        )  # PEFT says that the model is LoRA already: that is the idea
        lora, tensors = convert_to_lora(model, rank=threshold)
    model.add_adapter(TRUNCATED, lora)
    set_peft_model_state_dict(model, tensors, adapter_name=TRUNCATED)
    model.set_adapter(TRUNCATED)


def _eva_start(model: Any, config: "TrainConfig", batches: Batches) -> None:
    """PEFT's EVA: A from the activations of some batches, ranks shared out over the layers.

    A layer that sees one vector per row (a pooler) needs a batch of rho * rank rows, or PEFT waits
    for it for ever.
    """
    from peft import EvaConfig, initialize_lora_eva_weights
    from peft.tuners.lora.eva import prepare_layer_inputs_fn_language_modeling as of_tokens

    def of_layer(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
        """PEFT's rule for (batch, tokens, d); (batch, d), as poolers and heads see, as it is."""
        first = layer_input[0] if isinstance(layer_input, list | tuple) else layer_input
        return (
            first.contiguous()
            if first.dim() == 2
            else of_tokens(layer_input, model_input, layer_name)
        )

    # labels per row, not per token: they are no mask
    rows = max(config.batch_size, math.ceil(EvaConfig().rho * config.rank))
    found = batches(rows, EVA_BATCHES)
    if len(found) < 1:
        raise SettingError(f"`--rank` {config.rank} with eva needs {rows} training rows or more.")
    inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in found]
    initialize_lora_eva_weights(
        model, inputs, prepare_layer_inputs_fn=of_layer, show_progress_bar=False
    )


def _adalora_rank(layer: Any) -> int:
    return int((layer.lora_E["default"] != 0).sum())


def _lora_shapes(model: Any) -> list[tuple[str, int, int]]:
    from peft.tuners.lora import LoraLayer

    return [
        (name, int(module.in_features or 0), int(module.out_features or 0))
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, LoraLayer) and getattr(module, "lora_A", None)
    ]


def _lora_numbers(folder: Path) -> int:
    """Numbers of the LoRA tensors of a saved adapter."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys() if "lora_" in key]  # noqa: SIM118
    return sum(math.prod(shape) for shape in shapes)
