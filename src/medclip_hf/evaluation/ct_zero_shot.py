"""Zero-shot diagnosis of CT scans with fVLM: one probability for each finding, from the anatomy where it occurs.

A scan is cut into windows, each window is embedded, and each finding compares its anatomy's embedding with a pair of
prompts (absent, present). Two protocols cut the windows:

    published   one window for each anatomy, centred on it; up to four passes of the vision tower a scan
    shared      windows hold as many anatomies as fit whole; mostly one or two passes a scan

The vision tower sees the voxels of a window and not its mask, so published windows that coincide are embedded once, to
the same numbers. They do wherever the scan, cropped to its anatomies, is no larger than the window.
"""

import csv
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)

Protocol = Literal["published", "shared"]
Size = tuple[int, int, int]

# Smallest window of the published evaluation, voxels (depth, height, width): taller than the training crops.
PUBLISHED_WINDOW_DHW: Size = (112, 288, 352)
# Thresholds of the published operating point.
_NUM_THRESHOLDS = 100


@dataclass(frozen=True)
class Finding:
    """A finding, the anatomy in which it is looked for, and its prompts."""

    name: str
    anatomy: str
    absent: str
    present: str


def _finding(name: str, anatomy: str, word: str | None = None) -> Finding:
    """A finding with prompts of the published pattern: "X." and "Not X."."""
    return Finding(name, anatomy, f"Not {word or name}.", f"{word or name}.")


# The 16 findings of CT-RATE that the release scores, with its prompts as of April 2025; names and order of the label
# file. The release leaves out "Medical material" and "Lymphadenopathy".
CT_RATE_FINDINGS: tuple[Finding, ...] = (
    _finding("Arterial wall calcification", "aorta"),
    _finding("Cardiomegaly", "heart"),
    _finding("Pericardial effusion", "heart"),
    _finding("Coronary artery wall calcification", "heart"),
    _finding("Hiatal hernia", "esophagus"),
    _finding("Emphysema", "lung"),
    _finding("Atelectasis", "lung", "Atelectatic"),
    _finding("Lung nodule", "lung", "Nodule"),
    _finding("Lung opacity", "lung", "Opacity"),
    _finding("Pulmonary fibrotic sequela", "lung", "Pulmonary fibrotic"),
    _finding("Pleural effusion", "lung"),
    _finding("Mosaic attenuation pattern", "lung"),
    _finding("Peribronchial thickening", "lung"),
    _finding("Consolidation", "lung"),
    _finding("Bronchiectasis", "lung"),
    _finding("Interlobular septal thickening", "lung"),
)

# Rad-ChestCT's abnormalities -> findings above; source: HLIP's public map. Calcification counts for two findings;
# mosaic attenuation has no counterpart.
RAD_CHESTCT_TO_CT_RATE: dict[str, tuple[str, ...]] = {
    "emphysema": ("Emphysema",),
    "atelectasis": ("Atelectasis",),
    "nodule": ("Lung nodule",),
    "opacity": ("Lung opacity",),
    "fibrosis": ("Pulmonary fibrotic sequela",),
    "pleural_effusion": ("Pleural effusion",),
    "bronchial_wall_thickening": ("Peribronchial thickening",),
    "consolidation": ("Consolidation",),
    "bronchiectasis": ("Bronchiectasis",),
    "septal_thickening": ("Interlobular septal thickening",),
    "cardiomegaly": ("Cardiomegaly",),
    "pericardial_effusion": ("Pericardial effusion",),
    "hernia": ("Hiatal hernia",),
    "calcification": ("Coronary artery wall calcification", "Arterial wall calcification"),
}


@dataclass(frozen=True)
class FindingEmbeddings:
    """Findings with their prompts in the joint space.

    Args:
        findings: F findings.
        anatomy_index: (F,) int64, place of each finding's anatomy in the model's list.
        text_embeds: (F, 2, D), L2-normalised: absent, present.
    """

    findings: tuple[Finding, ...]
    anatomy_index: Tensor
    text_embeds: Tensor


@dataclass(frozen=True)
class Window:
    """A part of a scan that is embedded at once.

    Args:
        start_dhw: first voxel.
        size_dhw: voxels, before padding.
        anatomies: 0-based places of the anatomies that are scored in it.
    """

    start_dhw: Size
    size_dhw: Size
    anatomies: tuple[int, ...]


# Windows ---------------------------------------------------------------------------------------------------------


