"""CT scans with the texts of their anatomies as training examples: one random reconstruction and crop a study."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medclip_hf.data.ct.anatomy import renumbered
from medclip_hf.data.ct.geometry import GeometryContract, UnusableScan
from medclip_hf.data.ct.scan_index import read_scan_rows
from medclip_hf.data.ct.volumes import StoredScan, crop_start, is_complete, read_crop, read_scan
from medclip_hf.data.records import AnatomyText, ScanRow
from medclip_hf.data.reports.decomposition import anatomy_caption, caption_template
from medclip_hf.data.reports.sentences import split_sentences
from medclip_hf.data.stages import Drop

logger = logging.getLogger(__name__)

Size = tuple[int, int, int]

PUBLISHED_FLIP_PROBABILITY = 0.2  # of each axis; the release has no other augmentation beside the random crop


@dataclass(frozen=True)
class ScanExample:
    """One crop of one reconstruction, ready for the collator.

    Args:
        row_id: of the scan.
        image: (D, H, W) int16, Hounsfield units.
        anatomy_mask: (D, H, W) uint8, 0 = background, i + 1 = anatomy i.
        is_complete: (A,) bool, the anatomy lies completely inside the crop.
        texts: A captions, empty where there is none.
        is_abnormal: (A,) bool, the report describes something abnormal.
    """

    row_id: str
    image: NDArray[np.int16]
    anatomy_mask: NDArray[np.uint8]
    is_complete: NDArray[np.bool_]
    texts: tuple[str, ...]
    is_abnormal: NDArray[np.bool_]


class ScanDataset:
    """A map-style data set of `ScanExample`: studies with a report, the same for any number of workers and resumes.

    The key of an example is `(epoch, index)`, or `index` alone for epoch 0; index counts studies. Which reconstruction
    of the study is taken, where it is cropped and how it is flipped depends on (seed, epoch, index) and nothing else.
    A scan that cannot be read gives a `Drop`.

    A flip along the width swaps left and right, which texts may name; it is published that way. Set its probability
    to 0 where sides matter.

    Args:
        folder: as `scripts/prepare_ct.py` writes it.
        split: ``train``, ``validation`` or ``test``.
        anatomies: of the model, in its order. Those of the folder may be more, or in another order.
        size_dhw: of the crops: the model's `image_size_dhw`. Smaller scans are padded evenly.
        seed: of reconstruction, crop and flips.
        random_crop: False centres the crop and takes the first reconstruction, for losses on a validation split.
        flip_probability: of each axis (depth, height, width); the published 0.2 by default.
        whole_volume: compare the whole volume with the whole report, as CLIP does: `anatomies` then holds one name, to
            which every voxel of the scan belongs.

    Raises:
        ValueError: the folder has no such split, no study with a report, or lacks one of the anatomies.

    Examples:
        >>> dataset = ScanDataset("prepared", anatomies=("lung", "heart"), size_dhw=(112, 256, 352))  # doctest: +SKIP
        >>> example = dataset[(0, 17)]  # a ScanExample, or a Drop with the reason  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str = "train",
        *,
        anatomies: Sequence[str],
        size_dhw: Sequence[int],
        seed: int = 0,
        random_crop: bool = True,
        flip_probability: tuple[float, float, float] = (PUBLISHED_FLIP_PROBABILITY,) * 3,
        whole_volume: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.anatomies = tuple(anatomies)
        depth, height, width = size_dhw
        self.size_dhw: Size = (depth, height, width)
        self.seed = seed
        self.random_crop = random_crop
        self.flip_probability = flip_probability
        self.whole_volume = whole_volume
        if min(self.size_dhw) < 1:
            raise ValueError(f"size_dhw must be at least 1 voxel along each axis, got {self.size_dhw}")
        if len(flip_probability) != 3 or not all(0 <= share <= 1 for share in flip_probability):
            raise ValueError(
                f"flip_probability must be three probabilities (depth, height, width), got {flip_probability}"
            )
        if whole_volume and len(self.anatomies) != 1:
            raise ValueError(
                f"whole_volume compares one vector a scan, but the model has the anatomies {self.anatomies}. Give it "
                "one, such as ('body',)."
            )
        self._studies = self._read_studies(split)
        self.contract = self._check_store()

    def _read_studies(self, split: str) -> list[tuple[ScanRow, ...]]:
        """The scans of each study that this data set is about."""
        return _studies_with_texts(read_scan_rows(self.folder, split), self.folder, split)

    def __len__(self) -> int:
        return len(self._studies)

    def __getitem__(self, key: int | tuple[int, int]) -> ScanExample | Drop:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"study {index} of a data set with {len(self)} studies")
        rng = np.random.default_rng((self.seed, epoch, index))
        scans = self._studies[int(index)]
        row = scans[int(rng.integers(len(scans)))] if self.random_crop else scans[0]
        try:
            image, mask = self._read_crop(row, rng)
        except UnusableScan as error:
            return Drop(error.reason, error.detail, row.scan_id)
        texts, is_abnormal = self._texts(row)
        complete = np.ones(1, dtype=bool) if self.whole_volume else is_complete(mask, len(self.anatomies))
        return ScanExample(row.scan_id, image, mask, complete, texts, is_abnormal)

    def rows(self) -> list[ScanRow]:
        """All scans of the studies."""
        return [row for scans in self._studies for row in scans]

    def labelled_rows(self) -> list[ScanRow]:
        """One scan for each study whose findings are labelled, for evaluation."""
        return [scans[0] for scans in self._studies if scans[0].labels]

    def read_whole(self, row: ScanRow) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        """Image in Hounsfield units and anatomy mask of a whole scan, (D, H, W) each, neither cropped nor flipped.

        Raises:
            UnusableScan: it cannot be read.
        """
        path = self.folder / row.store_path
        if not self.whole_volume:
            return read_stored_scan(path, self.anatomies)[1:]
        image, mask = read_crop(path)
        return image, np.ones_like(mask)

    def captions(self) -> list[str]:
        """The texts of all studies, anatomy by anatomy, equal ones repeated."""
        return [text for scans in self._studies for text in self._texts(scans[0])[0] if text]

    def _check_store(self) -> GeometryContract:
        """The contract that the scans keep, all of one folder the same, after a look at the first readable one."""
        for row in self.rows():
            try:
                scan = read_scan(self.folder / row.store_path)
            except UnusableScan as error:
                logger.warning("%s", error)
                continue
            if not self.whole_volume:
                _new_ids(scan, self.anatomies)
            return scan.contract
        raise ValueError(f"no scan in {self.folder} can be read. Prepare them again with scripts/prepare_ct.py.")

    def _read_crop(self, row: ScanRow, rng: np.random.Generator) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        path = self.folder / row.store_path
        scan = read_scan(path)
        start = crop_start(scan.shape_dhw, self.size_dhw, rng if self.random_crop else None)
        image, mask = read_crop(path, start, self.size_dhw)
        if self.whole_volume:
            mask = _inside_scan(scan.shape_dhw, start, self.size_dhw)
        else:
            mask = _renumbered(mask, scan, self.anatomies)
        if self.random_crop:
            axes = tuple(axis for axis in range(3) if rng.random() < self.flip_probability[axis])
            image, mask = _flipped(image, axes), _flipped(mask, axes)
        return image, mask

    def _texts(self, row: ScanRow) -> tuple[tuple[str, ...], NDArray[np.bool_]]:
        if self.whole_volume:
            caption = report_caption(row.anatomy_texts, self.anatomies[0])
            return (caption,), np.array([any(text.is_abnormal for text in row.anatomy_texts)])
        by_anatomy = {text.anatomy: text for text in row.anatomy_texts}
        texts = [by_anatomy.get(name) for name in self.anatomies]
        captions = tuple("" if text is None else anatomy_caption(text) for text in texts)
        return captions, np.array([text is not None and text.is_abnormal for text in texts])


