"""Blood smears with boxes of three kinds of cells (BCCD, Pascal VOC files) as figures with captions and concepts.

Nearly every photograph holds white and red cells, so a caption of the whole says little about what is where. Windows
cut from the photographs differ: their captions are written from the boxes inside.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medclip_hf.data.images import UnreadableImage, decode_image, open_image, path_inside, read_file
from medclip_hf.data.parquet import require_writable, write_figure_rows, write_text_atomically
from medclip_hf.data.records import ConceptMention, FigureRow
from medclip_hf.data.stages import Drop, Tally

SPLIT_FILES = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}  # the official lists
LICENSE = "MIT"
CAPTION_START = "Blood smear."
MODALITY = "light microscopy"
MAX_ANNOTATION_BYTES = 1 << 20

_MIN_INSIDE = 0.5  # of a cell's box, for the cell to be named
_MAX_UNNAMED = 0.08  # of a cell's box, so small that nobody would name the cell
_MIN_SHARE_OF_WINDOW = 0.25  # a cell that fills the window is named although most of it lies outside
_NUM_TRIES = 400


@dataclass(frozen=True)
class CellKind:
    """A kind of cell: its label in the annotations, its UMLS identifier, and its name, in captions always plural."""

    label: str
    cui: str
    name: str


CELL_KINDS = (
    CellKind("WBC", "C0023516", "leukocytes"),
    CellKind("RBC", "C0014792", "erythrocytes"),
    CellKind("Platelets", "C0005821", "platelets"),
)
_KIND_OF_LABEL = {kind.label: kind for kind in CELL_KINDS}
MANY = 12  # cells and more are not counted in captions


@dataclass(frozen=True)
class CellBox:
    """One cell: label and box in pixels, `[left, right)` by `[top, bottom)`."""

    label: str
    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class BloodSmear:
    """A photograph and its cells.

    Args:
        smear_id: name of the files without ending.
        content: the encoded picture.
        width: pixels.
        height: pixels.
        boxes: of the cells that are annotated; the annotators left some red cells out.
    """

    smear_id: str
    content: bytes = field(repr=False)
    width: int
    height: int
    boxes: tuple[CellBox, ...]

    def image(self) -> Image.Image:
        """The picture as RGB."""
        return decode_image(open_image(self.content, self.smear_id), self.smear_id).convert("RGB")

    def mask(self, label: str) -> NDArray[np.bool_]:
        """Where cells of a kind are (height, width): the union of their boxes; empty where there is none.

        Raises:
            ValueError: unknown label.
        """
        if label not in _KIND_OF_LABEL:
            raise ValueError(f"unknown kind of cell {label!r}: known are {', '.join(_KIND_OF_LABEL)}")
        mask = np.zeros((self.height, self.width), dtype=bool)
        for box in self.boxes:
            if box.label == label:
                mask[box.top : box.bottom, box.left : box.right] = True
        return mask


def read_smears(folder: Path, split: str) -> Iterator[BloodSmear | Drop]:
    """The photographs of an official list, one by one; one that cannot be used is a `Drop` with its reason.

    Args:
        folder: with `annotations/*.xml`, `images/*.jpg` and `splits/{train,val,test}.txt`.
        split: ``train``, ``validation`` or ``test``.

    Raises:
        ValueError: unknown split, its list missing or empty, or a name in it twice or in two lists.
    """
    for smear_id in _read_list(folder, split):
        yield _read_smear(folder, smear_id)


def write_bccd(
    folder: Path,
    output: Path,
    *,
    splits: Sequence[str] = ("train", "validation", "test"),
    windows_per_image: int = 0,
    window_sides: tuple[int, int] = (96, 288),
    window_size: int = 64,
    seed: int = 0,
) -> dict[str, Tally]:
    """What was kept and dropped of each split, whose figure shards and `<split>.dropped.jsonl` now lie in `output`.

    Args:
        folder: see `read_smears`.
        output: made if missing; must not hold shards of these splits.
        splits: which official lists.
        windows_per_image: windows cut from each photograph; 0: the photograph itself is the figure.
        window_sides: least and greatest side of a window, pixels of the photograph.
        window_size: side of the stored picture of a window, pixels.
        seed: of the windows.

    Raises:
        ValueError: as `read_smears`; sizes that are no sizes; shards that exist; a split of which nothing is left.
    """
    if windows_per_image < 0 or window_size < 1 or not 16 <= window_sides[0] <= window_sides[1]:
        raise ValueError(
            f"expected windows_per_image ≥ 0, window_size ≥ 1 and rising window_sides from 16 pixels on, got "
            f"{windows_per_image}, {window_size} and {window_sides}"
        )
    require_writable(output)
    tallies = {}
    for split in splits:
        dropped: list[Drop] = []
        rows = _rows(folder, split, windows_per_image, window_sides, window_size, seed, dropped)
        shards = write_figure_rows(rows, output, split)
        tallies[split] = Tally(dropped=Counter(drop.reason for drop in dropped))
        tallies[split].kept = sum(json.loads((output / f"{split}.manifest.json").read_text())["shards"].values())
        lines = "".join(json.dumps(vars(drop)) + "\n" for drop in dropped)
        write_text_atomically(output / f"{split}.dropped.jsonl", lines)
        if not shards:
            raise ValueError(f"no picture of the split {split!r} in {folder} could be used: {tallies[split].dropped}")
    return tallies


def smear_row(smear: BloodSmear) -> FigureRow:
    """The whole photograph as a figure whose caption counts its cells."""
    caption, concepts = write_caption([box.label for box in smear.boxes])
    return FigureRow(
        row_id=f"bccd-{smear.smear_id}",
        caption=caption,
        concepts=concepts,
        image_bytes=smear.content,
        license=LICENSE,
        modality=MODALITY,
    )


def write_caption(labels: Sequence[str]) -> tuple[str, tuple[ConceptMention, ...]]:
    """A caption that counts the cells as a laboratory would, with its concepts; kinds that are absent go unmentioned.

    Examples:
        >>> write_caption(["RBC", "WBC", "RBC"])[0]
        'Blood smear. Leukocytes: 1. Erythrocytes: 2.'

    Args:
        labels: one per cell.
    """
    counts = Counter(labels)
    concepts: list[ConceptMention] = []
    caption = CAPTION_START
    for kind in CELL_KINDS:
        if count := counts[kind.label]:
            start = len(caption) + 1
            concepts.append(ConceptMention(kind.cui, kind.name, start, start + len(kind.name)))
            caption += f" {kind.name.capitalize()}: {count if count < MANY else 'many'}."
    return caption + ("" if concepts else " No cells."), tuple(concepts)


def cut_windows(
    smear: BloodSmear, num_windows: int, sides: tuple[int, int], size: int, rng: np.random.Generator
) -> Iterator[FigureRow]:
    """Square windows of a photograph as figures, with captions of the cells inside; perhaps fewer than asked for.

    For each window a set of the photograph's kinds is drawn first, all sets alike, and then a window that holds just
    these kinds is looked for: white cells are in every photograph but not in every second window. A window in which
    some kind is neither clearly there nor clearly absent is not taken. Windows are mirrored and turned at random: a
    smear has no upper side.

    Args:
        smear: where from.
        num_windows: how many.
        sides: least and greatest side, pixels of the photograph.
        size: side of the stored picture, pixels.
        rng: of place, size and turn.
    """
    image = smear.image()
    present = sum(
        1 << bit for bit, kind in enumerate(CELL_KINDS) if any(box.label == kind.label for box in smear.boxes)
    )
    wanted_sets = [kinds for kinds in range(1, 2 ** len(CELL_KINDS)) if kinds & present == kinds]
    if not wanted_sets:
        return
    for number in range(num_windows):
        wanted = wanted_sets[int(rng.integers(len(wanted_sets)))]
        window = _find_window(smear, wanted, sides, rng)
        if window is None:
            continue
        left, top, side, labels = window
        cut = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        pixels = np.rot90(np.asarray(cut), k=int(rng.integers(4)))
        pixels = pixels[:, ::-1] if rng.integers(2) else pixels
        caption, concepts = write_caption(labels)
        yield FigureRow(
            row_id=f"bccd-{smear.smear_id}-{number:03d}",
            caption=caption,
            concepts=concepts,
            image_bytes=_png(np.ascontiguousarray(pixels)),
            license=LICENSE,
            modality=MODALITY,
        )


def _rows(
    folder: Path,
    split: str,
    windows_per_image: int,
    sides: tuple[int, int],
    size: int,
    seed: int,
    dropped: list[Drop],
) -> Iterator[FigureRow]:
    for number, smear in enumerate(read_smears(folder, split)):
        if isinstance(smear, Drop):
            dropped.append(smear)
        elif windows_per_image:
            rng = np.random.default_rng((seed, tuple(SPLIT_FILES).index(split), number))
            yield from cut_windows(smear, windows_per_image, sides, size, rng)
        else:
            yield smear_row(smear)


def _find_window(
    smear: BloodSmear, wanted: int, sides: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int, int, list[str]] | None:
    """(left, top, side, labels of the cells inside) of a window with the wanted kinds; any clear one where none has."""
    greatest = min(sides[1], smear.width, smear.height)
    side = (
        np.exp(rng.uniform(np.log(sides[0]), np.log(sides[1]), _NUM_TRIES)).round().astype(np.int64).clip(1, greatest)
    )
    left = rng.integers(0, smear.width - side, endpoint=True)
    top = rng.integers(0, smear.height - side, endpoint=True)
    is_named, is_half_seen = _cells_inside(smear.boxes, left, top, side)
    bits = np.array([1 << CELL_KINDS.index(_KIND_OF_LABEL[box.label]) for box in smear.boxes], dtype=np.int64)
    kinds = np.bitwise_or.reduce(np.where(is_named, bits, 0), axis=1)
    half_seen = np.bitwise_or.reduce(np.where(is_half_seen, bits, 0), axis=1)
    is_clear = (half_seen & ~kinds == 0) & (kinds > 0)
    fitting = np.flatnonzero(is_clear & (kinds == wanted))
    chosen = fitting if len(fitting) else np.flatnonzero(is_clear)
    if not len(chosen):
        return None
    first = int(chosen[0])
    labels = [box.label for box, is_inside in zip(smear.boxes, is_named[first], strict=True) if is_inside]
    return int(left[first]), int(top[first]), int(side[first]), labels


def _cells_inside(
    boxes: Sequence[CellBox], left: NDArray[np.int64], top: NDArray[np.int64], side: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which cells (windows, boxes) are enough inside a window to be named, and which only show in it."""
    corners = np.array([(box.left, box.top, box.right, box.bottom) for box in boxes]).reshape(-1, 4).T  # (4, boxes)
    left, top, side = left[:, None], top[:, None], side[:, None]
    width = np.minimum(corners[2], left + side) - np.maximum(corners[0], left)
    height = np.minimum(corners[3], top + side) - np.maximum(corners[1], top)
    inside = width.clip(0) * height.clip(0)
    area = (corners[2] - corners[0]) * (corners[3] - corners[1])
    is_named = (inside >= _MIN_INSIDE * area) | (inside >= _MIN_SHARE_OF_WINDOW * side * side)
    return is_named, ~is_named & (inside > _MAX_UNNAMED * area)


