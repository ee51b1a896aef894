"""PEFT's own methods through `geolora train`: its code is called, never rewritten."""

import math
import warnings
from pathlib import Path
from typing import Any

import torch

from geolora.adapters.card import model_card
from geolora.adapters.truncate import truncate
from geolora.errors import SettingError
from geolora.pairs.find import lora_layers
from geolora.training.recipes import Batches, Kept, Recipe

EVA_BATCHES = 64
"""Batches EVA's start may look at; it stops by itself when its directions are stable."""
ADALORA_WARMUP, ADALORA_FINAL = 0.1, 0.4
"""Shares of the steps before AdaLoRA's ranks fall and after they are final: PEFT has no default
that works (0 and 0: the final mask is then never made), the paper's GLUE runs are near these."""


class RSLoRA(Recipe):
    """LoRA with s = alpha / sqrt(rank)."""

    def lora(self) -> dict[str, Any]:
        """PEFT's flag."""
        return {"use_rslora": True}


class Truncated(Recipe):
    """LoRA, cut to the budget when training has ended."""

    def check(self) -> None:
        """Refuse a missing budget."""
        super().check()
        if self.config.budget is None:
            raise SettingError(f"`--budget` must be given with {self.method.name}: what to cut to.")

    def finish(self, model: Any) -> None:
        """PEFT's conversion."""
        assert self.config.budget is not None  # noqa: S101 (check)
        truncate(model, self.config.budget)


class EVA(Recipe):
    """LoRA whose A comes from the activations of some batches, ranks shared out over the layers."""

    def lora(self) -> dict[str, Any]:
        """PEFT's start."""
        from peft import EvaConfig

        return {"init_lora_weights": "eva", "eva_config": EvaConfig()}

    def prepare(self, model: Any, batches: Batches) -> None:
        """Look at the activations.

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

        rank = self.config.rank
        rows = max(self.config.batch_size, math.ceil(EvaConfig().rho * rank))
        drawn = batches(rows, EVA_BATCHES)
        if len(drawn) < 1:
            raise SettingError(f"`--rank` {rank} with eva needs {rows} training rows or more.")
        # labels per row, not per token: they are no mask
        inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in drawn]
        initialize_lora_eva_weights(
            model, inputs, prepare_layer_inputs_fn=of_layer, show_progress_bar=False
        )
        super().prepare(model, batches)


class SavedByPEFT(Recipe):
    """Adapters that are more than LoRA pairs: PEFT writes them."""

    def save(self, model: Any, folder: Path, start: Path) -> Kept:
        """By PEFT; what is in use is counted layer by layer."""
        shapes = {
            name: (int(layer.in_features or 0), int(layer.out_features or 0))
            for name, layer in lora_layers(model)
            if getattr(layer, "lora_A", None)
        }
        ranks = {name: self.rank_of(model, name) for name in shapes}
        used = sum(ranks[name] * sum(shapes[name]) for name in shapes) + self.beside(shapes)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # the base model's config is not looked up: nothing is new
            self.write(model, folder, start)
        numbers = _lora_numbers(folder)
        config = model.peft_config["default"]
        form = f"as peft saves {self.method.title}, for peft and what is built on it"
        base, others = config.base_model_name_or_path, sorted(config.modules_to_save or ())
        card = model_card(base, form, ranks, used, numbers, others, probes=False)
        (folder / "README.md").write_text(card, encoding="utf-8")  # peft's names the base's folder
        return Kept(ranks, used, numbers)

    def rank_of(self, model: Any, layer: str) -> int:  # noqa: ARG002
        """Directions of a layer in use."""
        return self.config.rank

    def beside(self, shapes: dict[str, tuple[int, int]]) -> int:  # noqa: ARG002
        """Parameters of the adapter beside its factors, for layers (d_in, d_out)."""
        return 0

    def write(self, model: Any, folder: Path, start: Path) -> None:  # noqa: ARG002
        """Write the adapter's files."""
        model.save_pretrained(folder)


class DoRA(SavedByPEFT):
    """LoRA and a magnitude per row of W."""

    finds_lr = False

    def lora(self) -> dict[str, Any]:
        """PEFT's flag."""
        return {"use_dora": True}

    def prepare(self, model: Any, batches: Batches) -> None:
        """Nothing to check: these layers are no plain pairs."""

    def beside(self, shapes: dict[str, tuple[int, int]]) -> int:
        """The magnitudes."""
        return sum(d_out for _, d_out in shapes.values())


class PiSSA(SavedByPEFT):
    """LoRA from the leading singular vectors of W0, saved as an ordinary adapter of twice the rank."""

    def lora(self) -> dict[str, Any]:
        """PEFT's start."""
        return {"init_lora_weights": "pissa"}

    def keep_start(self, model: Any, folder: Path) -> None:
        """The conversion to an ordinary adapter needs it; PEFT asks that it be saved as an ordinary start."""
        held = model.peft_config["default"]
        held.init_lora_weights, start = True, held.init_lora_weights
        model.save_pretrained(folder)
        held.init_lora_weights = start

    def write(self, model: Any, folder: Path, start: Path) -> None:
        """PEFT's conversion; peft 0.21 leaves the trained head out of the file: it is put back."""
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


class AdaLoRA(SavedByPEFT):
    """Three factors, ranks by importance, from --rank to two thirds of it."""

    finds_lr = False

    def check(self) -> None:
        """Refuse a rank below 2."""
        super().check()
        if self.config.rank < 2:
            raise SettingError(
                "`--rank` must be 2 or more with adalora, which cuts it to two thirds."
            )

    def peft_config(self, common: dict[str, Any], total: int) -> Any:
        """PEFT's, with a schedule for the run."""
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            **common,
            init_r=self.config.rank,
            target_r=round(self.config.rank * 2 / 3),  # as PEFT's defaults, 12 and 8
            tinit=round(ADALORA_WARMUP * total),
            tfinal=round(ADALORA_FINAL * total),
            total_step=total,
        )

    def prepare(self, model: Any, batches: Batches) -> None:
        """Nothing to check: these layers are no plain pairs."""

    def callbacks(self, model: Any) -> list[Any]:
        """AdaLoRA's allocator, which nobody else would call."""
        from transformers import TrainerCallback

        class Allocate(TrainerCallback):
            """After the step and before zero_grad: importance is |weight * gradient|."""

            def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
                model.base_model.update_and_allocate(state.global_step)

        return [Allocate()]

    def rank_of(self, model: Any, layer: str) -> int:
        """Singular values that are left."""
        values = model.base_model.model.get_submodule(layer).lora_E["default"]
        return int((values != 0).sum())


def _lora_numbers(folder: Path) -> int:
    """Numbers of the LoRA tensors of a saved adapter."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys() if "lora_" in key]  # noqa: SIM118
    return sum(math.prod(shape) for shape in shapes)