def read_stored_scan(path: Path, anatomies: Sequence[str]) -> tuple[StoredScan, NDArray[np.int16], NDArray[np.uint8]]:
    """What is known of a scan, its whole image in Hounsfield units, and its mask with the ids of a model.

    Args:
        path: of the scan in the store.
        anatomies: of the model, in its order.

    Raises:
        UnusableScan: it cannot be read.
        ValueError: it was prepared without one of the anatomies.
    """
    scan = read_scan(path)
    image, mask = read_crop(path)
    return scan, image, _renumbered(mask, scan, anatomies)


def stored_scan_inputs(path: Path, image_processor: Any) -> tuple[Tensor, Tensor]:
    """Volume (D, H, W) in [0, 1] and mask (D, H, W) of ids of a whole prepared scan, as the model takes them.

    Args:
        path: of the scan in the store.
        image_processor: of the model.

    Raises:
        UnusableScan: it cannot be read.
        ValueError: it was prepared for another geometry than the model's, or without one of its anatomies.
    """
    scan, image, mask = read_stored_scan(path, image_processor.anatomies)
    inputs = image_processor(
        image,
        anatomy_mask=mask,
        spacing_mm_dhw=scan.spacing_mm_dhw,
        orientation=scan.contract.orientation,
        do_crop=False,  # the engine did
    )
    return inputs["pixel_values"][0, 0], inputs["anatomy_mask"][0]


