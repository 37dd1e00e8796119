r"""Make a model that `from_pretrained` loads out of a checkpoint that a training wrote in shards.

    python scripts/consolidate_checkpoint.py runs/stage2/checkpoints/checkpoint-00002000 runs/stage2/model-00002000

One process does it on any machine, whatever number of processes wrote the checkpoint, in the memory that the
weights take. Moments of the optimiser are left behind. A finished run needs no such step: its model lies in `final`.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

import medclip_hf
from medclip_hf.training.checkpoints import consolidate


def main(command_line: list[str] | None = None) -> int:
    """Consolidate as the command line says; 0, or 2 for a mistake in what was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint in shards")
    parser.add_argument("output", type=Path, help="folder of the model; must not exist")
    options = parser.parse_args(command_line)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    transformers_logging.disable_progress_bar()
    try:
        if options.output.exists():
            raise ValueError(f"{options.output} exists already. Name a new folder.")
        step = consolidate(options.checkpoint, options.output, empty_model)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{options.output}: the model after step {step}\n")
    return 0


def empty_model(folder: Path) -> PreTrainedModel:
    """A model of the configuration in `folder`, with weights as they came from memory.

    Raises:
        ValueError: no configuration of a model that this package or transformers knows.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no configuration of a known model: {error}") from error
    kind = getattr(medclip_hf, (config.architectures or [""])[0], None)
    with torch.device("cpu"):
        return AutoModel.from_config(config) if kind is None else kind(config)


if __name__ == "__main__":
    sys.exit(main())
