"""Whole-slide images: a table of slides, tiles of tissue at one resolution, their features, and attention on the slide.

The resolution is a contract: a tile is so many pixels of so many micrometres. A slide that does not tell its own
micrometres a pixel cannot keep it and is set aside, as is one that cannot be opened, or holds no tissue.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageFilter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.stats import rankdata
from torch import Tensor

from medclip_hf.evaluation.csv_tables import open_csv

SPLITS = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}
PIXELS_A_TILE = 8  # of the overview in which tissue is found, along each side of a tile
SATURATION_BOUNDS = (12, 60)  # of 255: where the threshold between glass and tissue may lie, whatever Otsu's rule says
DARKEST = 25  # of 255: below it is no tissue but the scanner's black
MAX_OVERVIEW_PIXELS = 120_000_000  # read at once; a slide that needs more has no overview level
MAX_ANISOTROPY = 0.02  # between micrometres a pixel along x and y

Encode = Callable[[Sequence[Image.Image]], Tensor]


class UnusableSlide(ValueError):
    """A slide that cannot be used: a short countable `reason`, and the `detail` of this one."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class SlideRow:
    """A slide of a table.

    `label` is empty where it is not known, `patient_id` the slide's own name and `mpp` None where the table does not
    tell them.
    """

    slide_id: str
    path: Path
    label: str
    split: str
    patient_id: str
    mpp: float | None = None


@dataclass(frozen=True)
class TileContract:
    """What every tile of every slide is.

    Args:
        tile_px: side of a tile in pixels.
        mpp: micrometres a pixel; 0.5 is what is called 20 ×.
        min_tissue: share of a tile that must be tissue.
    """

    tile_px: int = 256
    mpp: float = 0.5
    min_tissue: float = 0.5

    def __post_init__(self) -> None:
        if self.tile_px < PIXELS_A_TILE or not self.mpp > 0 or not 0 <= self.min_tissue <= 1:
            raise ValueError(f"expected tile_px ≥ {PIXELS_A_TILE}, mpp > 0 and min_tissue in [0, 1], got {self}.")


@dataclass(frozen=True)
class TileGrid:
    """Where the tiles of a slide lie.

    Args:
        places (N, 2): row and column of each tile with enough tissue, by rows.
        shape: rows and columns of the grid; what is left over at the right and lower border, less than a tile, is not
            looked at.
        side_level0_px: side of a tile in pixels of the slide's finest level.
        level: of the slide from which tiles are read: the coarsest that is not coarser than a tile.
        side_px: side of a tile in pixels of that level.
        overview (rows × 8, columns × 8, 3): the slide in small, uint8.
    """

    places: NDArray[np.int64]
    shape: tuple[int, int]
    side_level0_px: float
    level: int
    side_px: int
    overview: NDArray[np.uint8]


def read_slide_table(path: str | Path, *, to_train: bool = True) -> list[SlideRow]:
    """The slides of a CSV with the columns slide_id, path, label, split and, if there are any, patient_id and mpp.

    Args:
        path: of the table. Paths in it are relative to it; a split is train, validation (or val) or test; `mpp` is for
            slides whose files do not tell it.
        to_train: False needs neither labels nor splits: a slide without a split is a test slide.

    Raises:
        ValueError: a missing column, an empty or unknown value (with its line), a slide named twice, or a patient or
            file in two splits.
    """
    path = Path(path)
    try:
        with open_csv(path) as reader:
            needed = ("slide_id", "path", "label", "split") if to_train else ("slide_id", "path")
            missing = [name for name in needed if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path} lacks the columns {missing}.")
            rows = [_slide_row(record, path, line, needed) for line, record in enumerate(reader, 2)]
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    if not rows:
        raise ValueError(f"{path} names no slide.")
    repeated = [name for name, count in Counter(row.slide_id for row in rows).items() if count > 1]
    if repeated:
        raise ValueError(f"{path} names the slides {repeated[:5]} more than once.")
    for what in ("patient_id", "path"):
        splits: dict[Any, set[str]] = {}
        for row in rows:
            splits.setdefault(getattr(row, what), set()).add(row.split)
        shared = [str(value) for value, found in splits.items() if len(found) > 1]
        if shared:
            raise ValueError(f"{path} has the same {what} in several splits, {len(shared)} times, such as {shared[0]}.")
    return rows