def plan_windows(
    anatomy_mask: NDArray[Any],
    num_anatomies: int,
    protocol: Protocol = "published",
    window_size_dhw: Size = PUBLISHED_WINDOW_DHW,
) -> list[Window]:
    """The windows of a scan; anatomies that do not occur have none.

    "published": a window for each anatomy, centred on its box, of `window_size_dhw` or the extent of the box where that
    is larger, inside the scan. The release measures extents as last minus first voxel, so an anatomy larger than the
    window loses its last plane; that is kept here, as the published figures were obtained with it.

    "shared": anatomies in order of size join the first window in which their common box still fits, else they open one.
    An anatomy larger than the window gets a window that holds all of it.

    Args:
        anatomy_mask: (D, H, W) integer ids, 0 = background, i + 1 = anatomy i.
        num_anatomies: of the model; larger ids are background.
        protocol: see above.
        window_size_dhw: smallest window, voxels.

    Raises:
        ValueError: the mask is no volume of integers, or the protocol is unknown.
    """
    if anatomy_mask.ndim != 3 or anatomy_mask.dtype.kind not in "iu":
        raise ValueError(
            f"anatomy_mask must be a volume (depth, height, width) of integer ids, but {anatomy_mask.dtype} of shape "
            f"{anatomy_mask.shape} came."
        )
    boxes = anatomy_boxes(anatomy_mask, num_anatomies)
    depth, height, width = anatomy_mask.shape
    shape = (depth, height, width)
    if protocol == "published":
        return _merged(_published_window(box, anatomy, shape, window_size_dhw) for anatomy, box in boxes.items())
    if protocol == "shared":
        return _shared_windows(boxes, shape, window_size_dhw)
    raise ValueError(f"protocol is 'published' or 'shared', but {protocol!r} came.")


Box = tuple[tuple[int, int], ...]  # (first, last) voxel along each axis


def anatomy_boxes(anatomy_mask: NDArray[Any], num_anatomies: int) -> dict[int, Box]:
    """The box of each anatomy that occurs, by its place: (first, last) voxel along each axis.

    Args:
        anatomy_mask: (D, H, W) integer ids, 0 = background, i + 1 = anatomy i.
        num_anatomies: larger ids are passed over.

    Found from where runs of equal voxels along the last axis begin and end, of which there are a hundred times fewer
    than voxels.
    """
    is_start = np.ones(anatomy_mask.shape, dtype=bool)  # every row begins a run
    np.not_equal(anatomy_mask[..., 1:], anatomy_mask[..., :-1], out=is_start[..., 1:])
    starts = np.flatnonzero(is_start)
    ids = anatomy_mask.reshape(-1)[starts]
    depth, height, left = np.unravel_index(starts, anatomy_mask.shape)
    right = (np.append(starts[1:], anatomy_mask.size) - 1) % max(1, anatomy_mask.shape[-1])
    boxes: dict[int, Box] = {}
    for anatomy in range(num_anatomies):
        runs = np.flatnonzero(ids == anatomy + 1)
        if runs.size:
            ends = ((depth, depth), (height, height), (left, right))
            boxes[anatomy] = tuple((int(first[runs].min()), int(last[runs].max())) for first, last in ends)
    return boxes


