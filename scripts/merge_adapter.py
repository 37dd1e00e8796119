r"""Merge an adapter into its base: a plain model with equal outputs, for whoever has no PEFT or wants no second folder.

    python scripts/merge_adapter.py --adapter runs/adapter/final --output merged

The base is the one that the adapter names, or --base; another one than it was trained on is refused.
"""

import argparse
import logging
import sys
from pathlib import Path

from transformers import AutoProcessor

import medclip_hf  # noqa: F401 - makes the Auto classes know the models
from medclip_hf.training.checkpoints import save_model
from medclip_hf.training.lora import merge_adapter


def main(command_line: list[str] | None = None) -> int:
    """Merge as the command line says; 0, or 2 for a mistake in what was asked."""
    options = parse_command_line(command_line)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        check_output(options.output, options.force)
        model = merge_adapter(options.adapter, base=options.base)
        processor = read_processor(options.adapter)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_model(options.output, model, processor)
    print(f"{type(model).__name__} without adapter: {options.output}")
    return 0


def parse_command_line(command_line: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="folder that scripts/finetune_lora.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder of the merged model")
    parser.add_argument("--base", help="folder or Hub name of the base, if it is not where the adapter says")
    parser.add_argument("--force", action="store_true", help="replace what lies in the output folder")
    return parser.parse_args(command_line)


def check_output(output: Path, force: bool) -> None:
    """Refuse to overwrite what was not asked to be."""
    if output.exists() and not force and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not empty. Name another folder, or say --force.")


def read_processor(adapter: Path) -> object:
    """The processor that was saved with the adapter."""
    try:
        return AutoProcessor.from_pretrained(adapter)
    except OSError as error:
        raise ValueError(
            f"{adapter} holds no processor ({' '.join(str(error).split())[:200]}). Was it written by "
            "scripts/finetune_lora.py?"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