def open_slide(path: str | Path) -> Any:
    """The slide, by openslide or else by tiffslide; both are read alike. To be closed by the caller.

    Raises:
        UnusableSlide: there is no such file, or neither can open it.
        ImportError: neither package is installed.
    """
    if not Path(path).is_file():
        raise UnusableSlide("slide missing", f"{path} is no file")
    failures = []
    for package, reader in (("openslide", "OpenSlide"), ("tiffslide", "TiffSlide")):
        try:
            module = __import__(package)
        except ImportError:
            continue
        try:
            slide = getattr(module, reader)(str(path))
            if slide.dimensions and slide.level_downsamples and slide.properties is not None:  # tiffslide reads late
                return slide
        except Exception as error:  # decoders raise any type on damaged bytes; each is the file's fault
            failures.append(f"{package}: {error}")
    if not failures:
        raise ImportError("whole-slide images need openslide or tiffslide. Run: pip install 'medclip-hf[wsi]'")
    raise UnusableSlide("slide unreadable", f"{path}: {'; '.join(failures)}")


def slide_mpp(slide: Any, name: str, told: float | None = None) -> float:
    """Micrometres a pixel of the slide's finest level.

    Args:
        slide: from `open_slide`.
        name: for messages.
        told: by the user, for a file that does not tell it; must agree with a file that does.

    Raises:
        UnusableSlide: nobody tells it, the two disagree, or the pixels are not square.
    """
    values = []
    for axis in "xy":
        found = slide.properties.get(f"openslide.mpp-{axis}") or slide.properties.get(f"tiffslide.mpp-{axis}")
        try:
            values.append(float(found))
        except (TypeError, ValueError):
            values.append(float("nan"))
    x, y = values
    if not (0 < x < float("inf") and 0 < y < float("inf")):
        if told is None:
            raise UnusableSlide("slide without mpp", f"{name} does not tell its micrometres a pixel: say it (mpp)")
        return told
    if abs(x - y) > MAX_ANISOTROPY * x:
        raise UnusableSlide("pixels not square", f"{name} has {x:.4g} × {y:.4g} micrometres a pixel")
    if told is not None and abs(told - x) > MAX_ANISOTROPY * x:
        raise UnusableSlide("mpp contradicted", f"{name} says {x:.4g} micrometres a pixel, the table {told:.4g}")
    return x


def find_tiles(slide: Any, name: str, contract: TileContract, mpp: float) -> TileGrid:
    """The tiles that show tissue: what is coloured and not black in an overview of 8 × 8 pixels a tile.

    Raises:
        UnusableSlide: it is smaller than a tile, coarser than the contract, has no overview level, or no tissue.
    """
    if mpp > contract.mpp * 1.05:
        raise UnusableSlide(
            "slide too coarse", f"{name} has {mpp:.4g} micrometres a pixel, {contract.mpp} are asked for"
        )
    side = contract.tile_px * contract.mpp / mpp
    columns, rows = (floor(size / side + 1e-6) for size in slide.dimensions)
    if not rows or not columns:
        raise UnusableSlide("slide smaller than a tile", f"{name} has {slide.dimensions} pixels, a tile {side:.0f}")
    overview = _read_overview(slide, name, side, (rows, columns))
    tissue = tissue_mask(overview).reshape(rows, PIXELS_A_TILE, columns, PIXELS_A_TILE).mean(axis=(1, 3))
    places = np.argwhere((tissue >= contract.min_tissue) & (tissue > 0))
    if not len(places):
        raise UnusableSlide("no tissue", f"{name}: no tile of {rows} × {columns} has {contract.min_tissue:.0%} of it")
    level = _best_level(slide, side / contract.tile_px * 1.01)
    side_px = max(round(side / slide.level_downsamples[level]), 1)
    return TileGrid(places, (rows, columns), side, level, side_px, overview)


