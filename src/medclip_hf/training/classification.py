"""Labels as a training target: labelled images and scans, their batches, the weights of rare labels, the objective."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from medclip_hf.data.ct.scan_index import read_scan_rows
from medclip_hf.data.hospital.rows import label_vector, read_labels
from medclip_hf.data.images import UnreadableImage
from medclip_hf.data.parquet import record_to_row
from medclip_hf.data.records import ScanRow
from medclip_hf.data.stages import Drop
from medclip_hf.modeling.conceptclip.image_classification_conceptclip import SINGLE_LABEL, classification_loss
from medclip_hf.modeling.fvlm.anatomy_classification_fvlm import finding_loss
from medclip_hf.processing.pixels import SCALING, figure_scaling, scaled_pixels, stacked_figures
from medclip_hf.training.collators import ScanCollator
from medclip_hf.training.datasets import FigureDataset
from medclip_hf.training.distributed import gather_counts, gather_rows, num_processes, process_index, sum_over_processes
from medclip_hf.training.scan_datasets import PUBLISHED_FLIP_PROBABILITY, ScanDataset, ScanExample
from medclip_hf.training.signals import ignore_stop_signals

UNKNOWN = -100  # the label of what is not known; the losses leave it out

Batch = Mapping[str, Any]
Floats = NDArray[np.float32]


class LabelledDataset(Protocol):
    """A map-style data set whose labels are known without reading an image.

    Attributes:
        row_ids: N ids, in the order of the rows.
        patient_ids: N pseudonyms.
        labels: (N, K) float32, 1 present, 0 absent, NaN unknown.
    """

    row_ids: list[str]
    patient_ids: list[str]
    labels: Floats

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...


@dataclass(frozen=True)
class LabelledFigure:
    """An image in the size of the model's input, and its labels (K,), NaN where unknown."""

    row_id: str
    image: Image.Image
    labels: Floats


@dataclass(frozen=True)
class LabelledScan:
    """A crop of a scan, and the labels (K,) of the whole scan, NaN where unknown."""

    scan: ScanExample
    labels: Floats


class LabelledFigureDataset(FigureDataset):
    """A map-style data set of `LabelledFigure`: figures as `FigureDataset` reads them, with or without captions.

    Args:
        folder: as `scripts/prepare_hospital.py` writes it.
        split: ``train``, ``validation`` or ``test``.
        classes: names of the labels, in the order of the model's.
        options: of `FigureDataset`.

    Raises:
        ValueError: the folder holds no such split, or not one of its rows has a label of these classes.
    """

    def __init__(
        self, folder: str | os.PathLike[str], split: str = "train", *, classes: Sequence[str], **options: Any
    ) -> None:
        super().__init__(folder, split, **options)
        known = read_labels(self.folder, split)
        if len(known) != len(self):
            raise ValueError(f"the split {split} of {folder} has {len(self)} rows, but {len(known)} distinct row ids.")
        self.classes = tuple(classes)
        self.row_ids = list(known)
        self.patient_ids = [patient for patient, _ in known.values()]
        self.labels = label_matrix([labels for _, labels in known.values()], self.classes)
        check_some_label(self.labels, self.classes, f"the split {split} of {folder}")

    def __getitem__(self, key: int | tuple[int, int]) -> LabelledFigure | Drop:  # type: ignore[override]
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a data set with {len(self)} rows")
        row = record_to_row(self._rows[int(index)])
        try:
            image = self._read_image(row, np.random.default_rng((self.seed, epoch, index)))
        except UnreadableImage as error:
            return Drop(error.reason, error.detail, row.row_id)
        return LabelledFigure(row.row_id, image, self.labels[index])


