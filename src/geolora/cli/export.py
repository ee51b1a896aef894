"""geolora export: write an adapter again in another layout or rank."""

import argparse

from geolora.cli.terminal import say

EXAMPLES = """examples:
  geolora export out/adapter served --rank 16        uniform rank 16, for any LoRA server
  geolora export out/adapter small --layout compact  each layer its own rank, for peft
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="PEFT LoRA adapter folder")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--layout", default="uniform", help="uniform or compact (uniform)")
    parser.add_argument("--rank", type=int, help="rank of the uniform file; the largest in use")
    parser.add_argument(
        "--max-error",
        type=float,
        default=0.05,
        help="share of the trained update that --rank may cut (0.05); 1 for anything",
    )
    parser.add_argument("--base", help="base model folder or name; the adapter's own if not given")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def run(arguments: argparse.Namespace) -> None:
    """Load the adapter over its base model, and export it."""
    from pathlib import Path

    from geolora.adapters.base_model import load_base, over_base
    from geolora.adapters.export import write
    from geolora.adapters.read import read_adapter
    from geolora.adapters.verify import read_loss
    from geolora.files.output_folder import check_output, naming_disk_errors

    output = Path(arguments.output)
    saved = read_adapter(arguments.adapter)
    base = arguments.base or saved.config.get("base_model_name_or_path") or ""
    # an adapter may be replaced by its own export
    again = output.resolve() == saved.folder.resolve()
    inputs = [base] if again else [base, arguments.adapter]
    check_output(output, arguments.overwrite, "adapter", inputs)
    model = over_base(load_base(saved, arguments.base), saved)
    with naming_disk_errors(output):
        done = write(
            model, output, arguments.layout, arguments.rank, None, arguments.max_error,
            lost_before=read_loss(saved.folder) or 0.0, fresh=not arguments.overwrite,
        )  # fmt: skip
    used = max(done.ranks.values())
    say(
        f"{done.layout}, largest rank {used}, {done.exported_parameters:,} numbers for "
        f"{done.adapter_parameters:,} parameters in use; relative error {done.error:.2e}"
    )
    if done.others:
        say(f"also kept: {', '.join(done.others)} (LoRA servers take pairs only)")
    say(f"written: {output}")
