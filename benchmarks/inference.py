"""Inference at scale: what the pipeline costs beside the bare tower, and what fewer bits cost in AUC.

    OMP_NUM_THREADS=1 python benchmarks/inference.py throughput --pictures 64 --rounds 3
    OMP_NUM_THREADS=1 python benchmarks/inference.py throughput --pictures 512 --elsewhere-ms 40 --workers 2 --rounds 2
    OMP_NUM_THREADS=1 python benchmarks/inference.py scans --scans 4 --rounds 1
    OMP_NUM_THREADS=1 python benchmarks/inference.py precision --conceptclip demo_output/conceptclip/stage2/final
    OMP_NUM_THREADS=1 python benchmarks/inference.py precision \
        --fvlm demo_output/fvlm/per_anatomy_calibrated/final --prepared demo_output/fvlm/prepared

"throughput" draws JPEG pictures, embeds them with a random SigLIP tower through the very steps of scripts/embed.py
(reading, decoding, resizing, tower, shards on disk) and, by turns in the same process, runs the bare tower on pixels
that lie ready in memory; told is how the time divides into tower, waiting for data and the driver, by the clock and by
processor time. With --elsewhere-ms a stand-in that sleeps takes the tower's place: on a busy machine a tower on the CPU
competes with its own loader workers, which one on an accelerator does not. With --own-cores the loaders run on other
cores than the tower. "scans" does the same for drawn CT scans with an fVLM of the published size, and tells what each
part of a scan's way takes. "precision" scores drawn figures, or the held-out scans of the demo, with the model as it
is, in bfloat16, in int8 and, for ConceptCLIP's vision tower, in int8 ONNX; the difference of the mean AUC to float32 is
paired, its interval a bootstrap over figures or patients.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedding_throughput import load_script, measure_pictures, measure_scans
from numpy.typing import NDArray
from transformers import AutoModel, AutoProcessor
from transformers.utils.logging import disable_progress_bar

from medclip_hf.data.ct.scan_index import read_scan_rows
from medclip_hf.data.phantoms.figures import draw_figures
from medclip_hf.evaluation.comparisons import paired_difference
from medclip_hf.evaluation.ct_zero_shot import CT_RATE_FINDINGS, embed_findings, score_scan
from medclip_hf.evaluation.quantization import quantize_linear_layers
from medclip_hf.evaluation.zero_shot import embed_classes, published_share_of_patches, zero_shot_scores
from medclip_hf.hub.export_onnx import export_towers, quantize_onnx
from medclip_hf.training.scan_datasets import read_stored_scan

Scores = NDArray[np.float64]


def main() -> None:
    """One of both measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    throughput = parts.add_parser("throughput")
    throughput.add_argument("--pictures", type=int, default=64)
    throughput.add_argument("--side", type=int, default=512, help="of the drawn JPEG files, pixels")
    throughput.add_argument("--image-size", type=int, default=224, help="of the tower")
    throughput.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    throughput.add_argument("--own-cores", action="store_true", help="loaders on other cores than the tower")
    throughput.add_argument("--rounds", type=int, default=3)
    throughput.add_argument("--batch-size", type=int, default=16)
    throughput.add_argument("--layers", type=int, default=6)
    throughput.add_argument("--elsewhere-ms", type=float, help="a stand-in that waits so long for a picture instead")
    throughput.add_argument("--patches", action="store_true", help="729 vectors of 1152 a picture, of the stand-in")
    throughput.set_defaults(measure=measure_pictures)
    scans = parts.add_parser("scans")
    scans.add_argument("--scans", type=int, default=4)
    scans.add_argument("--workers", type=int, nargs="+", default=[1])
    scans.add_argument("--rounds", type=int, default=1)
    scans.add_argument("--tiny", action="store_true", help="a tiny model on coarse scans, to try the script")
    scans.set_defaults(measure=measure_scans)
    precision = parts.add_parser("precision")
    precision.add_argument("--conceptclip", type=Path)
    precision.add_argument("--figures", type=int, default=1000)
    precision.add_argument("--seed", type=int, default=10_000, help="of figures that no training saw")
    precision.add_argument("--fvlm", type=Path)
    precision.add_argument("--prepared", type=Path, help="folder of scans with labels; its validation split is scored")
    precision.set_defaults(measure=measure_precision)
    disable_progress_bar()
    arguments = parser.parse_args()
    arguments.measure(arguments)