class LabelledScanDataset(ScanDataset):
    """A map-style data set of `LabelledScan`: studies with labels, with or without a report.

    Args:
        folder: as `scripts/prepare_hospital.py` or `scripts/prepare_ct.py` writes it.
        split: ``train``, ``validation`` or ``test``.
        classes: names of the findings, in the order of the model's.
        anatomies: of the model, in its order.
        size_dhw: of the crops.
        seed: of reconstruction, crop and flips.
        random_crop: False centres the crop and takes the first reconstruction.
        flip_probability: of each axis (depth, height, width).

    Raises:
        ValueError: the folder has no such split, no study with a label of these classes, or lacks an anatomy.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str = "train",
        *,
        classes: Sequence[str],
        anatomies: Sequence[str],
        size_dhw: Sequence[int],
        seed: int = 0,
        random_crop: bool = True,
        flip_probability: tuple[float, float, float] = (PUBLISHED_FLIP_PROBABILITY,) * 3,
    ) -> None:
        self.classes = tuple(classes)
        super().__init__(
            folder,
            split,
            anatomies=anatomies,
            size_dhw=size_dhw,
            seed=seed,
            random_crop=random_crop,
            flip_probability=flip_probability,
        )
        firsts = [scans[0] for scans in self._studies]
        self.row_ids = [row.scan_id for row in firsts]
        self.patient_ids = [row.patient_id for row in firsts]
        self.labels = label_matrix([row.labels for row in firsts], self.classes)

    def _read_studies(self, split: str) -> list[tuple[ScanRow, ...]]:
        """Studies with a label, whether or not they have a report."""
        return _studies_with_labels(read_scan_rows(self.folder, split), self.classes, self.folder, split)

    def first_scans(self) -> list[ScanRow]:
        """The first reconstruction of each study, in the order of the rows."""
        return [scans[0] for scans in self._studies]

    def __getitem__(self, key: int | tuple[int, int]) -> LabelledScan | Drop:  # type: ignore[override]
        index = key[1] if isinstance(key, tuple) else key
        example = super().__getitem__(key)
        return example if isinstance(example, Drop) else LabelledScan(example, self.labels[int(index)])


class LabelledFigureCollator:
    """Stacks labelled images; their pixels are scaled on the device, see `processing.pixels`.

    Args:
        processor: a `ConceptCLIPProcessor`.
        num_classes: K.
        is_single_label: whether exactly one of the classes is present in an image.

    Returns (of a call):
        pixel_values (B, 3, H, W) uint8, pixel_scaling (B, 2, 3), labels (B,) or (B, K) int64 with -100 for unknown,
        row_ids and set_aside. An image whose single label is unknown, or of which several are present, is set aside.
    """

    def __init__(self, processor: Any, num_classes: int, *, is_single_label: bool) -> None:
        self.processor = processor
        self.num_classes = num_classes
        self.is_single_label = is_single_label

    def __call__(self, examples: Sequence[LabelledFigure | Drop]) -> dict[str, Any]:
        """One batch as a dict of tensors and two lists."""
        checked = [self._checked(example) for example in examples]
        figures = [example for example in checked if isinstance(example, LabelledFigure)]
        size = self.processor.image_processor.size
        images = [figure.image for figure in figures] or [Image.new("RGB", (int(size["width"]), int(size["height"])))]
        rows = np.array([figure.labels for figure in figures], dtype=np.float32).reshape(-1, self.num_classes)
        labels = torch.from_numpy(rows)
        targets = labels.nan_to_num().argmax(dim=1) if self.is_single_label else to_targets(labels)
        return {
            "pixel_values": stacked_figures(images)[: len(figures)],
            SCALING: figure_scaling(self.processor.image_processor, len(figures)),
            "labels": targets,
            "row_ids": [figure.row_id for figure in figures],
            "set_aside": [drop_record(example) for example in checked if isinstance(example, Drop)],
        }

    def _checked(self, example: LabelledFigure | Drop) -> LabelledFigure | Drop:
        if isinstance(example, Drop) or not self.is_single_label:
            return example
        num_present = int(np.nansum(example.labels))
        if num_present == 1:
            return example
        return Drop("not exactly one label", f"{num_present} of the classes are present", example.row_id)


class LabelledScanCollator(ScanCollator):
    """Stacks the crops and masks the labels of anatomies that a crop does not hold completely.

    Args:
        processor: an `FVLMProcessor`.
        anatomy_index: K places of the findings' anatomies.
        needs_whole_anatomy: a finding may lie in the part of its anatomy that a random crop left out; False keeps the
            labels, for crops that hold as much as will ever be seen.

    Returns (of a call):
        pixel_values (B, 1, D, H, W) int16, pixel_scaling (B, 2, 1), anatomy_mask (B, D, H, W), labels (B, K) int64 with
        -100 for unknown or not complete, row_ids and set_aside.
    """

    def __init__(self, processor: Any, anatomy_index: Sequence[int], *, needs_whole_anatomy: bool = True) -> None:
        super().__init__(processor, raw_pixels=True)
        self.anatomy_index = list(anatomy_index)
        self.needs_whole_anatomy = needs_whole_anatomy

    def __call__(self, examples: Sequence[LabelledScan | Drop]) -> dict[str, Any]:  # type: ignore[override]
        """One batch as a dict of tensors and two lists."""
        found = [example for example in examples if isinstance(example, LabelledScan)]
        for example in found:
            self._check(example.scan)
        labels = [self._known(example) for example in found]
        return self._volumes([example.scan for example in found]) | {
            "labels": to_targets(torch.tensor(np.array(labels).reshape(-1, len(self.anatomy_index)))),
            "row_ids": [example.scan.row_id for example in found],
            "set_aside": [drop_record(example) for example in examples if isinstance(example, Drop)],
        }

    def _known(self, example: LabelledScan) -> Floats:
        """The labels that the crop can tell, NaN for others."""
        if not self.needs_whole_anatomy:
            return example.labels
        return np.where(example.scan.is_complete[self.anatomy_index], example.labels, np.nan).astype(np.float32)


class ClassificationObjective:
    """Cross entropy of the labels over the global batch, rare labels weighted up.

    Weights alone would make rare labels look likely: with weight w the best logit is log(w p / (1 - p)). The loss
    therefore sees logits + log w, so that the model's own logits come to stand for p, whatever the weights.

    Args:
        problem_type: "single_label_classification", or "multi_label_classification" with missing logits (NaN) left out.
        class_weights (K,): see `class_weights`; None: all 1.
    """

    model_inputs = ("pixel_values", "anatomy_mask", "image_embeds", "anatomy_embeds")

    def __init__(self, problem_type: str, class_weights: Tensor | None = None) -> None:
        self.problem_type = problem_type
        self.class_weights = class_weights

    def split(self, batch: Batch, num_chunks: int) -> list[Batch]:
        """At most `num_chunks` micro-batches of nearly equal size; at least one."""
        num_rows = len(batch["labels"])
        num_chunks = min(num_chunks, max(num_rows, 1))
        bounds = [num_rows * chunk // num_chunks for chunk in range(num_chunks + 1)]
        by_row = {name: values for name, values in batch.items() if name != "set_aside"}
        return [{name: values[start:stop] for name, values in by_row.items()} for start, stop in pairwise(bounds)]

    def embed(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The model's `logits` (B, K). A batch without rows gives none that still depend on every parameter."""
        inputs = {name: batch[name] for name in self.model_inputs if name in batch}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = scaled_pixels(batch)
        num_rows = len(batch["labels"])
        if num_rows == 0:  # a row of ones in place of none: data-parallel training waits for every gradient
            inputs = {name: value.new_ones((1, *value.shape[1:])) for name, value in inputs.items()}
        return {"logits": model(**inputs).logits[:num_rows]}

    def compare(self, embeddings: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """`loss` to call backward on, and the global mean for the log."""
        logits, labels = embeddings["logits"].float(), batch["labels"]
        weights = None if self.class_weights is None else self.class_weights.to(logits.device)
        if weights is not None:
            logits = logits + weights.log()
        if self.problem_type == SINGLE_LABEL:
            mean = classification_loss(logits, labels, SINGLE_LABEL, weights)
            shares = torch.ones_like(labels, dtype=torch.float32) if weights is None else weights[labels.clamp(min=0)]
            count = (shares * (labels != UNKNOWN)).sum()
        else:
            mean = finding_loss(logits, labels, weights)
            count = ((labels >= 0) & ~logits.isnan()).sum().float()
        share = mean * count / sum_over_processes(count).clamp(min=1e-8)
        total = sum_over_processes(share)
        # A sum over no known label has no graph: the empty one of the logits takes its place.
        return {"loss": share * num_processes() + 0.0 * logits.nan_to_num().sum(), "classification_loss": total}


class FeatureDataset:
    """Embeddings instead of images: what a linear probe trains on, computed once.

    Args:
        dataset: whose rows were embedded.
        rows (n,): the rows that could be read.
        features (n, ...): their embeddings, on the CPU.
        name: of the model's input that takes them.
        is_single_label: of the labels.
    """

    def __init__(
        self, dataset: LabelledDataset, rows: NDArray[np.int64], features: Tensor, name: str, *, is_single_label: bool
    ) -> None:
        self.row_ids = [dataset.row_ids[row] for row in rows]
        self.patient_ids = [dataset.patient_ids[row] for row in rows]
        self.labels = dataset.labels[rows]
        self.features = features
        self.name = name
        labels = torch.from_numpy(self.labels)
        is_usable = labels.nansum(dim=1) == 1 if is_single_label else torch.ones(len(labels), dtype=torch.bool)
        self.targets = to_targets(labels)
        if is_single_label:
            self.targets = torch.where(is_usable, labels.nan_to_num().argmax(dim=1), UNKNOWN)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, key: int | tuple[int, int]) -> int:
        return key[1] if isinstance(key, tuple) else key

    def collate(self, indices: Sequence[int]) -> dict[str, Any]:
        """The batch of these rows."""
        return {
            self.name: self.features[list(indices)],
            "labels": self.targets[list(indices)],
            "row_ids": [self.row_ids[index] for index in indices],
            "set_aside": [],
        }


