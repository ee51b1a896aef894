"""What `geolora train` does for each method: how its adapter is made, started, trained and saved.

A row of the table of methods names the recipe of its adapter. `Recipe` is that of plain LoRA pairs, which every
optimizer of ours trains; what differs is a class: here for ours, in `peft_recipes.py` for PEFT's methods.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from geolora.adapters.export import export
from geolora.errors import GeoloraWarning, ModelError, SettingError, at_most_three, first_line
from geolora.methods import METHODS, STARTS, TRAINABLE, Method, method_of, resolve
from geolora.pairs.find import find_pairs
from geolora.settings.train_config import TrainConfig
from geolora.starts.lora_ga import keep_second_half
from geolora.trainer import factory_of

START_ROWS = 64
"""Training rows of which the gradient of a start is taken, rounded up to whole batches."""
CHAIN = 4
"""Adapters in RAC-LoRA's chain."""
MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
NOT_IN_MAMBA = ("out_proj", "x_proj", "dt_proj")
"""Layers of models of these types whose weights are read past the layer, and so past an adapter."""
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


class Start:
    """A start that looks at the gradient of `START_ROWS` rows, before the first step of a run."""

    def __init__(self, method: Method, config: TrainConfig) -> None:
        self.method, self.config = method, config

    def check(self) -> None:
        """Refuse flags it cannot work with; raises `SettingError`."""

    def begin(self, model: Any, batches: Batches, resumed: bool) -> None:
        """Start the adapter, unless the run is resumed."""
        if not resumed:
            size = self.config.batch_size
            resolve(self.method.start)(model, batches(size, -(-START_ROWS // size)))


class HalfTrained(Start):
    """LoRA-GA: half of the slots are trained, the other half is kept as it is."""

    def check(self) -> None:
        """Refuse an odd rank."""
        if self.config.rank % 2:
            raise SettingError(
                f"`--rank` must be even with --init {self.method.name}; got {self.config.rank}."
            )

    def begin(self, model: Any, batches: Batches, resumed: bool) -> None:
        """No checkpoint holds the hooks that freeze the second half: set them again."""
        if resumed:
            keep_second_half(model)
        super().begin(model, batches, resumed)


class Recipe:
    """Plain LoRA pairs on all linear layers, written by `geolora.export`.

    Attributes:
        method: its row in the table. config: the settings of the run.
        start: what comes before the first step, None for PEFT's own start.
    """

    finds_lr = True
    """Whether the step size can be searched for; of plain pairs it can."""

    def __init__(self, method: Method, config: TrainConfig) -> None:
        self.method, self.config = method, config
        row = METHODS[config.init] if config.init in STARTS else method
        self.start = None
        if row.start:
            self.start = resolve(row.start_recipe)(row, config)

    def check(self) -> None:
        """Refuse flags that do not belong to the method.

        Raises:
            SettingError: which flag, and what it belongs to.
        """
        config, method = self.config, self.method
        if config.budget is not None and not method.takes_budget:
            owners = [name for name in TRAINABLE if METHODS[name].takes_budget]
            raise SettingError(f"`--budget` belongs to {', '.join(owners)}; got {method.name}.")
        if config.init != "default" and method.own_start:
            raise SettingError(
                f"`--init` must be default with {method.name}, which has its own start."
            )
        if config.init in STARTS and config.init not in method.starts:
            row = METHODS[config.init]
            raise SettingError(f"`--init {row.name}` {row.refusal.format(method.name)}.")
        self._check_start_rank()
        if self.start is not None:
            self.start.check()
        if config.save_every is not None and not method.can_resume:
            raise SettingError(
                f"`--save-every` cannot be used with {method.name}: PEFT keeps its importance scores "
                "outside every checkpoint. Leave it out."
            )

    def _check_start_rank(self) -> None:
        if self.config.start_rank is not None:
            raise SettingError(
                f"`--start-rank` belongs to --method geolora; got {self.method.name}."
            )

    def optimizer(self, total: int) -> tuple[Any, dict[str, Any]]:
        """What Trainer's `optimizer_cls_and_kwargs` takes, for a run of so many steps."""
        settings: dict[str, Any] = {"rest_lr": self.config.rest_lr}
        if self.config.lr is not None:
            settings["lr"] = self.config.lr
        return factory_of(self.method), settings | self.settings(total)

    def settings(self, total: int) -> dict[str, Any]:  # noqa: ARG002
        """Settings of its optimizer beside the step sizes."""
        return {}

    def add_adapter(
        self, model: nn.Module, new: list[str], kind: str, total: int, batches: Batches
    ) -> Any:
        """A PeftModel with the method's adapter on `adapted_layers`.

        Args:
            new: names of modules that are trained whole and saved (heads).
            kind: PEFT's name of the task, "SEQ_CLS" say, or "" where it has none.
            total: steps of the run. batches: gives tokenised training batches of a size.

        Raises:
            SettingError: a rank or budget that does not fit the model.
        """
        from peft import TaskType, get_peft_model

        targets, others = adapted_layers(model, new, self.config.rank)
        common: dict[str, Any] = {
            "lora_alpha": self.config.rank,
            # by name: for "all-linear", peft adds routers and experts of some models
            "target_modules": targets or "all-linear",
            "exclude_modules": others or None,
            "modules_to_save": new or None,
        }
        # the task type only later: with it, PEFT would take any module whose name ends like a head
        with warnings.catch_warnings():  # a hint how EVA's start needs less memory
            warnings.filterwarnings("ignore", "lora with eva initialization used", UserWarning)
            try:
                peft_model = get_peft_model(model, self.peft_config(common, total))
            except (ValueError, NotImplementedError) as error:
                raise ModelError(
                    f"`--model`: peft cannot add {self.method.title} to the linear layers of "
                    f"{self.config.model} ({type(model).__name__}): {first_line(error)}."
                ) from error
        peft_model.peft_config["default"].task_type = TaskType[kind] if kind else None
        hold_statistics(peft_model)
        self.prepare(peft_model, batches)
        return peft_model

    def peft_config(self, common: dict[str, Any], total: int) -> Any:  # noqa: ARG002
        """PEFT's configuration of the adapter.

        Args:
            common: what all of them take. total: steps of the run.
        """
        from peft import LoraConfig

        usual: Any = self.config.init if self.config.init == "gaussian" else True
        return LoraConfig(
            **{**common, "r": self.config.rank, "init_lora_weights": usual, **self.lora()}
        )

    def lora(self) -> dict[str, Any]:
        """What differs from a plain `LoraConfig`."""
        return {}

    def prepare(self, model: Any, batches: Batches) -> None:  # noqa: ARG002
        """Refuse pairs that cannot be trained, before anything is written."""
        find_pairs(model)

    def callbacks(self, model: Any) -> list[Any]:  # noqa: ARG002
        """Trainer callbacks the method needs."""
        return []

    def begin(self, model: Any, batches: Batches, resumed: bool) -> None:
        """What comes before the first step."""
        if self.start is not None:
            self.start.begin(model, batches, resumed)

    def keep_start(self, model: Any, folder: Path) -> None:
        """Write what is needed later from before the first step."""

    def finish(self, model: Any) -> None:
        """What is left to do to the model when training ends, in place."""

    def save(self, model: Any, folder: Path, start: Path) -> Kept:  # noqa: ARG002
        """Write the adapter.

        Args:
            folder: where to. start: where `keep_start` wrote to.
        """
        done = export(model, folder)
        return Kept(done.ranks, done.adapter_parameters, done.exported_parameters)


def adapted_layers(model: nn.Module, heads: list[str], rank: int) -> tuple[list[str], list[str]]:
    """Names of the layers of a base model that get a pair, and of layers that must not get one.

    All linear layers but the heads and the output embedding; in a model that has none, all convolutions that are
    not grouped. Layers narrower than the rank (routers, gates of one unit) are left as they are, with a warning,
    unless most layers are: then the rank is too large, and making the pairs says so.

    Args:
        heads: names of modules that are trained whole.
    """
    from transformers.pytorch_utils import Conv1D

    named = dict(model.named_modules())
    output = getattr(model, "get_output_embeddings", lambda: None)()
    whole = [name for head in heads for name in named if f"{name}.".startswith(f"{head}.")]
    whole += [name for name, module in named.items() if module is output]
    if getattr(getattr(model, "config", None), "model_type", None) in MAMBA:
        whole += [name for name in named if name.rpartition(".")[2] in NOT_IN_MAMBA]
    rest = {name: module for name, module in named.items() if name not in set(whole)}
    found = {
        name: module for name, module in rest.items() if isinstance(module, nn.Linear | Conv1D)
    }
    for name in _taken_for_experts(model, list(found)):
        whole.append(name)
        del found[name]
    if not found:
        convolutions = ((n, module) for n, module in rest.items() if isinstance(module, nn.Conv2d))
        found = {name: module for name, module in convolutions if module.groups == 1}
    narrow = [name for name, module in found.items() if min(_sides(module)) < rank]
    if 2 * len(narrow) > len(found):
        narrow = []
    if narrow:
        warnings.warn(
            f"{len(narrow)} of {len(found)} layers are left as they are, for one of their sides is below the "
            f"rank of {rank}: {at_most_three(narrow)}.",
            GeoloraWarning,
            stacklevel=2,
        )
    return [name for name in found if name not in narrow], whole + narrow


def hold_statistics(model: nn.Module) -> None:
    """Keep batch normalisation at the base's running statistics, in training too: no adapter file holds them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.train = partial(_as_it_is, module)  # pyright: ignore[reportAttributeAccessIssue]


def _as_it_is(module: nn.Module, mode: bool = True) -> nn.Module:  # noqa: ARG001
    return module


def _taken_for_experts(model: nn.Module, names: list[str]) -> set[str]:
    """Layers that peft would leave for the experts of a mixture, which once had their names.

    They are those of a shared expert, or of a block without experts between blocks that have some.
    """
    from peft import LoraConfig

    tried = LoraConfig(target_modules=names)
    with suppress(ImportError):  # an older peft leaves none
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

        convert_peft_config_for_transformers(tried, model, None)
    return set(names) - set(tried.target_modules or ())


def _sides(layer: Any) -> tuple[int, int]:
    """(d_out, d_in) of what a pair of a layer multiplies to, whatever its weight is packed as."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, math.prod((layer.in_channels, *layer.kernel_size))
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.weight.shape[1], layer.weight.shape[0]


class RankAdaptive(Recipe):
    """GeoLoRA: ranks judged once, early."""

    def _check_start_rank(self) -> None:
        if self.config.start_rank is not None and self.config.init in STARTS:
            raise SettingError(
                f"`--start-rank` belongs to --init default: {self.config.init} fills all of --rank."
            )

    def settings(self, total: int) -> dict[str, Any]:
        """One judgement after a share of the steps."""
        return {
            "start_rank": self.config.start_rank,
            "tail": self.config.tail,
            "budget": self.config.budget,
            "total_steps": total,
        }


class Chained(Recipe):
    """RAC-LoRA: blocks of slots, one after the other."""

    def settings(self, total: int) -> dict[str, Any]:
        """Blocks of equal length."""
        blocks = min(CHAIN, self.config.rank)
        return {"blocks": blocks, "steps_per_block": -(-total // blocks)}


def recipe_of(config: TrainConfig) -> Recipe:
    """The recipe of a run's method; an unknown method raises `SettingError`."""
    method = method_of(config.method, TRAINABLE, "`--method`")
    return resolve(method.recipe)(method, config)