def _published_window(box: Box, anatomy: int, shape: Size, window_size_dhw: Size) -> Window:
    """As the release cuts it: an extent is last minus first voxel, the centre is rounded down."""
    extents = [last - first for first, last in box]
    centre = [(first + last) // 2 for first, last in box]
    return _window_around(centre, extents, (anatomy,), shape, window_size_dhw)


def _merged(windows: Iterable[Window]) -> list[Window]:
    """Windows of the same voxels as one."""
    anatomies: dict[tuple[Size, Size], tuple[int, ...]] = {}
    for window in windows:
        place = (window.start_dhw, window.size_dhw)
        anatomies[place] = anatomies.get(place, ()) + window.anatomies
    return [Window(start, size, members) for (start, size), members in anatomies.items()]


def _shared_windows(boxes: dict[int, Box], shape: Size, window_size_dhw: Size) -> list[Window]:
    groups: list[tuple[list[int], Box]] = []
    for anatomy, box in sorted(boxes.items(), key=lambda item: -_volume(item[1])):
        for place, (members, common) in enumerate(groups):
            joined = _common_box(common, box)
            # A group that its first member makes larger than the window may hold what fits into that.
            limit = [max(size, last - first + 1) for size, (first, last) in zip(window_size_dhw, common, strict=True)]
            if all(last - first + 1 <= most for (first, last), most in zip(joined, limit, strict=True)):
                groups[place] = ([*members, anatomy], joined)
                break
        else:
            groups.append(([anatomy], box))
    return [_window_holding(box, tuple(sorted(members)), shape, window_size_dhw) for members, box in groups]


def _window_holding(box: Box, anatomies: tuple[int, ...], shape: Size, window_size_dhw: Size) -> Window:
    """A window that holds every voxel of the box."""
    extents = [last - first + 1 for first, last in box]
    centre = [first + extent // 2 for (first, _), extent in zip(box, extents, strict=True)]
    return _window_around(centre, extents, anatomies, shape, window_size_dhw)


def _window_around(
    centre: Sequence[int], extents: Sequence[int], anatomies: tuple[int, ...], shape: Size, window_size_dhw: Size
) -> Window:
    """A window of `extents`, at least `window_size_dhw`, around a voxel; moved and cut to lie inside the scan."""
    starts, sizes = [], []
    for middle, extent, smallest, length in zip(centre, extents, window_size_dhw, shape, strict=True):
        size = min(max(smallest, extent), length)
        starts.append(min(max(middle - size // 2, 0), length - size))
        sizes.append(size)
    return Window((starts[0], starts[1], starts[2]), (sizes[0], sizes[1], sizes[2]), anatomies)


def _volume(box: Box) -> int:
    return int(np.prod([last - first + 1 for first, last in box]))


def _common_box(one: Box, two: Box) -> Box:
    return tuple((min(a, c), max(b, d)) for (a, b), (c, d) in zip(one, two, strict=True))


def cut_window(volume: Tensor, anatomy_mask: Tensor, window: Window, patch_size_dhw: Size) -> tuple[Tensor, Tensor]:
    """Voxels and mask of a window, with zeros at the end up to whole patches; views where there is nothing to pad.

    The mask keeps what the window shows of other anatomies; only the vectors of `window.anatomies` are of use.

    Args:
        volume: (D, H, W) in [0, 1].
        anatomy_mask: (D, H, W) integer ids.
        window: from `plan_windows`.
        patch_size_dhw: of the model.
    """
    place = tuple(slice(start, start + size) for start, size in zip(window.start_dhw, window.size_dhw, strict=True))
    padding: list[int] = []
    for size, patch in zip(reversed(window.size_dhw), reversed(patch_size_dhw), strict=True):
        padding += [0, -size % patch]
    pixels, mask = volume[place], anatomy_mask[place]
    return (F.pad(pixels, padding), F.pad(mask, padding)) if any(padding) else (pixels, mask)


# Scores ----------------------------------------------------------------------------------------------------------


def finding_probabilities(
    anatomy_embeds: Tensor, text_embeds: Tensor, anatomy_index: Tensor, logit_scale: Tensor | float
) -> Tensor:
    """Probability of every finding in every scan, (N, F): softmax over (absent, present), the second entry.

    Args:
        anatomy_embeds: (N, A, D), L2-normalised; a row of NaN, an anatomy that is missing, gives NaN.
        text_embeds: (F, 2, D), L2-normalised: absent, present.
        anatomy_index: (F,) int64, place of each finding's anatomy.
        logit_scale: exponentiated: one over the temperature.
    """
    logits = torch.einsum("nfd,fpd->nfp", anatomy_embeds[:, anatomy_index], text_embeds) * logit_scale
    return logits.softmax(dim=-1)[..., 1]


def embed_findings(
    model: Any, tokenizer: Any, findings: Sequence[Finding] = CT_RATE_FINDINGS, *, max_length: int = 384
) -> FindingEmbeddings:
    """The findings' prompts in the joint space, on the model's device.

    Args:
        model: `FVLMModel` in eval mode.
        tokenizer: of its text tower.
        findings: those to score.
        max_length: tokens after which prompts are cut, as published.

    Raises:
        ValueError: a finding belongs to an anatomy that the model does not know.
    """
    anatomies = list(model.config.anatomies)
    unknown = sorted({finding.anatomy for finding in findings} - set(anatomies))
    if unknown:
        raise ValueError(f"The model knows the anatomies {anatomies}, but findings of {unknown} were asked for.")
    prompts = [prompt for finding in findings for prompt in (finding.absent, finding.present)]
    tokens = tokenizer(
        prompts,
        padding=True,
        truncation=True,
        max_length=max_length,
        return_token_type_ids=False,
        return_tensors="pt",
    ).to(model.device)
    with torch.no_grad():
        text_embeds = model(**tokens).text_embeds
    anatomy_index = torch.tensor([anatomies.index(finding.anatomy) for finding in findings], device=model.device)
    return FindingEmbeddings(tuple(findings), anatomy_index, text_embeds.unflatten(0, (-1, 2)))


@torch.no_grad()
def embed_scan(
    model: Any,
    volume: Tensor,
    anatomy_mask: Tensor,
    *,
    protocol: Protocol = "published",
    window_size_dhw: Size = PUBLISHED_WINDOW_DHW,
    batch_size: int = 4,
) -> Tensor:
    """One embedding for each anatomy of a scan, (A, D), L2-normalised; NaN where an anatomy does not occur.

    Args:
        model: `FVLMModel` in eval mode.
        volume: (D, H, W) in [0, 1], cropped and padded by `FVLMImageProcessor`.
        anatomy_mask: (D, H, W) integer ids, 0 = background.
        protocol: see `plan_windows`.
        window_size_dhw: smallest window, voxels.
        batch_size: windows of equal size that are embedded at once.

    Raises:
        ValueError: volume and mask do not share one grid, or one of them is no volume.
    """
    if volume.ndim != 3 or volume.shape != anatomy_mask.shape:
        raise ValueError(
            f"volume and anatomy_mask must be (depth, height, width) on one grid, but shapes {tuple(volume.shape)} and "
            f"{tuple(anatomy_mask.shape)} came. Take one entry of what the processor gives, without the channel."
        )
    windows = plan_windows(anatomy_mask.cpu().numpy(), model.config.num_anatomies, protocol, window_size_dhw)
    return embed_windows(model, volume, anatomy_mask, windows, batch_size=batch_size)


@torch.no_grad()
def embed_windows(
    model: Any, volume: Tensor, anatomy_mask: Tensor, windows: Sequence[Window], *, batch_size: int = 4
) -> Tensor:
    """What `embed_scan` gives, of windows that are planned already; arguments as there."""
    patch_size_dhw = tuple(model.config.vision_config.patch_size_dhw)
    embeds = torch.full((model.config.num_anatomies, model.config.projection_dim), torch.nan, device=model.device)
    by_size: dict[Size, list[Window]] = {}
    for window in windows:
        by_size.setdefault(window.size_dhw, []).append(window)
    for group in by_size.values():
        for first in range(0, len(group), batch_size):
            part = group[first : first + batch_size]
            cuts = [cut_window(volume, anatomy_mask, window, patch_size_dhw) for window in part]
            pixel_values = torch.stack([pixels.to(model.device) for pixels, _ in cuts])[:, None]
            masks = torch.stack([mask.to(model.device) for _, mask in cuts])
            outputs = model(pixel_values=pixel_values, anatomy_mask=masks)
            for row, window in enumerate(part):
                embeds[list(window.anatomies)] = outputs.anatomy_embeds[row, list(window.anatomies)].to(embeds.dtype)
    return embeds


def score_scan(
    model: Any,
    volume: Tensor,
    anatomy_mask: Tensor,
    findings: FindingEmbeddings,
    *,
    protocol: Protocol = "published",
    window_size_dhw: Size = PUBLISHED_WINDOW_DHW,
) -> dict[str, float]:
    """Probability of every finding in one scan; NaN where its anatomy does not occur.

    Args:
        model: `FVLMModel` in eval mode.
        volume: (D, H, W) in [0, 1], cropped and padded by `FVLMImageProcessor`.
        anatomy_mask: (D, H, W) integer ids, 0 = background.
        findings: from `embed_findings`.
        protocol: see `plan_windows`.
        window_size_dhw: smallest window, voxels.

    Raises:
        ValueError: see `embed_scan`.
    """
    embeds = embed_scan(model, volume, anatomy_mask, protocol=protocol, window_size_dhw=window_size_dhw)
    scale = model.logit_scale.detach().exp()
    probabilities = finding_probabilities(
        embeds[None], findings.text_embeds.to(embeds.dtype), findings.anatomy_index, scale
    )
    names = [finding.name for finding in findings.findings]
    return dict(zip(names, probabilities[0].tolist(), strict=True))


def score_to_csv(
    path: str | Path,
    scans: Iterable[tuple[str, Callable[[], tuple[Tensor, Tensor]]]],
    model: Any,
    findings: FindingEmbeddings,
    *,
    protocol: Protocol = "published",
    window_size_dhw: Size = PUBLISHED_WINDOW_DHW,
) -> dict[str, int]:
    """Scores of many scans as a CSV file that can be continued; gives back how many were scored, refused and found.

    The columns are scan_id, refused (the reason, empty where scored) and one for each finding (empty where its anatomy
    does not occur). A row is complete once its line ends; a line that a killed run left unfinished is removed and its
    scan is scored again.

    Args:
        path: the file; rows that it holds are kept and their scans are not loaded.
        scans: (scan_id, function that loads volume and mask as `score_scan` takes them).
        model: `FVLMModel` in eval mode.
        findings: from `embed_findings`.
        protocol: see `plan_windows`.
        window_size_dhw: smallest window, voxels.

    Raises:
        ValueError: the file holds other columns.
    """
    path = Path(path)
    names = [finding.name for finding in findings.findings]
    columns = ["scan_id", "refused", *names]
    done = _finished_rows(path, columns)
    counts = {"scored": 0, "refused": 0, "found": 0}
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(columns)
        for scan_id, load in scans:
            if scan_id in done:
                counts["found"] += 1
                continue
            try:
                volume, mask = load()
                scores = score_scan(model, volume, mask, findings, protocol=protocol, window_size_dhw=window_size_dhw)
            except (ValueError, OSError) as error:
                logger.warning("%s is refused: %s", scan_id, error)
                counts["refused"] += 1
                row = [scan_id, " ".join(str(error).split()), *([""] * len(names))]
            else:
                counts["scored"] += 1
                row = [scan_id, "", *("" if np.isnan(scores[name]) else f"{scores[name]:.6f}" for name in names)]
            writer.writerow(row)
            file.flush()
            os.fsync(file.fileno())
    return counts


def _finished_rows(path: Path, columns: list[str]) -> set[str]:
    """Ids of the scans that the file holds; cuts off a last line that has no end."""
    if not path.exists():
        return set()
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        path.write_text(complete, encoding="utf-8")
    rows = list(csv.reader(complete.splitlines()))
    if rows and rows[0] != columns:
        raise ValueError(
            f"{path} holds the columns {rows[0]}, not {columns}. Choose another file, or the same findings."
        )
    return {row[0] for row in rows[1:]}


# Published figures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OperatingPoint:
    """Figures of one finding at one threshold, as the release reports them."""

    threshold: float
    accuracy: float
    sensitivity: float
    specificity: float
    precision: float
    weighted_f1: float


def published_operating_point(scores: NDArray[Any], labels: NDArray[Any]) -> OperatingPoint:
    """Figures at the threshold that the release chooses on the very labels that it is tested on.

    Of 100 thresholds from 0 to 1 it takes the one closest to the corner of the ROC plane, the larger of equal ones; a
    score above it is positive. Good for comparing with published tables; too good as an estimate for new scans. Missing
    scores count as 0 there.

    Args:
        scores: (N,), NaN where missing.
        labels: (N,) bool or 0 and 1.

    Raises:
        ValueError: shapes differ, or one of both classes is missing.
    """
    truth = np.asarray(labels).astype(bool)
    values = np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=0.0)
    if values.shape != truth.shape or values.ndim != 1:
        raise ValueError(f"scores and labels must be (N,), but shapes {values.shape} and {truth.shape} came.")
    if truth.all() or not truth.any():
        raise ValueError("labels hold one class only; sensitivity and specificity need both.")
    thresholds = np.linspace(0.0, 1.0, _NUM_THRESHOLDS)
    predicted = values[None, :] > thresholds[:, None]
    sensitivity = predicted[:, truth].mean(axis=1)
    false_alarms = predicted[:, ~truth].mean(axis=1)
    distances = np.hypot(1 - sensitivity, false_alarms)
    best = int(np.flatnonzero(distances == distances.min())[-1])
    positive = predicted[best]
    hits, alarms = int((positive & truth).sum()), int(positive.sum())
    return OperatingPoint(
        threshold=float(thresholds[best]),
        accuracy=float((positive == truth).mean()),
        sensitivity=float(sensitivity[best]),
        specificity=float(1 - false_alarms[best]),
        precision=hits / alarms if alarms else 0.0,
        weighted_f1=_weighted_f1(positive, truth),
    )


def _weighted_f1(positive: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """F1 of both classes, weighted by how often they occur."""
    total = 0.0
    for predicted, actual in ((positive, truth), (~positive, ~truth)):
        total += 2 * (predicted & actual).sum() / (predicted.sum() + actual.sum()) * actual.mean()
    return float(total)
