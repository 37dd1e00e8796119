"""The embedded 2-D data set: drawn figures with captions, concepts and the true region of every finding."""

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from medclip_hf.data.parquet import FIGURE_FEATURES, SPLITS
from medclip_hf.data.phantoms.captions import DrawnPlace, write_caption
from medclip_hf.data.phantoms.findings import FINDINGS, Finding
from medclip_hf.data.phantoms.looks import LOOKS, render, unit_grid
from medclip_hf.data.records import FigureRow

logger = logging.getLogger(__name__)

MAX_FINDINGS = 4
MIN_SIZE = 32  # pixels; below it textures are narrower than a pixel
_RADIUS_RANGE = (0.28, 0.36)  # of the average finding alone, over half the picture's side
_FIELD_RADIUS = 0.64  # centres stay in this disc, where every look has tissue
_NUM_CANDIDATES = 96
_SHRINK_WHERE_MANY = (1.0, 1.0, 0.92, 0.84)  # radii of one, two, … findings, so that most find room
_MAX_TILT = 0.4  # radians

PHANTOM_FEATURES = datasets.Features(
    FIGURE_FEATURES
    | {"findings": datasets.List(datasets.Value("string")), "finding_masks": datasets.List(datasets.Image())}
)


@dataclass(frozen=True)
class FigurePhantom:
    """A drawn figure and the truth about it.

    Args:
        row: what a trainer sees; the picture is a PNG in `row.image_bytes`.
        image: (size, size, 3), uint8.
        findings: names of what is in the picture, each once.
        masks: (len(findings), size, size), bool: region of each finding; no two overlap.
    """

    row: FigureRow
    image: NDArray[np.uint8]
    findings: tuple[str, ...]
    masks: NDArray[np.bool_]


def draw_figure(seed: int, split: str, index: int, size: int = 64) -> FigurePhantom:
    """The figure number `index` of a split: the same for the same arguments, whatever was drawn before.

    Args:
        seed: of the data set.
        split: one of `SPLITS`; no split repeats another.
        index: number of the figure, from 0.
        size: side of the picture, pixels, at least `MIN_SIZE`.

    Raises:
        ValueError: unknown split, negative seed or index, picture too small.
    """
    _check_split(split)
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got {seed} and {index}")
    if size < MIN_SIZE:
        raise ValueError(f"size must be at least {MIN_SIZE} pixels for the textures to be drawn, got {size}")
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    look = LOOKS[rng.integers(len(LOOKS))]
    grey = look.tissue(*unit_grid(size), rng)
    places, masks = _put_findings(grey, rng)
    image = render(grey, look, rng)
    caption, concepts = write_caption(look, places, rng)
    row = FigureRow(
        row_id=f"phantom-{split}-{seed}-{index:06d}",
        caption=caption,
        concepts=concepts,
        image_bytes=_png(image),
        license="Apache-2.0",
        modality=look.modality,
    )
    return FigurePhantom(row, image, tuple(place.finding.name for place in places), masks)


def draw_figures(seed: int, split: str, count: int, size: int = 64, start: int = 0) -> Iterator[FigurePhantom]:
    """`count` figures of a split from number `start` on; see `draw_figure`."""
    for index in range(start, start + count):
        yield draw_figure(seed, split, index, size)


def write_figure_phantoms(
    folder: str | Path, counts: dict[str, int], *, seed: int = 0, size: int = 64, rows_per_shard: int = 2000
) -> list[Path]:
    """Paths of the Parquet shards `<split>-00000-of-000NN.parquet` that hold the data set, in order.

    One row per figure with the columns of `FigureRow`, and `findings` and `finding_masks` (PNGs, 255 inside), which
    evaluation reads and trainers do not.

    Args:
        folder: made if missing; must not hold shards of these splits yet.
        counts: rows per split, e.g. ``{"train": 2000, "test": 400}``.
        seed: of the data set; the same seed gives the same files.
        size: side of the pictures, pixels.
        rows_per_shard: at most so many rows in a file.

    Raises:
        ValueError: unknown split, count below 1, `rows_per_shard` below 1.
        FileExistsError: the folder already holds shards of one of the splits.
    """
    folder = Path(folder)
    if not counts or min(counts.values()) < 1 or rows_per_shard < 1:
        raise ValueError(f"expected at least one row per split and per shard, got {counts} and {rows_per_shard}")
    for split in counts:
        _check_split(split)
        existing = sorted(folder.glob(f"{split}-*.parquet"))
        if existing:
            raise FileExistsError(f"{existing[0]} is there already: choose another folder or remove it first")
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for split, count in counts.items():
        starts = range(0, count, rows_per_shard)
        for number, start in enumerate(starts):
            path = folder / f"{split}-{number:05d}-of-{len(starts):05d}.parquet"
            figures = draw_figures(seed, split, min(rows_per_shard, count - start), size, start)
            _write_shard(path, [_as_columns(figure) for figure in figures])
            shards.append(path)
        logger.info("Drew %d figures of split %s in %d shards", count, split, len(starts))
    return shards


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


