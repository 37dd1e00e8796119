"""The CT engine: every scan on its own from files to the array store, then one index over all of them.

Scans do not know of each other, so they are prepared by any number of processes, in any order, with the same result.
What a scan leaves behind appears whole or not at all; a run that was killed goes on where it stopped. In the folder:

    engine.json                       what the scans were prepared with; a run with other settings is refused
    volumes/<split>/<scan>.zarr       the arrays (`data.ct.volumes`)
    rows/<split>/<scan>.json          the row of the index, written after the arrays: the scan is done
    refused/<split>.jsonl             scan, reason and detail of those that could not be used
    <split>-00000-of-00001.parquet    the index (`data.ct.scan_index`), written last
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from medclip_hf.data.ct.anatomy import THORACIC_ANATOMIES, LabelVersion, bounding_box, margin_voxels, merge_table
from medclip_hf.data.ct.geometry import GeometryContract, UnusableScan, Volume
from medclip_hf.data.ct.reading import CTScan, load_ct, read_volume
from medclip_hf.data.ct.scan_index import record_to_row, row_to_record, write_scan_rows
from medclip_hf.data.ct.segmenters import Segmenter, segment
from medclip_hf.data.ct.sources import ScanSource
from medclip_hf.data.ct.volumes import FORMAT_VERSION, present_ids, write_scan
from medclip_hf.data.parquet import require_writable, write_text_atomically
from medclip_hf.data.records import AnatomyText, ScanRow
from medclip_hf.data.reports.decomposition import check_report, decompose_report
from medclip_hf.data.stages import Drop
from medclip_hf.data.workers import end_with_the_run, fork_server

logger = logging.getLogger(__name__)

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class EngineSettings:
    """What decides how a prepared scan looks; one folder holds scans of one such setting.

    Args:
        contract: orientation, spacing and window.
        anatomies: of the mask, in the order of the model's config.
        label_version: of the TotalSegmentator that wrote the label files.
        margin_mm_dhw: kept around the anatomies; the published 15, 20, 20 mm. None keeps the whole scan.
        normal_rule: see `data.reports.decomposition.decompose_report`.
    """

    contract: GeometryContract = field(default_factory=GeometryContract)
    anatomies: tuple[str, ...] = THORACIC_ANATOMIES
    label_version: LabelVersion = "v2"
    margin_mm_dhw: tuple[float, float, float] | None = (15.0, 20.0, 20.0)
    normal_rule: str = "impression"

    def __post_init__(self) -> None:
        merge_table(self.label_version, self.anatomies)  # raises for what cannot be merged

    def of_arrays(self) -> dict[str, Any]:
        """What decides how the arrays look, as JSON-able values."""
        values = json.loads(json.dumps(asdict(self)))
        del values["normal_rule"]
        return values | {"store_version": FORMAT_VERSION}


@dataclass(frozen=True)
class EngineReport:
    """What a run did.

    Args:
        num_prepared: scans in the index.
        num_resumed: how many an earlier run had prepared.
        num_without_texts: of these, how many have no report; they serve evaluation, not training.
        refused: reason → count.
        index: path of the index.
    """

    num_prepared: int
    num_resumed: int
    num_without_texts: int
    refused: dict[str, int]
    index: Path


def prepare_scans(
    sources: Sequence[ScanSource],
    folder: Path,
    split: str,
    settings: EngineSettings | None = None,
    *,
    num_workers: int = 1,
    segmenter: Segmenter | None = None,
    show_progress: bool = True,
) -> EngineReport:
    """Prepare the scans of a split and write their index; arrays that an earlier run finished are not touched.

    Args:
        sources: the scans, see `data.ct.sources`. Refused ones of an earlier run are tried again.
        folder: of the data set; created where absent.
        split: "train", "validation" or "test"; names folders and index.
        settings: must equal those of earlier runs into the folder.
        num_workers: processes. One prepares in this process.
        segmenter: labels scans that come without a label file.
        show_progress: draw a progress bar.

    Raises:
        ValueError: scan ids that repeat or cannot name a file, other settings than those of the folder, no scan at all.
    """
    settings = settings or EngineSettings()
    if segmenter is not None and segmenter.label_version != settings.label_version:
        raise ValueError(
            f"{segmenter.name} writes ids of TotalSegmentator {segmenter.label_version}, but label_version is "
            f"{settings.label_version}. Set it to {segmenter.label_version}, or use the other segmenter."
        )
    _check_sources(sources)
    require_writable(folder)
    _claim_folder(folder, settings)
    _remove_leftovers(folder, split)
    num_resumed = sum(_row_path(folder, split, source.scan_id).is_file() for source in sources)
    work = partial(prepare_scan, folder=folder, split=split, settings=settings, segmenter=segmenter)
    refused: dict[str, Drop] = {}
    with tqdm(total=len(sources), unit="scan", disable=not show_progress) as bar:
        for scan_id, drop in _each(work, sources, num_workers):
            if drop is not None:
                refused[scan_id] = drop
                bar.set_postfix(refused=len(refused))
            bar.update()
    counts = _write_refused(folder, split, refused)
    rows = [_read_row(_row_path(folder, split, source.scan_id)) for source in sources if source.scan_id not in refused]
    index = write_scan_rows(rows, folder, split)
    report = EngineReport(len(rows), num_resumed, sum(not row.anatomy_texts for row in rows), counts, index)
    logger.info("%s: %d scans prepared, %d refused %s", split, report.num_prepared, len(refused), counts or "")
    return report


def prepare_scan(
    source: ScanSource, *, folder: Path, split: str, settings: EngineSettings, segmenter: Segmenter | None = None
) -> tuple[str, Drop | None]:
    """The scan's id, and why it was refused if it was; arrays and row are on disk when this returns.

    Of a scan that an earlier run finished, the arrays are taken as they are, but identifiers, labels and texts are
    those of the source now: reports can be decomposed again without reading a volume again. Disk and memory errors
    pass through: they are no fault of the scan, and the run is to stop.
    """
    path = _row_path(folder, split, source.scan_id)
    try:
        if source.problem:
            raise UnusableScan("metadata missing", f"{source.image_path}: {source.problem}")
        texts = _anatomy_texts(source, settings)
        found = _read_row(path) if path.is_file() else None
        row = found or _prepare_arrays(source, folder, split, settings, segmenter)
    except UnusableScan as error:
        return source.scan_id, Drop(error.reason, error.detail)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # a fault nobody has thought of must not end a run over fifty thousand scans
        logger.exception("a scan met an unexpected error and is set aside")
        return source.scan_id, Drop("unexpected error", f"{source.image_path}: {type(error).__name__}: {error}")
    row = replace(
        row, study_id=source.study_id, patient_id=source.patient_id, anatomy_texts=texts, labels=source.labels
    )
    if row != found:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(row_to_record(row), ensure_ascii=False, sort_keys=True))
    return source.scan_id, None


def _prepare_arrays(
    source: ScanSource, folder: Path, split: str, settings: EngineSettings, segmenter: Segmenter | None
) -> ScanRow:
    """The row of a scan, without its texts, once its arrays are in the store."""
    scan = _load(source, folder, split, settings, segmenter)
    image, mask = _crop_to_anatomies(scan, settings)
    store_path = f"volumes/{split}/{source.scan_id}.zarr"
    stored = write_scan(
        folder / store_path,
        image.values,
        mask.values,
        spacing_mm_dhw=image.spacing_mm_dhw,
        affine=image.affine,
        anatomies=settings.anatomies,
        contract=settings.contract,
    )
    present = present_ids(mask.values)
    return ScanRow(
        scan_id=source.scan_id,
        study_id=source.study_id,
        patient_id=source.patient_id,
        store_path=store_path,
        shape_dhw=stored.shape_dhw,
        spacing_mm_dhw=stored.spacing_mm_dhw,
        anatomies_present=tuple(name for i, name in enumerate(settings.anatomies, start=1) if present[i]),
    )


def _load(
    source: ScanSource, folder: Path, split: str, settings: EngineSettings, segmenter: Segmenter | None
) -> CTScan:
    labels_path = source.labels_path
    if labels_path is None and segmenter is not None:
        volume = read_volume(
            source.image_path, rescale=source.rescale, affine=source.affine, series_uid=source.series_uid
        )
        labels_path = segment(volume, segmenter, folder / "segmentations" / split / f"{source.scan_id}.nii.gz")
    if labels_path is None:
        raise UnusableScan(
            "no anatomy labels", f"{source.image_path}: no label file beside it. Name one, or let a segmenter make it."
        )
    return load_ct(
        source.image_path,
        settings.contract,
        labels_path=labels_path,
        label_version=settings.label_version,
        anatomies=settings.anatomies,
        rescale=source.rescale,
        affine=source.affine,
        series_uid=source.series_uid,
    )


def _crop_to_anatomies(scan: CTScan, settings: EngineSettings) -> tuple[Volume, Volume]:
    assert scan.anatomy_mask is not None
    image, mask = scan.image, scan.anatomy_mask
    if settings.margin_mm_dhw is None:
        return image, mask
    margin = margin_voxels(settings.contract.spacing_mm_dhw, settings.margin_mm_dhw)
    bounds = bounding_box(mask.values, margin)
    box = tuple(slice(start, end) for start, end in bounds)
    affine = image.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [start for start, _ in reversed(bounds)]
    return (
        Volume(np.ascontiguousarray(image.values[box]), affine, image.source),
        Volume(np.ascontiguousarray(mask.values[box]), affine, mask.source),
    )


def _anatomy_texts(source: ScanSource, settings: EngineSettings) -> tuple[AnatomyText, ...]:
    """What the report says of each anatomy; nothing where there is no report, which is not the same as all normal.

    Raises:
        UnusableScan: for a report that cannot be decomposed, or one that was for other anatomies.
    """
    if source.anatomy_texts is not None:
        by_anatomy = {text.anatomy: text for text in source.anatomy_texts}
        if by_anatomy and not by_anatomy.keys() >= set(settings.anatomies):
            raise UnusableScan(
                "texts of other anatomies",
                f"study {source.study_id} was decomposed for {list(by_anatomy)}, not for {list(settings.anatomies)}. "
                "Decompose the reports again for the anatomies of the mask.",
            )
        return tuple(by_anatomy[name] for name in settings.anatomies) if by_anatomy else ()
    if not (source.findings.strip() or source.impression.strip()):
        return ()
    if (drop := check_report(source.findings, source.impression)) is not None:
        if drop.reason == "report empty":  # "Not given."
            return ()
        raise UnusableScan(drop.reason, f"report of study {source.study_id}: {drop.detail}")
    return decompose_report(source.findings, source.impression, settings.anatomies, normal_rule=settings.normal_rule)


def _each(
    work: partial[tuple[str, Drop | None]], sources: Sequence[ScanSource], num_workers: int
) -> Iterator[tuple[str, Drop | None]]:
    if num_workers <= 1:
        yield from map(work, sources)
        return
    context = fork_server(__name__, "monai.transforms")  # MONAI takes seconds to import
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker) as pool:
        futures = [pool.submit(work, source) for source in sources]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker was killed, probably for want of memory. Run again with fewer workers: it goes on from here."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Take one thread, since scans run side by side already, and end with the run, were it killed."""
    import torch

    torch.set_num_threads(1)
    end_with_the_run()


