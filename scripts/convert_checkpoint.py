r"""Convert official weights of ConceptCLIP and fVLM to folders for `from_pretrained`, and back.

    python scripts/convert_checkpoint.py official --checkpoint model.safetensors --tokenizer BERT --output conceptclip
    python scripts/convert_checkpoint.py official --checkpoint model.pth --tokenizer CXR-BERT --output fvlm
    python scripts/convert_checkpoint.py towers --model conceptclip --vision siglip --text BERT --output start
    python scripts/convert_checkpoint.py towers --model fvlm --vision mae_vit_base.pth --text CXR-BERT --output start
    python scripts/convert_checkpoint.py back --model fvlm --output model.pth
    python scripts/convert_checkpoint.py check --model conceptclip

Which model a checkpoint is of follows from its keys. Files of PyTorch are read as plain tensors, never as code. The
folder holds conversion_report.json (every key: used, dropped with its reason, or made up) and conversion_check.json
(outputs for seeded inputs), which `check` computes again and compares.
"""

import argparse
import logging
import sys
from pathlib import Path

import medclip_hf  # noqa: F401 - makes the Auto classes know both models
from medclip_hf.hub.convert import CHECK_NAME, convert_checkpoint, convert_towers, export_official, read_object
from medclip_hf.hub.convert_check import check_folder, compare_checks
from medclip_hf.pipelines.pipeline_saving import add_pipelines


def parse_command_line(command_line: list[str] | None) -> argparse.Namespace:
    """The command line, or what stands for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    official = verbs.add_parser("official", help="official weights -> folder")
    official.add_argument("--checkpoint", type=Path, required=True, help=".safetensors, .pt, .pth or their folder")
    official.add_argument("--without-processor", action="store_true", help="weights and configuration alone")
    towers = verbs.add_parser("towers", help="pre-trained towers -> folder to start training from")
    towers.add_argument("--model", choices=("conceptclip", "fvlm"), required=True)
    towers.add_argument("--vision", required=True, help="folder or Hub name of a SigLIP; file of an MAE or ViT encoder")
    towers.add_argument("--text", required=True, help="folder or Hub name of a BERT")
    towers.add_argument("--patch-embedding", choices=("random", "inflated"), default="random", help="of fVLM")
    for verb in (official, towers):
        verb.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
        verb.add_argument("--tokenizer", help="folder or Hub name; default: beside the checkpoint or text tower")
        verb.add_argument("--config", type=Path, help="JSON with fields of the configuration that the weights hide")
    back = verbs.add_parser("back", help="folder -> official weights")
    back.add_argument("--model", type=Path, required=True, help="folder of a saved model")
    back.add_argument("--output", type=Path, required=True, help=".safetensors, .pt or .pth")
    check = verbs.add_parser("check", help="compute the self-check of a folder again and compare")
    check.add_argument("--model", type=Path, required=True, help="folder that a conversion wrote")
    return parser.parse_args(command_line)


def main(command_line: list[str] | None = None) -> int:
    """Convert; 0 if it is done, 1 if a check differs, 2 for a mistake in what was asked."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse_command_line(command_line)
    try:
        return run(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def run(options: argparse.Namespace) -> int:
    """Do what the verb says."""
    if options.verb == "check":
        return check(options.model)
    if options.verb == "back":
        report = export_official(options.model, options.output)
        print(f"{len(report['keys'])} weights of {report['architecture']}: {options.output}")
        return 0
    config = None if options.config is None else read_object(options.config)
    if options.verb == "towers":
        report = convert_towers(
            options.output,
            architecture=options.model,
            vision=options.vision,
            text=options.text,
            config=config,
            tokenizer=options.tokenizer,
            patch_embedding=options.patch_embedding,
        )
        add_pipelines(options.output)
        num_used = sum(map(len, report["used"].values()))
        print(f"{num_used} weights of the towers, {len(report['made'])} fresh: {options.output}")
        return 0
    report = convert_checkpoint(
        options.checkpoint,
        options.output,
        tokenizer=options.tokenizer,
        config=config,
        with_processor=not options.without_processor,
    )
    add_pipelines(options.output)
    counts = report["num_keys"]
    print(f"{report['architecture']}: {counts['used']} keys used, {counts['dropped']} dropped: {options.output}")
    return 0


def check(folder: Path) -> int:
    """Compare the folder's outputs with those that its conversion recorded."""
    record = folder / CHECK_NAME
    if not record.is_file():
        raise ValueError(f"{folder} has no {CHECK_NAME}: name a folder that this script wrote.")
    problems = compare_checks(check_folder(folder), read_object(record))
    print("\n".join(problems) or f"{folder} answers as recorded")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
