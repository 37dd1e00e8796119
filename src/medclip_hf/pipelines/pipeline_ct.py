"""The pipelines of fVLM: a CT scan in, findings or embeddings of its anatomies out.

This file travels to the Hub: arrays work without the package, files need it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import Pipeline

from .pipeline_saving import forget_pipelines, save_pipeline

try:
    from medclip_hf.evaluation.ct_zero_shot import (
        CT_RATE_FINDINGS,
        PUBLISHED_WINDOW_DHW,
        Finding,
        anatomy_boxes,
        embed_findings,
        embed_windows,
        finding_probabilities,
        plan_windows,
    )
except ImportError:
    from .ct_zero_shot import (  # type: ignore[no-redef] # its copy, in the folder of a saved pipeline
        CT_RATE_FINDINGS,
        PUBLISHED_WINDOW_DHW,
        Finding,
        anatomy_boxes,
        embed_findings,
        embed_windows,
        finding_probabilities,
        plan_windows,
    )
try:
    from medclip_hf.data.ct.geometry import GeometryContract
    from medclip_hf.pipelines.inputs import read_scan_file
except ImportError:
    GeometryContract = read_scan_file = None  # type: ignore[assignment,misc]

Protocol = Literal["published", "shared"]
Windows = dict[int, dict[str, Any]]  # by place of the anatomy
Rows = list[dict[str, Any]]
Boxes = Mapping[int, Sequence[tuple[int, int]]]  # (first, last) voxel along each axis, by place of the anatomy

WHOLE_VOLUME = "whole-volume"
_PUBLISHED_CROP_DHW = (112, 256, 352)
_THICK = 1.5  # slices this many times thicker than the model's grid are flagged
_CONTRACT = ("orientation", "spacing_mm_dhw", "hu_min", "hu_max", "rescale_applied")
_SCAN_KEYS = {"image", "mask", "spacing_mm_dhw", "orientation"}
_READING = {"mask", "label_version", "segmenter", "without_mask", "series_uid", "rescale"}
_READING |= {"spacing_mm_dhw", "orientation"}


@dataclass(frozen=True, eq=False)
class PreparedScan:
    """A scan as the model takes it, and where it came from.

    Args:
        volume: (D, H, W) float32 in [0, 1].
        mask: (D, H, W) uint8; None where the whole volume stands for every anatomy.
        start_dhw: place of the first voxel in the scan on the model's grid; negative in padding.
        grid: shape, spacing, orientation and affine of the scan on the model's grid.
        flags: what lowers the trust in all anatomies.
        anatomy_flags: the same for single anatomies, by name.
    """

    volume: np.ndarray
    mask: np.ndarray | None
    start_dhw: tuple[int, int, int]
    grid: dict[str, Any]
    flags: tuple[str, ...] = ()
    anatomy_flags: dict[str, tuple[str, ...]] = field(default_factory=dict)


_Pipeline: Any = Pipeline  # its annotations are made for the subclasses of transformers


class _CTPipeline(_Pipeline):
    """What both pipelines share: reading, windows, saving."""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _own_arguments: frozenset[str] = frozenset()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self.model.config, "model_type", None) != "fvlm":
            raise ValueError(f"{self.task or type(self).__name__} needs an fVLM, got {type(self.model).__name__}.")
        forget_pipelines(self.model.config)

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Results of a scan, or of each of several: see the class."""
        if isinstance(inputs, list | tuple):
            inputs = list(inputs)
            if not inputs:
                return []
        return super().__call__(inputs, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save model, processor and code, so that the folder works where the package is not installed."""
        save_pipeline(self, save_directory, **kwargs)

    def _sanitize_parameters(self, **arguments: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        arguments.pop("local_files_only", None)  # of `pipeline`, which hands it on
        known = _READING | self._own_arguments
        if unknown := sorted(arguments.keys() - known):
            raise ValueError(f"{type(self).__name__} knows no {unknown}; it takes {sorted(known)}.")
        _check_numbers("window_size_dhw", arguments.get("window_size_dhw"), 3, 1)
        _check_numbers("rescale", arguments.get("rescale"), 2)
        reading = {name: value for name, value in arguments.items() if name in _READING}
        return reading, {name: value for name, value in arguments.items() if name not in _READING}, {}

    def preprocess(self, scan: Any, **reading: Any) -> dict[str, Any]:
        """The prepared scan, read with `prepare` where it is not prepared yet."""
        return {"scan": scan if isinstance(scan, PreparedScan) else self.prepare(scan, **reading)}

    def prepare(self, scan: Any, **reading: Any) -> PreparedScan:
        """A scan as the model takes it; give it to the pipeline in place of the file.

        Args:
            scan: path, array or mapping, see `CTZeroShotClassificationPipeline`.
            **reading: as in a call.

        Raises:
            ValueError: the scan cannot be used, with what was found and what to do.
        """
        if isinstance(scan, Mapping):
            if unknown := sorted(scan.keys() - _SCAN_KEYS):
                raise ValueError(f"a scan has no {unknown}; its keys are {sorted(_SCAN_KEYS)}.")
            if scan.get("image") is None:
                raise ValueError("a scan given as a mapping needs 'image': a path or an array.")
            reading = reading | {key: value for key, value in scan.items() if key != "image"}
            scan = scan["image"]
        without_mask = reading.pop("without_mask", None)
        if without_mask not in (None, WHOLE_VOLUME):
            raise ValueError(f"without_mask is {WHOLE_VOLUME!r} or None, but {without_mask!r} came.")
        if isinstance(scan, str | Path):
            return self._prepare_file(Path(scan), without_mask, reading)
        return self._prepare_array(scan, without_mask, reading)

    def _prepare_file(self, path: Path, without_mask: str | None, reading: dict[str, Any]) -> PreparedScan:
        if read_scan_file is None:
            raise ValueError(
                f"{path}: reading NIfTI and DICOM needs the package, pip install 'medclip-hf[ct]'. Without it, give "
                "arrays in Hounsfield units."
            )
        if told := sorted(reading.keys() & {"spacing_mm_dhw", "orientation"}):
            raise ValueError(f"{path}: {told} are read from the file; they are for arrays only.")
        mask = reading.pop("mask", None)
        if mask is not None and not isinstance(mask, str | Path):
            raise ValueError(f"{path}: the mask of a file must be a file on its grid, but {type(mask).__name__} came.")
        if mask is None and reading.get("segmenter") is None and without_mask is None:
            raise ValueError(_no_mask(str(path)))
        contract = GeometryContract.from_dict({name: getattr(self.image_processor, name) for name in _CONTRACT})
        scan = read_scan_file(
            path, None if mask is None else Path(mask), contract, self.image_processor.anatomies, **reading
        )
        flags = []
        if scan.segmenter:
            flags.append(f"mask made by {scan.segmenter}, not checked by a person")
        if scan.slice_distance_mm is not None and scan.slice_distance_mm > _THICK * contract.spacing_mm_dhw[0]:
            flags.append(
                f"slices {scan.slice_distance_mm:.1f} mm apart, the model's are {contract.spacing_mm_dhw[0]:g}"
            )
        width, height, depth = np.linalg.norm(scan.affine[:3, :3], axis=0).tolist()
        grid = {"affine": scan.affine.tolist(), "spacing_mm_dhw": (depth, height, width)}
        return self._prepared(scan.values, scan.mask, flags, grid)

    def _prepare_array(self, values: Any, without_mask: str | None, reading: dict[str, Any]) -> PreparedScan:
        if not isinstance(values, np.ndarray | torch.Tensor):
            raise ValueError(
                f"a scan is a path, an array (depth, height, width) in Hounsfield units or a mapping with 'image', but "
                f"{type(values).__name__} came."
            )
        if strange := sorted(reading.keys() - {"mask", "spacing_mm_dhw", "orientation"}):
            raise ValueError(f"{strange} are for files; give an array its mask as an array of ids.")
        mask = reading.pop("mask", None)
        if mask is None and without_mask is None:
            raise ValueError(_no_mask("the array"))
        flags = [
            f"{name} not told and not checked"
            for name in ("orientation", "spacing_mm_dhw")
            if reading.get(name) is None
        ]
        return self._prepared(values, mask, flags, {"affine": None}, **reading)

    def _prepared(self, values: Any, mask: Any, flags: list[str], grid: dict[str, Any], **told: Any) -> PreparedScan:
        processor = self.image_processor
        inputs = processor(values, anatomy_mask=mask, return_tensors="np", **told)
        prepared_mask = None if mask is None else inputs["anatomy_mask"][0]
        grid = {
            "shape_dhw": tuple(int(size) for size in values.shape),
            "spacing_mm_dhw": tuple(processor.spacing_mm_dhw),
            "orientation": processor.orientation,
        } | grid
        volume = inputs["pixel_values"][0, 0]
        if prepared_mask is None:
            shape = zip(processor.size_dhw, values.shape, strict=True)
            before = [max(0, smallest - size) // 2 for smallest, size in shape]  # as the processor pads
            flags.append("no anatomy mask: the whole volume stands for every anatomy, unlike in training")
            return PreparedScan(volume, None, _triple(-width for width in before), grid, tuple(flags))
        anatomies = self.model.config.anatomies
        boxes, prepared_boxes = (anatomy_boxes(np.asarray(one), len(anatomies)) for one in (mask, prepared_mask))
        start = _triple(a - b for a, b in zip(_first_voxel(boxes), _first_voxel(prepared_boxes), strict=True))
        return PreparedScan(
            volume, prepared_mask, start, grid, tuple(flags), _edge_flags(boxes, grid["shape_dhw"], anatomies)
        )

    def _embed(self, scan: PreparedScan, protocol: Protocol, window_size_dhw: Any) -> tuple[torch.Tensor, Windows]:
        """(A, D) embeddings, NaN where absent, and each anatomy's window on the model's grid."""
        size_dhw = _triple(window_size_dhw or window_of(self.model))
        volume = torch.from_numpy(scan.volume)
        if scan.mask is None:
            window = _window(scan, (0, 0, 0), scan.volume.shape)
            return self._embed_whole(volume), dict.fromkeys(range(self.model.config.num_anatomies), window)
        mask = torch.from_numpy(scan.mask)
        planned = plan_windows(scan.mask, self.model.config.num_anatomies, protocol, size_dhw)
        windows = {
            anatomy: _window(scan, part.start_dhw, part.size_dhw) for part in planned for anatomy in part.anatomies
        }
        return embed_windows(self.model, volume, mask, planned), windows

    def _embed_whole(self, volume: torch.Tensor) -> torch.Tensor:
        patch_size_dhw = self.model.config.vision_config.patch_size_dhw
        num_patches = int(np.prod([size // patch for size, patch in zip(volume.shape, patch_size_dhw, strict=True)]))
        shape = (1, self.model.config.num_anatomies, num_patches)
        token_mask = torch.ones(shape, dtype=torch.bool, device=self.model.device)
        pixel_values = volume[None, None].to(self.model.device)
        return self.model(pixel_values=pixel_values, anatomy_token_mask=token_mask).anatomy_embeds[0]

    def postprocess(self, outputs: Mapping[str, Any], **_: Any) -> Any:
        """The result of one scan."""
        return outputs["result"]

    @staticmethod
    def _scans(inputs: Mapping[str, Any]) -> tuple[list[PreparedScan], bool]:
        """The scans of a batch, and whether it is one (transformers hands over a single scan without a list)."""
        scans = inputs["scan"]
        return (scans, True) if isinstance(scans, list) else ([scans], False)


class CTZeroShotClassificationPipeline(_CTPipeline):
    """Probabilities of findings in the anatomies of a CT scan, by fVLM. Research only: no medical device.

    Each scan gives a list of dicts, one a finding:

        anatomy, finding  names
        probability       in [0, 1], None where the anatomy is not in the scan
        window            the part of the scan that was looked at, on the model's grid: `start_dhw` and `size_dhw` in
                          voxels, and `spacing_mm_dhw`, `orientation`, `shape_dhw`, `affine` of that grid; None as above
        flags             what lowers the trust in this figure, as sentences; empty where nothing is known to

    Args of a call:
        scans: path of a NIfTI file, of a DICOM folder or file or of a Rad-ChestCT `.npz`; array (D, H, W) in Hounsfield
            units on the model's grid; mapping with "image" (either), "mask", "spacing_mm_dhw", "orientation"; or a
            list, generator or data set of them.
        mask: of a single scan: label file of TotalSegmentator on its grid; for an array, an array of ids.
        label_version: of TotalSegmentator that wrote the label files, "v1" or "v2" (default).
        segmenter: what to run on files without a mask: "totalsegmentator", or "bundle:<folder>" of MONAI.
        without_mask: "whole-volume" scores scans without a mask all the same, flagged.
        series_uid: which DICOM series, where a folder holds several.
        rescale: (slope, intercept), only where NIfTI files hold raw values.
        spacing_mm_dhw, orientation: of arrays; checked against the model's.
        findings: `Finding`s or mappings with name, anatomy, absent and present; default: the CT-RATE findings of the
            anatomies that the model knows.
        protocol: "published" or "shared" windows.
        window_size_dhw: smallest window, voxels; default: the published one.
        batch_size, num_workers: as everywhere in transformers.

    Examples:
        >>> score = pipeline("ct-zero-shot-classification", model="my-fvlm")
        >>> score("chest.nii.gz", mask="chest_labels.nii.gz")[0]
        {'anatomy': 'aorta', 'finding': 'Arterial wall calcification', 'probability': 0.81, 'window': ..., 'flags': []}
    """

    _own_arguments = frozenset({"findings", "protocol", "window_size_dhw"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._prompts: tuple[Any, Any] = (None, None)
        super().__init__(*args, **kwargs)

    def _forward(
        self,
        inputs: Mapping[str, Any],
        findings: Any = None,
        protocol: Protocol = "published",
        window_size_dhw: Any = None,
    ) -> dict[str, Any]:
        scans, is_batch = self._scans(inputs)
        prompts = self._embedded(read_findings(findings, self.model.config.anatomies))
        results = [self._score(scan, prompts, protocol, window_size_dhw) for scan in scans]
        return {"result": results if is_batch else results[0]}

    def _score(
        self, scan: PreparedScan, prompts: Any, protocol: Protocol, window_size_dhw: Any
    ) -> list[dict[str, Any]]:
        embeds, windows = self._embed(scan, protocol, window_size_dhw)
        scale = self.model.logit_scale.detach().exp()
        texts = prompts.text_embeds.to(embeds.dtype)
        probabilities = finding_probabilities(embeds[None], texts, prompts.anatomy_index, scale)[0].tolist()
        rows = []
        anatomies = prompts.anatomy_index.tolist()
        for finding, anatomy, probability in zip(prompts.findings, anatomies, probabilities, strict=True):
            flags = [*scan.flags, *scan.anatomy_flags.get(finding.anatomy, ())]
            rows.append(
                {
                    "anatomy": finding.anatomy,
                    "finding": finding.name,
                    "probability": probability if anatomy in windows else None,
                    "window": windows.get(anatomy),
                    "flags": flags,
                }
            )
        return rows

    def _embedded(self, findings: tuple[Any, ...]) -> Any:
        """The prompts' vectors, kept for the next scan."""
        if self._prompts[0] != findings:
            self._prompts = (findings, embed_findings(self.model, self.tokenizer, findings))
        return self._prompts[1]


class CTFeatureExtractionPipeline(_CTPipeline):
    """Embeddings of the anatomies of a CT scan, by fVLM.

    Each scan gives a dict:

        anatomies   A names
        embeddings  (A, D) float32, L2-normalised; NaN where the anatomy is not in the scan
        windows     A windows, None where absent; see `CTZeroShotClassificationPipeline`
        flags       A lists of sentences

    Args of a call: those of `CTZeroShotClassificationPipeline` but `findings`; and
        return_tensors: give `embeddings` as a tensor.
    """

    _own_arguments = frozenset({"protocol", "window_size_dhw", "return_tensors"})

    def _forward(
        self,
        inputs: Mapping[str, Any],
        protocol: Protocol = "published",
        window_size_dhw: Any = None,
        return_tensors: bool = False,
    ) -> dict[str, Any]:
        scans, is_batch = self._scans(inputs)
        results = []
        for scan in scans:
            embeds, windows = self._embed(scan, protocol, window_size_dhw)
            embeds = embeds.float().cpu()
            names = list(self.model.config.anatomies)
            results.append(
                {
                    "anatomies": names,
                    "embeddings": embeds if return_tensors else embeds.numpy(),
                    "windows": [windows.get(place) for place in range(len(names))],
                    "flags": [[*scan.flags, *scan.anatomy_flags.get(name, ())] for name in names],
                }
            )
        return {"result": results if is_batch else results[0]}


# Parts -----------------------------------------------------------------------------------------------------------


def read_findings(findings: Any, anatomies: Sequence[str]) -> tuple[Any, ...]:
    """The findings to score.

    Args:
        findings: see `CTZeroShotClassificationPipeline`.
        anatomies: of the model.

    Raises:
        ValueError: none is left, one is incomplete, or a name comes twice.
    """
    if findings is None:
        known = tuple(finding for finding in CT_RATE_FINDINGS if finding.anatomy in anatomies)
        if not known:
            raise ValueError(
                f"the model knows {list(anatomies)}, none of them an anatomy of the CT-RATE findings. Name your own "
                "with findings=[{'name': ..., 'anatomy': ..., 'absent': ..., 'present': ...}]."
            )
        return known
    chosen = []
    for finding in findings:
        if isinstance(finding, Mapping):
            try:
                finding = Finding(**finding)
            except TypeError as error:
                raise ValueError(
                    f"{finding} is no finding: it needs name, anatomy, absent and present ({error})."
                ) from error
        values = vars(finding).values() if isinstance(finding, Finding) else [None]
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise ValueError(f"{finding} is no finding: name, anatomy, absent and present must be texts, none empty.")
        chosen.append(finding)
    if not chosen or len({finding.name for finding in chosen}) < len(chosen):
        raise ValueError("findings must be at least one, each with a name of its own.")
    return tuple(chosen)


def _check_numbers(name: str, values: Any, count: int, smallest: float = -np.inf) -> None:
    """Refuse what is not so many numbers; None is not given.

    Raises:
        ValueError: naming the argument.
    """
    if values is None:
        return
    try:
        given = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        given = np.empty(0)
    if given.shape != (count,) or not (np.isfinite(given) & (given >= smallest)).all():
        least = "" if smallest == -np.inf else f" of {smallest:g} or more"
        raise ValueError(f"{name} must be {count} numbers{least}, but {values!r} came.")


def window_of(model: Any) -> tuple[int, int, int]:
    """The published window for models of the published crop size, else the size of the training crops."""
    size_dhw = tuple(model.config.vision_config.image_size_dhw)
    return PUBLISHED_WINDOW_DHW if size_dhw == _PUBLISHED_CROP_DHW else size_dhw


def _no_mask(name: str) -> str:
    return (
        f"{name}: fVLM scores each anatomy inside its mask, and none came. Give mask=<label file of TotalSegmentator "
        "on the scan's grid>; or have it made: segmenter='totalsegmentator' (pip install TotalSegmentator), or "
        "segmenter='bundle:<folder>' of MONAI's wholeBody_ct_segmentation; or accept scores of the whole volume, "
        f"flagged and worse: without_mask={WHOLE_VOLUME!r}."
    )


def _edge_flags(boxes: Boxes, shape: Sequence[int], anatomies: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Which anatomies are missing or reach a face of the scan, as sentences by name."""
    flags: dict[str, tuple[str, ...]] = {}
    for place, name in enumerate(anatomies):
        if place not in boxes:
            flags[name] = (f"{name} is not in the scan",)
        elif any(first == 0 or last == size - 1 for (first, last), size in zip(boxes[place], shape, strict=True)):
            flags[name] = (f"{name} reaches the edge of the scan and may be cut off",)
    return flags


def _first_voxel(boxes: Boxes) -> tuple[int, ...]:
    """Lowest index along each axis at which there is an anatomy."""
    return tuple(min(first for first, _ in axis) for axis in zip(*boxes.values(), strict=True))


def _window(scan: PreparedScan, start_dhw: Sequence[int], size_dhw: Sequence[int]) -> dict[str, Any]:
    """A window on the model's grid, without the padding around the scan."""
    starts = [first + offset for first, offset in zip(start_dhw, scan.start_dhw, strict=True)]
    ends = [start + size for start, size in zip(starts, size_dhw, strict=True)]
    starts = [max(0, start) for start in starts]
    ends = [min(end, size) for end, size in zip(ends, scan.grid["shape_dhw"], strict=True)]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    return {"start_dhw": _triple(starts), "size_dhw": _triple(sizes), **scan.grid}


def _triple(values: Any) -> tuple[int, int, int]:
    depth, height, width = (int(value) for value in values)
    return depth, height, width


__all__ = ["CTFeatureExtractionPipeline", "CTZeroShotClassificationPipeline"]
