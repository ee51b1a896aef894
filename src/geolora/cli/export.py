"""geolora export: write an adapter again in another layout or rank."""

import argparse

EXAMPLES = """examples:
  geolora export out/adapter served --rank 16        uniform rank 16, for any LoRA server
  geolora export out/adapter small --layout compact  each layer its own rank, for peft
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="PEFT LoRA adapter folder")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--layout", default="uniform", help="uniform or compact (uniform)")
    parser.add_argument("--rank", type=int, help="rank of the uniform file; the largest in use")
    parser.add_argument("--base", help="base model folder or name; the adapter's own if not given")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def run(arguments: argparse.Namespace) -> None:
    """Load the adapter over its base model, and export it."""
    import tempfile
    from pathlib import Path

    from geolora.adapters.base_model import load_adapter
    from geolora.adapters.export import export
    from geolora.training.output_folder import check_output, remove_folder

    output = Path(arguments.output)
    check_output(output, arguments.overwrite)
    model = load_adapter(arguments.adapter, arguments.base)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    # written whole before an old folder goes: the old one may be the adapter itself
    with tempfile.TemporaryDirectory(dir=output.absolute().parent) as folder:
        new = Path(folder) / "adapter"
        done = export(model, new, layout=arguments.layout, rank=arguments.rank)
        remove_folder(output)
        new.rename(output)
    used = max(done.ranks.values())
    print(
        f"{done.layout}, largest rank {used}, {done.exported_parameters:,} numbers for "
        f"{done.adapter_parameters:,} parameters in use; relative error {done.error:.2e}"
    )
    if done.others:
        print(f"also kept: {', '.join(done.others)} (LoRA servers take pairs only)")
    print(f"written: {output}")