# Running a model over all rows -----------------------------------------------------------------------------------


@torch.no_grad()
def run_over_rows(
    dataset: LabelledDataset,
    collator: Callable[[list[Any]], dict[str, Any]],
    forward: Callable[[dict[str, Any]], Tensor],
    *,
    batch_size: int,
    device: torch.device,
    num_workers: int = 0,
    description: str | None = None,
) -> tuple[NDArray[np.int64], Tensor]:
    """(n,) the rows that could be read, in order, and (n, ...) what `forward` gives for them, on the CPU.

    Every process runs over its share, and all get everything.

    Args:
        dataset: without anything random, since each row is read once.
        collator: gives `row_ids` and `set_aside` beside the tensors.
        forward: batch, its pixels scaled → (B, ...).
        batch_size: rows at a time.
        device: of the model.
        num_workers: reading processes.
        description: of a progress bar, on a terminal; None: no bar.

    Raises:
        ValueError: not one row could be read.
    """
    place = {row_id: index for index, row_id in enumerate(dataset.row_ids)}
    mine = list(range(process_index(), len(dataset), num_processes()))
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    loader: Any = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=num_workers,
        worker_init_fn=ignore_stop_signals,
    )
    rows: list[int] = []
    values: list[Tensor] = []
    for batch in tqdm(loader, desc=description, disable=True if description is None else None):
        if batch["row_ids"]:
            rows += [place[row_id] for row_id in batch["row_ids"]]
            moved = {name: _moved(value, device) for name, value in batch.items()}
            if "pixel_values" in moved:
                moved["pixel_values"] = scaled_pixels(moved)
                moved.pop(SCALING, None)  # done: an objective's `embed` is to leave them so
            values.append(forward(moved).float())
    if not rows:
        raise ValueError(f"none of {len(dataset)} rows could be read, the first: {dataset.row_ids[:3]}.")
    counts = [count for (count,) in gather_counts([len(rows)], device)]
    all_rows = gather_rows(torch.tensor(rows, device=device), counts).cpu().numpy()
    everything = gather_rows(torch.cat(values), counts).cpu()
    order = np.argsort(all_rows, kind="stable")
    return all_rows[order], everything[torch.from_numpy(order)]