def _read_list(folder: Path, split: str) -> list[str]:
    if split not in SPLIT_FILES:
        raise ValueError(f"split must be one of {', '.join(SPLIT_FILES)}, got {split!r}")
    lists: dict[str, list[str]] = {}
    for name, file in SPLIT_FILES.items():
        path = folder / "splits" / file
        if path.is_file():
            lists[name] = path.read_text(encoding="utf-8").split()
    if not lists.get(split):
        raise ValueError(f"{folder / 'splits' / SPLIT_FILES[split]} is missing or empty: it lists the split {split!r}.")
    seen = Counter(smear_id for listed in lists.values() for smear_id in listed)
    repeated = sorted(smear_id for smear_id in lists[split] if seen[smear_id] > 1)
    if repeated:
        raise ValueError(f"{folder / 'splits'} lists {repeated[:5]} more than once: each picture belongs to one split.")
    return lists[split]


def _read_smear(folder: Path, smear_id: str) -> BloodSmear | Drop:
    try:
        content = read_file(path_inside(folder, f"images/{smear_id}.jpg"))
        image = decode_image(open_image(content, f"{smear_id}.jpg"), f"{smear_id}.jpg")
        xml = read_file(path_inside(folder, f"annotations/{smear_id}.xml"), MAX_ANNOTATION_BYTES)
        boxes = parse_boxes(xml, image.size)
    except UnreadableImage as error:
        return Drop(error.reason, error.detail, smear_id)
    except ValueError as error:
        return Drop("annotation unreadable", str(error), smear_id)
    return BloodSmear(smear_id, content, *image.size, boxes)