def _put_findings(grey: NDArray[np.float32], rng: np.random.Generator) -> tuple[list[DrawnPlace], NDArray[np.bool_]]:
    """Draws one to `MAX_FINDINGS` findings into `grey`, in place; gives back what is where, with the true regions."""
    size = grey.shape[0]
    wanted = rng.choice(len(FINDINGS), size=rng.integers(1, MAX_FINDINGS + 1), replace=False)
    findings = [FINDINGS[number] for number in wanted]
    shrink = _SHRINK_WHERE_MANY[len(findings) - 1]
    radii = [shrink * finding.relative_radius * rng.uniform(*_RADIUS_RANGE) for finding in findings]
    places: list[DrawnPlace] = []
    masks: list[NDArray[np.bool_]] = []
    for finding, radius, centre in zip(findings, radii, _apart(radii, rng), strict=False):
        masks.append(_paint(grey, finding, centre, radius, rng))
        places.append(DrawnPlace(finding, centre))
    return places, np.stack(masks) if masks else np.zeros((0, size, size), bool)


def _apart(radii: list[float], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres for the first findings such that no two touch; fewer than `radii` where there was no room left."""
    angle = rng.uniform(0.0, 2.0 * np.pi, _NUM_CANDIDATES)
    reach = _FIELD_RADIUS * np.sqrt(rng.random(_NUM_CANDIDATES))
    candidates = np.stack([reach * np.cos(angle), reach * np.sin(angle)], axis=1)
    centres: list[tuple[float, float]] = []
    for radius in radii:
        # Regions reach to 1.15 radii at most, the half-length of a fracture.
        gaps = [1.2 * (radius + other) for other in radii[: len(centres)]]
        distances = [np.hypot(*(candidates - centre).T) for centre in centres]
        is_free = np.all([d > gap for d, gap in zip(distances, gaps, strict=True)], axis=0)
        free = np.flatnonzero(np.broadcast_to(is_free, len(candidates)))
        if not len(free):
            break
        x, y = candidates[free[0]]
        centres.append((float(x), float(y)))
    return centres


def _paint(
    grey: NDArray[np.float32], finding: Finding, centre: tuple[float, float], radius: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Adds a finding to `grey` in the window around it; gives back its region on the whole picture."""
    size = grey.shape[0]
    x, y = unit_grid(size)
    rows, columns = (_window(centre[axis], 1.25 * radius, size) for axis in (1, 0))
    tilt = rng.uniform(-_MAX_TILT, _MAX_TILT)
    dx, dy = (x[rows, columns] - centre[0]) / radius, (y[rows, columns] - centre[1]) / radius
    cosine, sine = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
    local_x = (cosine * dx + sine * dy).astype(np.float32)
    local_y = (cosine * dy - sine * dx).astype(np.float32)
    contrast, region = finding.paint(local_x, local_y, 2.0 / (size * radius), rng)
    grey[rows, columns] += np.float32(rng.uniform(0.85, 1.1)) * contrast
    mask = np.zeros(grey.shape, bool)
    mask[rows, columns] = region > 0.5
    return mask


def _window(centre: float, reach: float, size: int) -> slice:
    to_pixels = size / 2.0
    return slice(
        max(0, int((centre - reach + 1.0) * to_pixels)), min(size, int((centre + reach + 1.0) * to_pixels) + 1)
    )


def _png(pixels: NDArray[Any]) -> bytes:
    """Stored, not compressed: noise shrinks little, and training decodes every picture many times."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=0)
    return buffer.getvalue()


def _as_columns(figure: FigurePhantom) -> dict[str, Any]:
    row = figure.row
    masks = [_png(mask.astype(np.uint8) * np.uint8(255)) for mask in figure.masks]
    return {
        "row_id": row.row_id,
        "caption": row.caption,
        "concepts": [vars(concept) for concept in row.concepts],
        "image": {"bytes": row.image_bytes, "path": None},
        "pmcid": row.pmcid,
        "pmid": row.pmid,
        "figure_id": row.figure_id,
        "license": row.license,
        "modality": row.modality,
        "findings": list(figure.findings),
        "finding_masks": [{"bytes": mask, "path": None} for mask in masks],
    }


def _write_shard(path: Path, rows: list[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(rows, schema=PHANTOM_FEATURES.arrow_schema), partial)
    partial.replace(path)  # a reader sees a whole shard or none