# Labels ----------------------------------------------------------------------------------------------------------


def label_matrix(labels: Sequence[Any], classes: Sequence[str]) -> Floats:
    """(N, K): 1 present, 0 absent, NaN unknown, of N tuples of (finding, is_present)."""
    if not labels:
        return np.empty((0, len(classes)), dtype=np.float32)
    return np.stack([label_vector(row, classes) for row in labels])


def to_targets(labels: Tensor) -> Tensor:
    """Labels as whole numbers, -100 where they are NaN."""
    return torch.where(labels.isnan(), float(UNKNOWN), labels).long()


def check_some_label(labels: Floats, classes: Sequence[str], where: str) -> None:
    """Raise a ValueError where not a single label is known."""
    if np.isnan(labels).all():
        raise ValueError(f"no row in {where} has a label of the classes {list(classes)}. Name classes that it has.")


def check_both_values(labels: Floats, classes: Sequence[str]) -> None:
    """Raise a ValueError where a class of the training rows is always or never present.

    Args:
        labels: (N, K) float, NaN unknown.
        classes: K names.
    """
    present, absent = np.nansum(labels == 1, axis=0), np.nansum(labels == 0, axis=0)
    constant = {
        name: f"{int(positives)} present, {int(negatives)} absent"
        for name, positives, negatives in zip(classes, present, absent, strict=True)
        if not positives or not negatives
    }
    if constant:
        told = "; ".join(f"{name!r}: {counts}" for name, counts in constant.items())
        raise ValueError(
            f"there is nothing to learn where all rows are alike, but in the training split {told}. Leave these out "
            "with task.classes, or bring rows of both kinds."
        )


