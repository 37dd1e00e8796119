"""Anatomy labels for scans that have none: TotalSegmentator or a MONAI bundle, run as programs where installed."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medclip_hf.data.ct.anatomy import LabelVersion
from medclip_hf.data.ct.geometry import UnusableScan, Volume

logger = logging.getLogger(__name__)

_MESSAGE_LINES = 5
# `python -m monai.bundle run` would need the package fire besides.
_RUN_BUNDLE = "import json, sys; from monai.bundle import run; run(**json.loads(sys.argv[1]))"


@dataclass(frozen=True)
class Segmenter:
    """A program that labels a NIfTI volume.

    Args:
        name: "totalsegmentator", or "bundle" for MONAI's whole-body CT segmentation.
        bundle: folder of the bundle (wholeBody_ct_segmentation of MONAI's model zoo, with pytorch-ignite installed).
        label_version: whose ids it writes: TotalSegmentator 2 its own, MONAI's bundle those of version 1.
    """

    name: str
    label_version: LabelVersion
    bundle: Path | None = None

    @classmethod
    def from_text(cls, text: str) -> Segmenter:
        """The segmenter that ``totalsegmentator`` or ``bundle:<folder>`` names.

        Raises:
            ValueError: for another text, or where the program or the bundle is not there.
        """
        name, _, folder = text.partition(":")
        if name == "totalsegmentator" and not folder:
            if shutil.which("TotalSegmentator") is None:
                raise ValueError("TotalSegmentator is not installed: pip install TotalSegmentator (version 2)")
            return cls(name, "v2")
        if name == "bundle" and folder:
            if not (Path(folder) / "configs" / "inference.json").is_file():
                raise ValueError(f"{folder} is no MONAI bundle: it has no configs/inference.json")
            return cls(name, "v1", Path(folder).resolve())
        raise ValueError(f"expected 'totalsegmentator' or 'bundle:<folder>', got {text!r}")

    def command(self, image: Path, output: Path) -> list[str]:
        """The command line that labels `image` below the folder `output`."""
        if self.bundle is None:
            return ["TotalSegmentator", "-i", str(image), "-o", str(output / "labels.nii.gz"), "--ml"]
        overrides = {
            "config_file": str(self.bundle / "configs" / "inference.json"),
            "bundle_root": str(self.bundle),
            "output_dir": str(output),
            "datalist": [str(image)],
        }
        return [sys.executable, "-c", _RUN_BUNDLE, json.dumps(overrides)]


def segment(volume: Volume, segmenter: Segmenter, target: Path) -> Path:
    """Path of the label file of a volume, on its grid; an existing one is taken as it is.

    Args:
        volume: in Hounsfield units, at its own spacing.
        segmenter: the program.
        target: where the labels go; written atomically.

    Raises:
        UnusableScan: where the program fails or writes no label file.
    """
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".segment-", dir=target.parent) as folder:
        image, output = Path(folder) / "image.nii.gz", Path(folder) / "labels"
        output.mkdir()
        save_nifti(volume, image)
        done = subprocess.run(  # noqa: S603 - a list of arguments, no shell
            segmenter.command(image, output), capture_output=True, text=True, check=False
        )
        found = sorted(output.rglob("*.nii.gz"))
        if done.returncode != 0 or len(found) != 1:
            last = " / ".join(done.stderr.strip().splitlines()[-_MESSAGE_LINES:])
            raise UnusableScan(
                "segmentation failed",
                f"{volume.source}: {segmenter.name} ended with {done.returncode} and {len(found)} label files. {last}",
            )
        found[0].replace(target)
    return target


def save_nifti(volume: Volume, path: Path) -> None:
    """Write a volume (D, H, W) as NIfTI (x, y, z) with its affine."""
    import nibabel

    values = volume.values.transpose(2, 1, 0)
    if values.dtype.kind == "i" and values.dtype.itemsize > 2:
        values = np.clip(values, -32768, 32767).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, volume.affine), path)