def report_caption(texts: Sequence[AnatomyText], anatomy: str = "body") -> str:
    """What a report says of all anatomies: impressions, then findings, a sentence that several share only once.

    Args:
        texts: of one scan. Sentences that were assigned to none of these anatomies are not in the index, nor here.
        anatomy: named in the template that stands for a report with nothing to say.
    """
    sections = [text.impression for text in texts] + [text.findings for text in texts]
    sentences = dict.fromkeys(sentence for section in sections for sentence in split_sentences(section))
    caption = " ".join(sentence if sentence.endswith(".") else f"{sentence}." for sentence in sentences)
    return caption or caption_template(anatomy)


def _studies_with_texts(rows: Sequence[ScanRow], folder: Path, split: str) -> list[tuple[ScanRow, ...]]:
    """The reconstructions of each study that has a report, ordered by study and scan."""
    studies: dict[str, list[ScanRow]] = {}
    for row in rows:
        if row.anatomy_texts:
            studies.setdefault(row.study_id, []).append(row)
    without = len({row.study_id for row in rows} - studies.keys())
    if without:
        logger.warning("%d studies of %s have no report and are left out", without, split)
    if not studies:
        raise ValueError(f"no study of the split {split} in {folder} has a report: there is nothing to compare with")
    return [tuple(sorted(studies[name], key=lambda row: row.scan_id)) for name in sorted(studies)]


def _renumbered(mask: NDArray[np.uint8], scan: StoredScan, anatomies: Sequence[str]) -> NDArray[np.uint8]:
    return mask if scan.anatomies == tuple(anatomies) else renumbered(mask, _new_ids(scan, anatomies))


def _new_ids(scan: StoredScan, anatomies: Sequence[str]) -> NDArray[np.uint8]:
    """(256,): the id that the model has for each id of a stored mask; 0 for anatomies that it does not know."""
    missing = [name for name in anatomies if name not in scan.anatomies]
    if missing:
        raise ValueError(
            f"the model has the anatomies {missing}, but the scans were prepared with {list(scan.anatomies)} alone. "
            "Prepare them again with --anatomies, or train another model."
        )
    table = np.zeros(256, dtype=np.uint8)
    for number, name in enumerate(anatomies, start=1):
        table[scan.anatomies.index(name) + 1] = number
    return table


def _flipped(array: NDArray[Any], axes: tuple[int, ...]) -> NDArray[Any]:
    """The array turned round along the axes, contiguous; PyTorch does it three times as fast as NumPy."""
    return torch.flip(torch.from_numpy(array), axes).numpy() if axes else array


def _inside_scan(shape_dhw: Sequence[int], start_dhw: Sequence[int], size_dhw: Size) -> NDArray[np.uint8]:
    """1 for the voxels of a crop that lie inside the scan, 0 for padding."""
    mask = np.zeros(size_dhw, dtype=np.uint8)
    mask[
        tuple(slice(max(0, -start), max(0, full - start)) for start, full in zip(start_dhw, shape_dhw, strict=True))
    ] = 1
    return mask
