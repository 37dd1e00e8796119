"""Figures with captions and concepts as training examples: random access into Parquet shards, images decoded late."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from medclip_hf.data.images import MAX_PIXELS, UnreadableImage, decode_image, open_image, path_inside, read_file
from medclip_hf.data.mapped import MappedRows, cache_folder
from medclip_hf.data.parquet import find_shards, record_to_row
from medclip_hf.data.records import ConceptMention, FigureRow
from medclip_hf.data.stages import Drop
from medclip_hf.processing.conceptclip.processing_conceptclip import to_rgb

COLUMNS = ["row_id", "image", "caption", "concepts"]

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class FigureExample:
    """One figure, ready for the processor.

    `image` is RGB and already has the size of the model's input.
    """

    row_id: str
    image: Image.Image
    caption: str
    concepts: tuple[ConceptMention, ...]


class FigureDataset:
    """A map-style data set of `FigureExample`, memory-mapped, the same for any number of workers and after a resume.

    The Parquet shards are turned once into Arrow files under `cache_dir`, which every process of the machine maps
    (`data.mapped`): a process holds no row of its own, whatever their number. They take the disk of the shards again;
    where that is too much, rows that keep image paths have small shards.

    The key of an example is `(epoch, index)`, or `index` alone for epoch 0; its crop depends on (seed, epoch, index)
    and on nothing else.

    Args:
        folder: of the shards; paths of images that are no bytes in the shards are relative to it.
        split: ``train``, ``validation`` or ``test``.
        seed: of the crops.
        image_size: height and width of the model's input in pixels, or one number for both.
        crop_scale: share of the image's area that a random crop covers, least and most; None takes the whole image, for
            evaluation.
        crop_ratio: width over height of a crop, least and most.
        cache_dir: of the Arrow files; None is `<folder>/.cache`, which keeps a copy of the images beside the images and
            not in a cache of the home directory. It may be deleted at any time.
        max_pixels: larger images are set aside before they are decoded.

    Raises:
        ValueError: where the folder holds no complete split, a column is missing, or the cache cannot be written.

    Examples:
        >>> dataset = FigureDataset("figures", "train", image_size=384)  # doctest: +SKIP
        >>> example = dataset[(0, 17)]  # a FigureExample, or a Drop with the reason  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str = "train",
        *,
        seed: int = 0,
        image_size: int | tuple[int, int] = 384,
        crop_scale: tuple[float, float] | None = (0.5, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        cache_dir: str | os.PathLike[str] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.folder = Path(folder)
        self.seed = seed
        self.size_hw = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        self.crop_scale = crop_scale
        self.crop_ratio = crop_ratio
        self.max_pixels = max_pixels
        if min(self.size_hw) < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
        if crop_scale is not None and not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be (least, most) within (0, 1], or None for no crop; got {crop_scale}")
        cache = cache_folder(self.folder, Path(cache_dir) if cache_dir else None)
        self._rows = MappedRows(find_shards(self.folder, split), COLUMNS, cache)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: int | tuple[int, int]) -> FigureExample | Drop:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a data set with {len(self)} rows")
        row = record_to_row(self._rows[int(index)])
        problem = _problem_of_text(row)
        if problem is not None:
            return problem
        try:
            image = self._read_image(row, np.random.default_rng((self.seed, epoch, index)))
        except UnreadableImage as error:
            return Drop(error.reason, error.detail, row.row_id)
        return FigureExample(row.row_id, image, row.caption, row.concepts)

    def _read_image(self, row: FigureRow, generator: np.random.Generator) -> Image.Image:
        name = row.image_path or f"the image of row {row.row_id}"
        content = row.image_bytes
        if content is None:
            content = read_file(path_inside(self.folder, row.image_path or ""))
        image = open_image(content, name, self.max_pixels)
        if self.crop_scale is None:
            return _crop_and_resize(image, None, self.size_hw, name)
        box = random_crop_box(_upright_size(image), self.crop_scale, self.crop_ratio, generator)
        return _crop_and_resize(image, box, self.size_hw, name)


def read_captions(folder: str | os.PathLike[str], split: str) -> Iterator[str]:
    """The captions of a split, one after the other, without the images."""
    for shard in find_shards(Path(folder), split):
        for rows in pq.ParquetFile(shard).iter_batches(columns=["caption"]):
            yield from (caption for caption in rows.column(0).to_pylist() if caption)


def random_crop_box(
    size_wh: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], generator: np.random.Generator
) -> Box:
    """(left, top, right, bottom) of a random crop in pixels, drawn as torchvision's RandomResizedCrop draws it.

    The area is uniform in `scale` × the image's, the logarithm of width / height uniform in that of `ratio`; after ten
    draws that do not fit, the largest central crop of a permitted ratio.
    """
    width, height = size_wh
    for _ in range(10):
        area = width * height * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(generator.integers(0, width - crop_width, endpoint=True))
            top = int(generator.integers(0, height - crop_height, endpoint=True))
            return left, top, left + crop_width, top + crop_height
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_width, crop_height = min(width, round(height * aspect)), min(height, round(width / aspect))
    crop_width, crop_height = max(crop_width, 1), max(crop_height, 1)
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after the rotation that EXIF asks for, known from the header alone."""
    width, height = image.size
    return (height, width) if _exif_orientation(image) >= 5 else (width, height)  # 5 to 8 swap the axes


def _exif_orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # a damaged EXIF block is no reason to lose the picture
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _crop_and_resize(image: Image.Image, box: Box | None, size_hw: tuple[int, int], name: str) -> Image.Image:
    """The box of the upright image as RGB of the given size, sampled once (bicubic, with anti-aliasing).

    A JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8 of its size, never below the size asked for; only for
    crops, so that evaluation sees what the processor alone would compute.
    """
    full_width, full_height = _upright_size(image)
    target_height, target_width = size_hw
    if box is not None and image.format == "JPEG":
        shrink = min((box[2] - box[0]) / target_width, (box[3] - box[1]) / target_height)
        if shrink >= 2:
            image.draft(image.mode, (int(image.width / shrink) + 1, int(image.height / shrink) + 1))
    try:
        image = to_rgb(decode_image(image, name))
    except UnreadableImage:
        raise
    except ValueError as error:  # decoded, but with values that have no meaning as RGB
        raise UnreadableImage("image cannot become RGB", f"{name}: {error}") from error
    scale_x, scale_y = image.width / full_width, image.height / full_height
    scaled_box = None if box is None else (box[0] * scale_x, box[1] * scale_y, box[2] * scale_x, box[3] * scale_y)
    return image.resize((target_width, target_height), Image.Resampling.BICUBIC, box=scaled_box)


def _problem_of_text(row: FigureRow) -> Drop | None:
    """Why a row's caption or spans cannot be trained on; the engines write no such row, other writers may."""
    if not isinstance(row.caption, str) or not row.caption.strip():
        return Drop("caption empty", "", row.row_id)
    for concept in row.concepts:
        if not 0 <= concept.start_char < concept.end_char <= len(row.caption):
            span = f"[{concept.start_char}, {concept.end_char}) of {concept.cui} in {len(row.caption)} characters"
            return Drop("concept span outside the caption", span, row.row_id)
    return None
