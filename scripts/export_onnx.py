r"""Export the towers of a ConceptCLIP or fVLM to ONNX, check them against the model, and on request make int8 files.

    python scripts/export_onnx.py --model runs/conceptclip/final --output onnx
    python scripts/export_onnx.py --model runs/fvlm/final --size 112 288 352 --output onnx --int8

The processor is saved beside the files. Needs pip install 'medclip-hf[onnx]'. For research only: no medical device.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

import medclip_hf  # noqa: F401 - makes the Auto classes know both models
from medclip_hf.hub.export_onnx import export_towers, quantize_onnx, require_onnx
from medclip_hf.hub.loading import load_saved


def parse_command_line(command_line: list[str] | None) -> argparse.Namespace:
    """The command line, or what stands for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name")
    parser.add_argument("--revision", help="of a model on the Hub")
    parser.add_argument("--output", type=Path, required=True, help="folder of the files")
    parser.add_argument("--size", type=int, nargs=3, metavar=("D", "H", "W"), help="of volumes, in voxels")
    parser.add_argument("--int8", action="store_true", help="also write <tower>.int8.onnx")
    return parser.parse_args(command_line)


def main(command_line: list[str] | None = None) -> int:
    """Export; 0 if every file gives what the model gives, 2 otherwise."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    disable_progress_bar()
    try:
        run(parse_command_line(command_line))
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Load, export, quantise."""
    require_onnx()
    model, processor = load_saved(options.model, revision=options.revision, dtype=torch.float32)
    for name, difference in export_towers(model, options.output, size_dhw=options.size).items():
        print(f"{options.output / name}.onnx: differs from the model by at most {difference:.1e}")
        if options.int8:
            quantize_onnx(options.output / f"{name}.onnx", options.output / f"{name}.int8.onnx")
    processor.save_pretrained(options.output)


if __name__ == "__main__":
    sys.exit(main())
