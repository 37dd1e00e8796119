"""Two protocols of zero-shot scoring side by side: a window for each anatomy (published), windows shared (ours).

    python benchmarks/ct_zero_shot.py --scans 2
    python benchmarks/ct_zero_shot.py --model runs/fvlm_demo/model --scans 40 --window 48 96 96

Scans are drawn torsos with known findings, brought to the spacing that the processor asks for. Told are the passes of
the vision tower and the seconds a scan, how far the probabilities differ, and the area under the ROC curve of every
finding by either protocol. Without --model the network has the published size and random weights: its times are real,
its scores mean nothing but how far the protocols differ.
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
from medclip_hf.data.anatomy import merge_labels
from medclip_hf.data.geometry import Volume, resample, stored_hounsfield
from medclip_hf.data.phantoms.torsos import TorsoSettings, draw_torso, plan_patient
from medclip_hf.evaluation.ct_zero_shot import (
    CT_RATE_FINDINGS,
    PUBLISHED_WINDOW_DHW,
    FindingEmbeddings,
    embed_findings,
    plan_windows,
    score_scan,
)
from medclip_hf.evaluation.metrics import auroc

PROTOCOLS = ("published", "shared")


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
    window = tuple(arguments.window)
    names = [finding.name for finding in findings.findings]
    labels: list[list[bool]] = []
    scores: dict[str, list[list[float]]] = {protocol: [] for protocol in PROTOCOLS}
    seconds: dict[str, list[float]] = {protocol: [] for protocol in PROTOCOLS}
    windows: dict[str, list[int]] = {protocol: [] for protocol in PROTOCOLS}
    for present, volume, mask in drawn_scans(arguments.scans, arguments.seed, image_processor):
        labels.append([name in present for name in names])
        for protocol in PROTOCOLS:
            start = time.perf_counter()
            found = score_scan(model, volume, mask, findings, protocol=protocol, window_size_dhw=window)
            seconds[protocol].append(time.perf_counter() - start)
            scores[protocol].append([found[name] for name in names])
            planned = plan_windows(mask.numpy(), model.config.num_anatomies, protocol, window)
            windows[protocol].append(len(planned))
    report(names, np.array(labels), {key: np.array(rows) for key, rows in scores.items()}, seconds, windows)


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
    """(findings, volume, mask) of one drawn torso a patient, as the model sees it."""
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
        yield torso.plan.findings, inputs["pixel_values"][0, 0], inputs["anatomy_mask"][0]


def report(
    names: list[str],
    labels: np.ndarray,
    scores: dict[str, np.ndarray],
    seconds: dict[str, list[float]],
    windows: dict[str, list[int]],
) -> None:
    """Print both protocols next to each other."""
    print(f"{len(labels)} scans, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| protocol | windows a scan | seconds a scan (median) |\n|---|---|---|")
    for protocol in PROTOCOLS:
        print(f"| {protocol} | {statistics.mean(windows[protocol]):.2f} | {statistics.median(seconds[protocol]):.2f} |")
    difference = np.abs(scores["published"] - scores["shared"])
    print(f"\nprobabilities differ by {np.nanmean(difference):.4f} on average, {np.nanmax(difference):.4f} at most\n")
    print("| finding | positives | AUC published | AUC shared |\n|---|---|---|---|")
    areas: dict[str, list[float]] = {protocol: [] for protocol in PROTOCOLS}
    for place, name in enumerate(names):
        found = {protocol: area(scores[protocol][:, place], labels[:, place]) for protocol in PROTOCOLS}
        if None in found.values():
            continue
        for protocol, value in found.items():
            areas[protocol].append(value)  # type: ignore[arg-type]
        print(f"| {name} | {labels[:, place].sum()} | {found['published']:.3f} | {found['shared']:.3f} |")
    if areas["published"]:
        means = {protocol: statistics.mean(values) for protocol, values in areas.items()}
        print(f"| mean | | {means['published']:.3f} | {means['shared']:.3f} |")


def area(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Area under the ROC curve over the scans that have a score; None where a class is missing."""
    has_score = ~np.isnan(scores)
    if len(set(labels[has_score])) < 2:
        return None
    return auroc(scores[has_score], labels[has_score])


if __name__ == "__main__":
    main()