def parse_boxes(xml: bytes, size_wh: tuple[int, int]) -> tuple[CellBox, ...]:
    """The cells of a Pascal VOC file, boxes cut to the picture; boxes without area are left out.

    Args:
        xml: the file.
        size_wh: of the picture that was decoded; the file must say the same.

    Raises:
        ValueError: no such XML, another size, an unknown kind of cell, a box that is no four numbers.
    """
    text = xml.decode("utf-8-sig")  # a UnicodeDecodeError is a ValueError
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("it declares a document type, which an annotation has no use for")
    try:
        root = ElementTree.fromstring(text)  # noqa: S314 - without a document type there are no entities
    except ElementTree.ParseError as error:
        raise ValueError(f"it is no XML: {error}") from error
    declared = (root.findtext("size/width"), root.findtext("size/height"))
    if declared != (str(size_wh[0]), str(size_wh[1])):
        raise ValueError(f"it is for a picture of {declared[0]} × {declared[1]}, not {size_wh[0]} × {size_wh[1]}")
    boxes = [_box(cell, size_wh) for cell in root.iter("object")]
    return tuple(box for box in boxes if box.right > box.left and box.bottom > box.top)


def _box(cell: ElementTree.Element, size_wh: tuple[int, int]) -> CellBox:
    label = (cell.findtext("name") or "").strip()
    if label not in _KIND_OF_LABEL:
        raise ValueError(f"it names a cell {label!r}; known are {', '.join(_KIND_OF_LABEL)}")
    corners = [cell.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = (int(float(corner or "")) for corner in corners)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"a box of {label} is {corners}, not four numbers") from error
    width, height = size_wh
    # Pascal VOC counts from 1 and includes the last pixel, so [xmin - 1, xmax) is the box counted from 0.
    return CellBox(label, max(left - 1, 0), max(top - 1, 0), min(right, width), min(bottom, height))


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