def class_weights(
    labels: Floats, kind: Literal["none", "balanced"], *, is_single_label: bool, largest: float = 20.0
) -> Tensor | None:
    """(K,) weights that make up for rare labels; None for "none".

    Several labels: negatives / positives, the weight of a positive. A single label: rows / (K · rows of the class). No
    weight exceeds `largest`: a handful of rows must not carry the gradient alone.

    Args:
        labels: (N, K) float, NaN unknown.
        kind: "balanced" or "none".
        is_single_label: of the labels.
        largest: bound of the weights.
    """
    if kind == "none":
        return None
    present, absent = np.nansum(labels == 1, axis=0), np.nansum(labels == 0, axis=0)
    if is_single_label:
        weights = present.sum() / (len(present) * np.maximum(present, 1))
    else:
        weights = absent / np.maximum(present, 1)
    return torch.tensor(np.clip(weights, 1 / largest, largest), dtype=torch.float32)


def check_patients_disjoint(patients: Mapping[str, Sequence[str]]) -> None:
    """Raise a ValueError where a patient is in two splits.

    Args:
        patients: split → pseudonyms.
    """
    for (one, ours), (other, theirs) in _pairs(patients):
        if shared := sorted(set(ours) & set(theirs)):
            raise ValueError(
                f"{len(shared)} patients are in both {one} and {other}, such as {shared[0]}: figures of the one would "
                "be remembered from the other. Split by patient; scripts/prepare_hospital.py does."
            )


def _pairs(patients: Mapping[str, Sequence[str]]) -> list[tuple[tuple[str, Sequence[str]], tuple[str, Sequence[str]]]]:
    items = list(patients.items())
    return [(items[i], items[j]) for i in range(len(items)) for j in range(i + 1, len(items))]


def _studies_with_labels(
    rows: Sequence[ScanRow], classes: Sequence[str], folder: Path, split: str
) -> list[tuple[ScanRow, ...]]:
    """The reconstructions of each study that has a label of these classes, ordered by study and scan."""
    studies: dict[str, list[ScanRow]] = {}
    for row in rows:
        if set(classes) & {name for name, _ in row.labels}:
            studies.setdefault(row.study_id, []).append(row)
    if not studies:
        raise ValueError(f"no scan in the split {split} of {folder} has a label of {list(classes)}.")
    return [tuple(sorted(studies[name], key=lambda row: row.scan_id)) for name in sorted(studies)]


def drop_record(drop: Drop) -> dict[str, str]:
    """What the run record keeps of a row that could not be used."""
    return {"row_id": drop.row_id, "reason": drop.reason, "detail": drop.detail}


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
