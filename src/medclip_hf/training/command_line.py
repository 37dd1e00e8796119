"""What the training scripts share: their command line, and how a run begins and ends."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from medclip_hf.training.arguments import RunArguments, build_sections, read_recipe
from medclip_hf.training.checkpoints import UnwrittenError
from medclip_hf.training.faults import LostProcessError
from medclip_hf.training.launch import end, make_accelerator
from medclip_hf.training.loop import NoRowsError, TrainResult

logger = logging.getLogger(__name__)

RunFn = Callable[[dict[str, Any], dict[str, Any], bool | Path, Accelerator], TrainResult]


def train_by_recipe(
    description: str, sections: Mapping[str, type], run: RunFn, command_line: list[str] | None = None
) -> int:
    """The exit code of a training script: that of its run, 2 for a mistake in what was asked, 1 for a run that broke.

    Args:
        description: the script's docstring, shown by ``--help``.
        sections: of the recipe, name → dataclass; "training" is `RunArguments`.
        run: (recipe, sections filled from it, resume, accelerator) → how the run ended.
        command_line: instead of the process's own.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # reading processes are forked
    options = parse_command_line(description, command_line)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        recipe = read_recipe(options.config, options.set)
        filled = build_sections(recipe, sections, str(options.config))
        arguments: RunArguments = filled["training"]
        accelerator = make_accelerator(arguments)
        if not accelerator.is_main_process:
            logging.getLogger().setLevel(logging.ERROR)
        whole_recipe = {name: asdict(section) for name, section in filled.items()}  # with what it leaves to defaults
        result = run(whole_recipe, filled, options.resume, accelerator)
    except ValueError as error:
        logger.debug("where it was found", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        return 2
    except (
        UnwrittenError,
        LostProcessError,
        NoRowsError,
        FloatingPointError,
    ) as error:  # they tell what happened and what to do
        logger.debug("where it happened", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        return 1
    end(accelerator)
    if accelerator.is_main_process:
        sys.stdout.write(_summary(result, arguments))
    return result.exit_code


def parse_command_line(description: str, command_line: list[str] | None = None) -> argparse.Namespace:
    """``--config``, ``--set`` and ``--resume``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="recipe, a YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one value of the recipe"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        type=Path,
        metavar="CHECKPOINT",
        help="continue from the newest complete checkpoint of the output folder, or from the one given",
    )
    return parser.parse_args(command_line)


def _summary(result: TrainResult, arguments: RunArguments) -> str:
    lines = [f"{result.status} at step {result.step}: {result.model_path or arguments.output_dir}"]
    lines += [f"  {name} {value:.4g}" for name, value in result.metrics.items()]
    return "\n".join(lines) + "\n"
