r"""Findings of a CT scan, each looked for inside its anatomy: a probability for each, and a picture of the highest.

    make demo    # once: trains the small model that is used here by default
    python examples/ct_scoring.py --output finding.png
    python examples/ct_scoring.py --model OWNER/NAME --scan scan.nii.gz --labels totalsegmentator.nii.gz

Without --scan the CT of a drawn patient with known findings is written to disk and read like any other. Labels are
TotalSegmentator's, on the scan's grid.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

from transformers import AutoModel, AutoProcessor

import medclip_hf  # noqa: F401 - makes the Auto classes know the models
from medclip_hf.data.ct.geometry import GeometryContract
from medclip_hf.data.ct.reading import CTScan, load_ct
from medclip_hf.data.phantoms.torso_files import write_ct_rate
from medclip_hf.data.phantoms.torsos import TorsoSettings
from medclip_hf.evaluation.ct_zero_shot import Finding, embed_findings, score_scan
from medclip_hf.explain import save_png
from medclip_hf.explain.ct_overlay import ScoredFinding, draw_ct_finding

DEMO_MODEL = "demo_output/fvlm/per_anatomy_calibrated/final"
# Prompts as the reports of training word them. For weights trained on CT-RATE: medclip_hf.evaluation.ct_zero_shot.
FINDINGS = (
    Finding("Emphysema", "lung", "Aeration of both lungs is natural.", "Emphysema in both lungs."),
    Finding("Pleural effusion", "lung", "Pleural effusion was not observed.", "Pleural effusion on the left."),
    Finding("Cardiomegaly", "heart", "The heart is not enlarged.", "Cardiomegaly."),
    Finding("Hiatal hernia", "esophagus", "The esophagus is unremarkable.", "Hiatal hernia."),
)
DRAWN = TorsoSettings(
    in_plane_size=48, slice_spacing_mm=(6.0, 8.0), prevalence=1.0, max_reconstructions=1, findings=("cardiomegaly",)
)


def main(command_line: list[str] | None = None) -> int:
    """Read, score, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL, help="folder or Hub name of an fVLM")
    parser.add_argument("--revision", help="commit of a model on the Hub")
    parser.add_argument("--scan", type=Path, help="NIfTI file or DICOM folder; a drawn patient by default")
    parser.add_argument("--labels", type=Path, help="TotalSegmentator v2 label file on the scan's grid")
    parser.add_argument("--output", type=Path, default=Path("finding.png"))
    options = parser.parse_args(command_line)

    try:
        model = AutoModel.from_pretrained(options.model, revision=options.revision).eval()
        processor = AutoProcessor.from_pretrained(options.model, revision=options.revision)
        # Orientation, spacing and Hounsfield window travel with the weights; what does not fit them is refused.
        contract = GeometryContract(spacing_mm_dhw=tuple(processor.image_processor.spacing_mm_dhw))
        scan = read_or_draw(options.scan, options.labels, contract, model.config.anatomies)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2

    inputs = processor(images=scan.image.values, anatomy_mask=scan.anatomy_mask.values)
    scores = score_scan(
        model,
        inputs["pixel_values"][0, 0],
        inputs["anatomy_mask"][0],
        embed_findings(model, processor.tokenizer, FINDINGS),
        window_size_dhw=tuple(model.config.vision_config.image_size_dhw),
    )
    for finding in FINDINGS:
        score = scores[finding.name]
        print(f"{'not in the scan' if math.isnan(score) else f'{score:.3f}':>15}  {finding.name} ({finding.anatomy})")

    highest = max(FINDINGS, key=lambda finding: -1.0 if math.isnan(scores[finding.name]) else scores[finding.name])
    picture = draw_ct_finding(
        scan.image.values,
        scan.anatomy_mask.values == list(model.config.anatomies).index(highest.anatomy) + 1,
        ScoredFinding(highest.name, highest.anatomy, scores[highest.name]),
        spacing_mm_dhw=scan.image.spacing_mm_dhw,
    )
    save_png(picture, options.output)
    print(f"Picture of {highest.name}: {options.output}")
    return 0


def read_or_draw(path: Path | None, labels: Path | None, contract: GeometryContract, anatomies: list[str]) -> CTScan:
    """The scan in the model's geometry, with its anatomies."""
    if path is not None:
        if labels is None:
            raise ValueError("--scan needs --labels: run TotalSegmentator on the scan first.")
        return load_ct(path, contract, labels_path=labels, anatomies=anatomies)
    with tempfile.TemporaryDirectory() as folder:
        written = write_ct_rate(folder, 1, split="valid", seed=4, settings=DRAWN)[0]
        label_file = next(Path(folder, "dataset", "ts_seg").rglob(written.name))
        print(f"A drawn patient with {', '.join(DRAWN.findings)}")
        return load_ct(written, contract, labels_path=label_file, anatomies=anatomies)


if __name__ == "__main__":
    sys.exit(main())
