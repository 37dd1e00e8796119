"""Zero-shot scoring side by side: a pass for each anatomy (release), its windows embedded once, windows shared.

    python benchmarks/ct_zero_shot.py --scans 2
    python benchmarks/ct_zero_shot.py --model runs/fvlm_demo/model --scans 40 --window 48 96 96

"release" scores one anatomy after the other, as the release does; "published" gives the same numbers and embeds
windows that coincide once; "shared" is the protocol of this package. Scans are drawn torsos with known findings, of
the spacing that the processor asks for. Told are the passes of the vision tower and the seconds a scan, how far the
probabilities differ from the release's, and the area under the ROC curve of every finding. Without --model the network
has the published size and random weights: its times are real, its scores mean nothing but how far the ways differ.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoProcessor

from medclip_hf import FVLMConfig, FVLMImageProcessor, FVLMModel
from medclip_hf.data.ct.anatomy import merge_labels
from medclip_hf.data.ct.geometry import Volume, resample, stored_hounsfield
from medclip_hf.data.phantoms.torso_findings import FINDINGS
from medclip_hf.data.phantoms.torsos import TorsoSettings, draw_torso, plan_patient
from medclip_hf.evaluation.ct_zero_shot import (
    CT_RATE_FINDINGS,
    PUBLISHED_WINDOW_DHW,
    FindingEmbeddings,
    Protocol,
    Size,
    embed_findings,
    plan_windows,
    score_scan,
)
from medclip_hf.evaluation.metrics import auroc

PROTOCOLS: tuple[Protocol, ...] = ("published", "shared")
WAYS = ("release", *PROTOCOLS)


def main() -> None:
    """Draw, score by both protocols, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a trained model with its processor")
    parser.add_argument("--scans", type=int, default=2)
    parser.add_argument("--window", type=int, nargs=3, default=PUBLISHED_WINDOW_DHW, metavar=("D", "H", "W"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=10_000, help="of the drawn patients; choose one not trained on")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, image_processor, findings = load(arguments.model)
    depth, height, width = arguments.window
    names = [finding.name for finding in findings.findings]
    labels: list[list[bool]] = []
    scores: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    passes: dict[str, list[int]] = {way: [] for way in WAYS}
    for present, volume, mask in drawn_scans(arguments.scans, arguments.seed, image_processor):
        labels.append([name in present for name in names])
        for way in WAYS:
            start = time.perf_counter()
            found, num_passes = score(way, model, volume, mask, findings, (depth, height, width))
            seconds[way].append(time.perf_counter() - start)
            scores[way].append([found[name] for name in names])
            passes[way].append(num_passes)
    report(names, np.array(labels), {way: np.array(rows) for way, rows in scores.items()}, seconds, passes)


def score(
    way: str, model: Any, volume: Tensor, mask: Tensor, findings: FindingEmbeddings, window: Size
) -> tuple[dict[str, float], int]:
    """Probabilities and the number of passes of the vision tower."""
    protocol: Protocol = "shared" if way == "shared" else "published"
    if way != "release":
        num_passes = len(plan_windows(mask.numpy(), model.config.num_anatomies, protocol, window))
        return score_scan(model, volume, mask, findings, protocol=protocol, window_size_dhw=window), num_passes
    scores: dict[str, float] = {}
    ids = [number for number in mask.unique().tolist() if number]
    for number in ids:
        alone = torch.where(mask == number, mask, 0)
        found = score_scan(model, volume, alone, findings, window_size_dhw=window)
        scores |= {name: value for name, value in found.items() if not np.isnan(value) or name not in scores}
    return scores, len(ids)


def load(folder: Path | None) -> tuple[Any, FVLMImageProcessor, FindingEmbeddings]:
    """A trained model with its prompts, or one of the published size with random weights and random prompts."""
    if folder is not None:
        model = AutoModel.from_pretrained(folder).eval()
        processor = AutoProcessor.from_pretrained(folder)
        known = [finding for finding in CT_RATE_FINDINGS if finding.anatomy in model.config.anatomies]
        return model, processor.image_processor, embed_findings(model, processor.tokenizer, known)
    torch.manual_seed(0)
    model = FVLMModel(FVLMConfig()).eval()
    for head in model.anatomy_heads:
        nn.init.normal_(head.query, std=0.5)
    prompts = nn.functional.normalize(torch.randn(len(CT_RATE_FINDINGS), 2, model.config.projection_dim), dim=-1)
    places = [model.config.anatomies.index(finding.anatomy) for finding in CT_RATE_FINDINGS]
    return model, FVLMImageProcessor(), FindingEmbeddings(CT_RATE_FINDINGS, torch.tensor(places), prompts)


def drawn_scans(
    num_scans: int, seed: int, image_processor: FVLMImageProcessor
) -> Iterator[tuple[tuple[str, ...], Tensor, Tensor]]:
    """(findings under CT-RATE's names, volume, mask) of one drawn torso a patient, as the model sees it."""
    settings = TorsoSettings(max_studies=1, max_reconstructions=1)
    target = tuple(image_processor.spacing_mm_dhw)
    for patient in range(num_scans):
        torso = draw_torso(plan_patient(seed, patient, settings)[0], settings)
        depth, height, width = torso.spacing_mm_dhw
        affine = np.diag([-width, -height, depth, 1.0])
        image = resample(Volume(torso.image_hu, affine, "drawn"), target, "trilinear")
        labels = resample(Volume(torso.labels, affine, "drawn"), target, "nearest")
        mask = merge_labels(labels.values, "v2", image_processor.anatomies)
        inputs = image_processor(stored_hounsfield(image.values), mask, orientation=image_processor.orientation)
        present = tuple(FINDINGS[name].ct_rate_name or "" for name in torso.plan.findings)
        yield present, inputs["pixel_values"][0, 0], inputs["anatomy_mask"][0]


def report(
    names: list[str],
    labels: np.ndarray,
    scores: dict[str, np.ndarray],
    seconds: dict[str, list[float]],
    passes: dict[str, list[int]],
) -> None:
    """Print the three ways next to each other."""
    print(f"{len(labels)} scans, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| way | passes a scan | seconds a scan (median) | differs from the release: mean, most |\n|---|---|---|---|")
    for way in WAYS:
        difference = np.abs(scores["release"] - scores[way])
        told = f"{np.nanmean(difference):.1e}, {np.nanmax(difference):.1e}"
        print(f"| {way} | {statistics.mean(passes[way]):.2f} | {statistics.median(seconds[way]):.2f} | {told} |")
    print("\n| finding | positives | " + " | ".join(f"AUC {way}" for way in WAYS) + " |\n|---|---|---|---|---|")
    areas: list[list[float]] = []
    for place, name in enumerate(names):
        found = [area(scores[way][:, place], labels[:, place]) for way in WAYS]
        known = [value for value in found if value is not None]
        if len(known) == len(WAYS):
            areas.append(known)
            print(f"| {name} | {labels[:, place].sum()} | " + " | ".join(f"{value:.3f}" for value in known) + " |")
    if areas:
        print("| mean | | " + " | ".join(f"{value:.3f}" for value in np.mean(areas, axis=0)) + " |")


def area(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Area under the ROC curve over the scans that have a score; None where a class is missing."""
    has_score = ~np.isnan(scores)
    if len(set(labels[has_score])) < 2:
        return None
    return auroc(scores[has_score], labels[has_score])


if __name__ == "__main__":
    main()