def _check_sources(sources: Sequence[ScanSource]) -> None:
    if not sources:
        raise ValueError("no scan to prepare")
    repeated = [scan_id for scan_id, count in Counter(source.scan_id for source in sources).items() if count > 1]
    if repeated:
        raise ValueError(f"scan ids must be unique; {len(repeated)} repeat, such as {repeated[:3]}")
    unsafe = [source.scan_id for source in sources if not _SAFE_NAME.fullmatch(source.scan_id)]
    if unsafe:
        raise ValueError(
            f"scan ids name files: letters, digits, '.', '_' and '-' only; {len(unsafe)} do not, such as {unsafe[0]!r}"
        )


def _claim_folder(folder: Path, settings: EngineSettings) -> None:
    path = folder / "engine.json"
    wanted = settings.of_arrays()
    if not path.is_file():
        write_text_atomically(path, json.dumps(wanted, indent=2, ensure_ascii=False) + "\n")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    different = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if different:
        raise ValueError(
            f"{folder} was prepared with other settings ({', '.join(different)} differ, see {path}). "
            "Name another folder, or use the same settings."
        )


def _remove_leftovers(folder: Path, split: str) -> None:
    """What a killed run was writing: hidden, so nothing else can be meant."""
    for room in ("volumes", "rows", "segmentations"):
        for leftover in (folder / room / split).glob(".*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _row_path(folder: Path, split: str, scan_id: str) -> Path:
    return folder / "rows" / split / f"{scan_id}.json"


def _write_refused(folder: Path, split: str, refused: dict[str, Drop]) -> dict[str, int]:
    path = folder / "refused" / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"scan_id": scan_id, "reason": drop.reason, "detail": drop.detail}, ensure_ascii=False) + "\n"
        for scan_id, drop in sorted(refused.items())
    ]
    write_text_atomically(path, "".join(lines))
    return dict(Counter(drop.reason for drop in refused.values()).most_common())


def _read_row(path: Path) -> ScanRow:
    return record_to_row(json.loads(path.read_text(encoding="utf-8")))
