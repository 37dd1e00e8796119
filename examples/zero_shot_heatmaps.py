r"""Which finding is in a picture, and where: zero-shot scores and one heatmap for each prompt.

    make demo    # once: trains the small model that is used here by default
    python examples/zero_shot_heatmaps.py --output heatmaps.png
    python examples/zero_shot_heatmaps.py --model OWNER/NAME --image chest.png --findings edema fracture

Without --image a figure is drawn whose findings are known, and their true regions are outlined.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

import medclip_hf  # noqa: F401 - makes the Auto classes know the models
from medclip_hf.data.phantoms.figures import draw_figure
from medclip_hf.data.phantoms.findings import FINDINGS
from medclip_hf.evaluation.zero_shot import classify_images, published_share_of_patches
from medclip_hf.explain import draw_concept_panel, save_png

DEMO_MODEL = "demo_output/conceptclip/stage2/final"
TEMPLATES = ("{}", "showing {}.", "{} can be seen.")


def main(command_line: list[str] | None = None) -> int:
    """Score, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL, help="folder or Hub name of a ConceptCLIP")
    parser.add_argument("--revision", help="commit of a model on the Hub")
    parser.add_argument("--image", type=Path, help="PNG, JPEG or TIFF; a drawn figure by default")
    parser.add_argument("--findings", nargs="+", default=[finding.name for finding in FINDINGS])
    parser.add_argument("--output", type=Path, default=Path("heatmaps.png"))
    options = parser.parse_args(command_line)

    try:
        model = AutoModel.from_pretrained(options.model, revision=options.revision).eval()
        processor = AutoProcessor.from_pretrained(options.model, revision=options.revision)
        image, outlines = read_or_draw(options.image, options.findings)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2

    # Zero-shot: the image against one prompt for each finding, as a whole and by its best patches.
    num_patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    scores = classify_images(
        model,
        processor,
        [image],
        options.findings,
        TEMPLATES,
        activation="sigmoid",
        top_patches=published_share_of_patches(num_patches),
    )
    # Where: the similarity of every patch with every finding's name.
    with torch.no_grad():
        concepts = model.get_concept_embeds(**processor(text=options.findings)).flatten(0, 1)  # (K, D)
        maps = model.get_concept_maps(**processor(images=image), concept_embeds=concepts)[0]  # (K, rows, columns)

    ranked = sorted(zip(options.findings, scores.mixed_scores[0].tolist(), strict=True), key=lambda pair: -pair[1])
    for name, score in ranked:
        print(f"{score:.3f}  {name}{'  (drawn here)' if outlines.get(name) is not None else ''}")
    panel = draw_concept_panel(image, maps, options.findings, outlines=[outlines.get(n) for n in options.findings])
    save_png(panel, options.output)
    print(f"Heatmaps: {options.output}")
    return 0


def read_or_draw(path: Path | None, findings: list[str]) -> tuple[Image.Image, dict]:
    """The picture, and the true region of each of the findings in it where that is known."""
    if path is not None:
        return Image.open(path).convert("RGB"), {}
    figure = draw_figure(seed=0, split="test", index=3)
    return Image.fromarray(figure.image), dict(zip(figure.findings, figure.masks, strict=True))


if __name__ == "__main__":
    sys.exit(main())