# Precision -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """What a model in one precision made of the test set.

    Args:
        name: of the precision.
        scores: (N, K).
        seconds: that took, from pictures or volumes in memory to scores.
    """

    name: str
    scores: Scores
    seconds: float


def measure_precision(arguments: argparse.Namespace) -> None:
    """AUC by precision, with its paired loss."""
    if arguments.conceptclip is None and arguments.fvlm is None:
        raise SystemExit("name --conceptclip, or --fvlm and --prepared")
    if arguments.conceptclip is not None:
        measure_conceptclip(arguments.conceptclip, arguments.figures, arguments.seed)
    if arguments.fvlm is not None:
        measure_fvlm(arguments.fvlm, arguments.prepared)


def in_precision(folder: Path, precision: str) -> Any:
    """The model of a folder in float32, bfloat16 or int8."""
    model = AutoModel.from_pretrained(folder).eval()
    if precision == "bfloat16":
        return model.to(torch.bfloat16)
    if precision == "int8":
        quantize_linear_layers(model)
    return model


def measure_conceptclip(folder: Path, count: int, seed: int) -> None:
    """The published mixed score on drawn figures."""
    demo = load_script("demo_conceptclip")
    processor = AutoProcessor.from_pretrained(folder)
    figures = list(draw_figures(seed, "test", count))
    labels = np.array([[name in figure.findings for name in demo.CLASS_NAMES] for figure in figures])
    pixels = processor(images=[figure.image for figure in figures])["pixel_values"]
    found = []
    for precision in ("float32", "bfloat16", "int8"):
        model = in_precision(folder, precision)
        classes = embed_classes(model, processor, demo.CLASS_NAMES, demo.TEMPLATES).averaged()
        found.append(score_pictures(precision, model, classes, pixels, model_forward(model)))
    reference = AutoModel.from_pretrained(folder).eval()
    classes = embed_classes(reference, processor, demo.CLASS_NAMES, demo.TEMPLATES).averaged()
    with tempfile.TemporaryDirectory() as onnx:
        export_towers(reference, onnx)
        for name, file in (("ONNX float32", "vision_model.onnx"), ("ONNX int8", "vision_model.int8.onnx")):
            if "int8" in file:
                quantize_onnx(Path(onnx) / "vision_model.onnx", Path(onnx) / file)
            found.append(score_pictures(name, reference, classes, pixels, onnx_forward(Path(onnx) / file)))
    tell(f"ConceptCLIP, {count} drawn figures", found, labels, demo.CLASS_NAMES, groups=None)


def model_forward(model: Any) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Image and patch vectors by the model."""

    def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = model(pixel_values=pixels, return_logits=False)
        return outputs.image_embeds.float(), outputs.patch_embeds.float()

    return forward


def onnx_forward(path: Path) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The same by an exported file, on as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image, patches = session.run(["image_embeds", "patch_embeds"], {"pixel_values": pixels.numpy()})
        return torch.from_numpy(image), torch.from_numpy(patches)

    return forward


@torch.no_grad()
def score_pictures(
    name: str,
    model: Any,
    classes: tuple[torch.Tensor, Any],
    pixels: torch.Tensor,
    forward: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> Scored:
    """Scores of all figures, and the seconds that the vision tower took."""
    seconds, parts = 0.0, []
    for batch in pixels.split(32):
        start = time.perf_counter()
        image_embeds, patch_embeds = forward(batch)
        seconds += time.perf_counter() - start
        scores = zero_shot_scores(
            image_embeds,
            classes[0].float(),
            model.logit_scale.exp().float(),
            patch_embeds,
            classes[1].float(),
            model.concept_logit_scale.exp().float(),
            activation="sigmoid",
            top_patches=published_share_of_patches(patch_embeds.shape[1]),
        )
        parts.append(scores.mixed_scores)
    return Scored(name, np.concatenate(parts).astype(np.float64), seconds)


def measure_fvlm(folder: Path, prepared: Path) -> None:
    """Probabilities of the drawn findings in the held-out scans, one scan a patient and study."""
    prompts = load_script("demo_fvlm").PROMPTS
    findings = [
        replace(finding, absent=prompts[finding.name][0], present=prompts[finding.name][1])
        for finding in CT_RATE_FINDINGS
        if finding.name in prompts
    ]
    processor = AutoProcessor.from_pretrained(folder)
    rows = [row for row in read_scan_rows(prepared, "validation") if row.labels]
    scans = []
    for row in rows:
        _, image, mask = read_stored_scan(prepared / row.store_path, processor.image_processor.anatomies)
        inputs = processor(images=image, anatomy_mask=mask, do_crop=False)
        scans.append((inputs["pixel_values"][0, 0], inputs["anatomy_mask"][0]))
    labels = np.array([[dict(row.labels)[finding.name] for finding in findings] for row in rows])
    found = []
    for precision in ("float32", "bfloat16", "int8"):
        model = in_precision(folder, precision)
        asked = embed_findings(model, processor.tokenizer, findings)
        asked = replace(asked, text_embeds=asked.text_embeds.float())
        window = tuple(model.config.vision_config.image_size_dhw)
        start = time.perf_counter()
        scores = [list(score_scan(model, *scan, asked, window_size_dhw=window).values()) for scan in scans]
        found.append(Scored(precision, np.nan_to_num(np.array(scores)), time.perf_counter() - start))
    tell(
        f"fVLM, {len(scans)} drawn scans",
        found,
        labels,
        [finding.name for finding in findings],
        groups=[row.patient_id for row in rows],
    )


def tell(title: str, found: list[Scored], labels: NDArray[Any], names: list[str], groups: Any) -> None:
    """One line a precision: mean AUC, its paired difference to the first, and time."""
    print(title)
    for scored in found:
        compared = paired_difference(found[0].scores, scored.scores, labels, names, groups=groups)
        largest = np.abs(scored.scores - found[0].scores).max()
        print(
            f"  {scored.name:<14} AUC {compared.second:.4f}   difference {compared.difference.as_text('{:+.4f}')}   "
            f"largest change of a score {largest:.1e}   {len(labels) / scored.seconds:7.1f} a second"
        )


if __name__ == "__main__":
    main()