def tissue_mask(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where a picture (H, W, 3) shows tissue: saturation above Otsu's threshold, and not black; (H, W).

    The threshold is held within `SATURATION_BOUNDS`, so that glass alone does not become half tissue.
    """
    hsv = Image.fromarray(picture).convert("HSV").filter(ImageFilter.MedianFilter(3))
    _, saturation, value = (np.asarray(channel) for channel in hsv.split())
    counts = np.bincount(saturation[value >= DARKEST], minlength=256).astype(np.float64)
    below, levels = np.cumsum(counts), np.arange(256)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_below = np.cumsum(counts * levels) / below
        mean_above = (np.sum(counts * levels) - np.cumsum(counts * levels)) / (below[-1] - below)
        between = below * (below[-1] - below) * (mean_above - mean_below) ** 2
    threshold = int(np.nanargmax(between)) if np.isfinite(between).any() else 0
    return (saturation > np.clip(threshold, *SATURATION_BOUNDS)) & (value >= DARKEST)


def read_tile(slide: Any, name: str, grid: TileGrid, place: Sequence[int], tile_px: int) -> Image.Image:
    """The tile at (row, column) of the grid as RGB, brought to size.

    Raises:
        UnusableSlide: it cannot be decoded.
    """
    corner = (round(place[1] * grid.side_level0_px), round(place[0] * grid.side_level0_px))
    tile = _read_region(slide, name, corner, grid.level, (grid.side_px, grid.side_px))
    return tile if grid.side_px == tile_px else tile.resize((tile_px, tile_px), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class SlideFeatures:
    """What a slide is to a classifier.

    Args:
        features (N, D): float32, one row a tile.
        places (N, 2): row and column of each tile.
        shape: rows and columns of the grid.
        overview (h, w, 3): the slide in small, uint8.
    """

    features: Tensor
    places: Tensor
    shape: tuple[int, int]
    overview: NDArray[np.uint8]


def embed_slide(
    row: SlideRow, encode: Encode, contract: TileContract, *, batch_size: int = 64, num_workers: int = 4
) -> SlideFeatures:
    """Features of all tiles of tissue of a slide; tiles are read by threads while others are encoded.

    Args:
        row: which slide.
        encode: pictures → (N, D), for instance `tile_encoder(...)`.
        contract: what a tile is.
        batch_size: tiles a call of `encode`.
        num_workers: threads that read.

    Raises:
        UnusableSlide: with the reason.
        ValueError: features that are not finite.
    """
    slide = open_slide(row.path)
    try:
        grid = find_tiles(slide, row.slide_id, contract, slide_mpp(slide, row.slide_id, row.mpp))
        parts = []
        for tiles in _read_tiles(slide, row.slide_id, grid, contract.tile_px, batch_size, num_workers):
            parts.append(encode(tiles).float().cpu())
    finally:
        slide.close()
    features = torch.cat(parts)
    if len(features) != len(grid.places) or not torch.isfinite(features).all():
        raise ValueError(f"the encoder gave {tuple(features.shape)} for {len(grid.places)} tiles, or NaN.")
    return SlideFeatures(features, torch.from_numpy(grid.places), grid.shape, grid.overview)


def tile_encoder(encoder: Any) -> Encode:
    """Pooled image vectors of an `evaluation.encoders.Encoder`, not normalised, as published for slides."""

    def encode(tiles: Sequence[Image.Image]) -> Tensor:
        found = encoder.encode_images(tiles)
        return found.image_embeds * found.image_norms[:, None]

    return encode


def feature_identity(row: SlideRow, contract: TileContract, encoder_identity: str) -> str:
    """What the features of a slide depend on, to tell those in a file from others: file, contract, encoder."""
    status = row.path.stat()
    known = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "mpp": row.mpp, "encoder": encoder_identity}
    return json.dumps(known | asdict(contract), sort_keys=True)


def save_features(path: Path, found: SlideFeatures, identity: str) -> None:
    """Write the features of a slide, whole or not at all."""
    tensors = {
        "features": found.features.contiguous(),
        "places": found.places.contiguous(),
        "shape": torch.tensor(found.shape),
        "overview": torch.from_numpy(found.overview).contiguous(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, {"identity": identity})
    temporary.replace(path)


def has_features(path: Path, identity: str) -> bool:
    """Whether a file holds the features of this identity, whole; nothing but its header is read."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("identity") == identity
    except (SafetensorError, OSError):  # no file, one cut short, or none of features
        return False


def load_features(path: Path, identity: str | None = None) -> SlideFeatures | None:
    """The features in a file; None where there is none, it is damaged, or of another identity than asked for."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if identity is not None and (file.metadata() or {}).get("identity") != identity:
                return None
            names = ("features", "places", "shape", "overview")
            features, places, shape, overview = (file.get_tensor(name) for name in names)
    except (SafetensorError, OSError):
        return None
    rows, columns = shape.tolist()
    return SlideFeatures(features, places, (rows, columns), overview.numpy())


def attention_map(attention: ArrayLike, places: ArrayLike, shape: tuple[int, int]) -> NDArray[np.float32]:
    """(rows, columns) of a slide: the rank of each tile's attention among all tiles, in (0, 1]; 0 without a tile.

    Ranks, since attention is a softmax over thousands of tiles of which few hold nearly all.

    Args:
        attention: (N,).
        places: (N, 2), row and column of each tile.
        shape: rows and columns.
    """
    values, where = np.asarray(attention, dtype=np.float64), np.asarray(places)
    if values.ndim != 1 or where.shape != (len(values), 2) or not np.isfinite(values).all():
        raise ValueError(f"expected N finite values and (N, 2) places, got {values.shape} and {where.shape}.")
    ranked = np.zeros(shape, dtype=np.float32)
    ranked[where[:, 0], where[:, 1]] = rankdata(values) / max(len(values), 1)
    return ranked


def _slide_row(record: dict[str, str | None], path: Path, line: int, needed: Sequence[str]) -> SlideRow:
    values = {name: (value or "").strip() for name, value in record.items() if isinstance(name, str)}
    empty = [name for name in needed if not values.get(name)]
    if empty:
        raise ValueError(f"{path} line {line}: {empty[0]} is empty.")
    slide_id, told_split = values["slide_id"], values.get("split") or "test"
    split = SPLITS.get(told_split.lower())
    if split is None:
        raise ValueError(f"{path} line {line}: split {told_split!r} is none of {sorted(SPLITS)}.")
    if Path(slide_id).name != slide_id or slide_id.startswith("."):
        raise ValueError(f"{path} line {line}: slide_id {slide_id!r} cannot name a file.")
    try:
        mpp = float(values["mpp"]) if values.get("mpp") else None
    except ValueError as error:
        raise ValueError(f"{path} line {line}: mpp {values['mpp']!r} is no number.") from error
    if mpp is not None and not 0 < mpp < float("inf"):
        raise ValueError(f"{path} line {line}: mpp must be positive, got {mpp}.")
    return SlideRow(
        slide_id,
        path.parent / values["path"],
        values.get("label", ""),
        split,
        values.get("patient_id") or slide_id,
        mpp,
    )


def _read_overview(slide: Any, name: str, side: float, shape: tuple[int, int]) -> NDArray[np.uint8]:
    level = _best_level(slide, side / PIXELS_A_TILE)
    rows, columns = shape
    height, width = (max(round(count * side / slide.level_downsamples[level]), 1) for count in (rows, columns))
    if height * width > MAX_OVERVIEW_PIXELS:
        raise UnusableSlide(
            "slide without an overview level", f"{name}: its coarsest fitting one is {width} × {height}"
        )
    region = _read_region(slide, name, (0, 0), level, (width, height))
    small = region.resize((columns * PIXELS_A_TILE, rows * PIXELS_A_TILE), Image.Resampling.BOX)
    return np.array(small)


def _best_level(slide: Any, downsample: float) -> int:
    """The coarsest level that is not coarser than `downsample`."""
    fitting = [level for level, factor in enumerate(slide.level_downsamples) if factor <= downsample]
    return max(fitting, key=lambda level: slide.level_downsamples[level], default=0)


def _read_region(slide: Any, name: str, corner: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
    """A region as RGB; where the scanner took no picture it is white."""
    try:
        region = slide.read_region(corner, level, size)
    except Exception as error:  # decoders raise any type on damaged bytes; each is the file's fault
        raise UnusableSlide("slide damaged", f"{name}: {type(error).__name__} at {corner}: {error}") from error
    if region.mode != "RGBA":
        return region.convert("RGB")
    paper = Image.new("RGBA", region.size, (255, 255, 255, 255))
    return Image.alpha_composite(paper, region).convert("RGB")


def _read_tiles(
    slide: Any, name: str, grid: TileGrid, tile_px: int, batch_size: int, num_workers: int
) -> Iterator[list[Image.Image]]:
    """Batches of tiles in the order of the places; the next batch is read while one is used."""
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        ahead: list[Future[Image.Image]] = []
        starts = [*range(0, len(grid.places), batch_size), None]
        for start in starts:
            ready = ahead
            places = [] if start is None else grid.places[start : start + batch_size].tolist()
            ahead = [pool.submit(read_tile, slide, name, grid, place, tile_px) for place in places]
            if ready:
                try:
                    tiles = [future.result() for future in ready]
                except UnusableSlide:
                    pool.shutdown(cancel_futures=True)
                    raise
                yield tiles
