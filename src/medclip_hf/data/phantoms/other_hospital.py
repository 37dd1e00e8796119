"""Another hospital than the one that a model learned from: other noise and slices, other words, the same findings.

What changes, and nothing else (anatomy, findings, their places and their frequency stay):

- noise: a low-dose protocol: several times the noise of `torsos.TorsoSettings` before the reconstruction kernel, and
  blotches of about a centimetre, as photon starvation and iterative reconstruction leave them. The fine noise averages
  out where voxels of several millimetres are made of it, the blotches do not;
- spacing: slices almost twice as thick, and a wider field of view, so that fewer voxels show a finding;
- wording: the terms by which findings of lung, heart, esophagus and aorta are named, and the sentences on what is
  normal there, in other words (`reword`). Sides, places and sizes are told as before.
"""

import csv
import re
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medclip_hf.data.phantoms.torso_files import TABLE_NAMES, write_ct_rate
from medclip_hf.data.phantoms.torsos import TorsoSettings

NOISE_HU = (110.0, 170.0)
SLICE_SPACING_MM = (10.0, 12.0)
IN_PLANE_EXTENT_MM = (400.0, 440.0)
BLOTCH_HU = (250.0, 350.0)  # standard deviation
BLOTCH_SIGMA_MM = 5.0  # of the Gaussian that makes blotches of white noise
_REWORDED_COLUMNS = ("Findings_EN", "Impressions_EN")

# Longer phrases stand before their parts.
OTHER_WORDS: tuple[tuple[str, str], ...] = (
    # what is normal
    ("Trachea and both main bronchi are open.", "Patent trachea and main stem bronchi."),
    ("No occlusive pathology was detected in the trachea and main bronchi.", "Trachea and bronchi are clear."),
    ("No mass or infiltration was detected in either lung.", "Both lungs are clear of focal disease."),
    ("No nodule was seen in the lung parenchyma.", "The lungs are free of focal rounded densities."),
    ("Aeration of both lungs is natural.", "The lungs are normally inflated."),
    ("Pleural effusion was not observed.", "Pleural spaces are dry."),
    ("No pleural or pericardial effusion.", "Pleural and pericardial spaces are dry."),
    ("Heart contour and size are normal.", "Cardiac silhouette within limits."),
    ("The heart is not enlarged.", "Cardiac silhouette not widened."),
    ("Pericardial effusion-thickening was not observed.", "The pericardial sac is thin and dry."),
    ("The calibers of the mediastinal main vascular structures are normal.", "Great vessels unremarkable."),
    ("Thoracic aorta diameter is within normal limits.", "The aorta is not dilated."),
    ("The aorta is of normal caliber without wall calcification.", "The aorta is smooth and soft-walled."),
    (
        "Thoracic esophagus calibration is normal and no significant wall thickening was detected.",
        "The oesophagus has a slim wall.",
    ),
    ("The esophagus is unremarkable.", "The oesophagus is inconspicuous."),
    # findings
    ("emphysematous lung changes", "destroyed alveolar walls of the lung"),
    ("emphysematous changes", "destroyed alveolar walls"),
    ("centriacinar and paraseptal emphysema areas", "areas of destroyed alveolar walls"),
    ("pulmonary emphysema", "pulmonary overinflation"),
    ("emphysema", "overinflation"),
    ("mosaic attenuation", "inhomogeneous aeration"),
    ("ground-glass opacities", "hazy veils"),
    ("ground glass density increases", "hazy veils"),
    ("ground-glass densities", "hazy veils"),
    ("opacity of ground-glass density", "a hazy veil"),
    ("consolidation area", "airless area"),
    ("consolidation", "airspace filling"),
    ("atelectasis", "collapse"),
    ("atelectatic changes", "collapsed strips"),
    ("nodule", "rounded density"),
    ("pleural effusion", "hydrothorax"),
    ("free fluid in the", "hydrothorax of the"),
    ("cardiomegaly", "widened cardiac silhouette"),
    ("enlarged heart", "widened cardiac silhouette"),
    ("increased heart size", "widened cardiac silhouette"),
    ("the heart is enlarged", "the cardiac silhouette is widened"),
    ("heart size has increased", "the cardiac silhouette has widened"),
    ("pericardial effusion", "a mantle around the pericardial sac"),
    ("fluid in the pericardial space", "a mantle around the pericardial sac"),
    ("fluid in the pericardium", "a mantle around the pericardial sac"),
    ("an effusion surrounds the heart within the pericardium", "a mantle around the pericardial sac"),
    ("sliding type hiatal hernia", "widened oesophageal hiatus"),
    ("sliding hiatal hernia", "widened oesophageal hiatus"),
    ("hiatal hernia", "widened oesophageal hiatus"),
    ("the gastric fundus herniates through the esophageal hiatus", "the oesophageal hiatus is widened"),
    ("esophagus", "oesophagus"),
    ("esophageal", "oesophageal"),
    ("calcified plaques in the aortic wall", "limy deposits of the aorta"),
    ("calcific plaques are seen in the wall of the aortic arch", "limy deposits of the aorta line the arch"),
    ("atherosclerotic wall calcifications", "limy deposits"),
    ("atherosclerosis of the aorta", "hardened aorta"),
    ("calcified atheroma plaques", "limy deposits"),
    ("calcifications", "limy deposits"),
)
_TERMS = {old.lower(): new for old, new in OTHER_WORDS}
# Not inside a word: the "esophagus" of "oesophagus" is none.
_PATTERN = re.compile("|".join(rf"(?<!\w){re.escape(old)}" for old, _ in OTHER_WORDS), re.IGNORECASE)


def other_hospital(settings: TorsoSettings | None = None) -> TorsoSettings:
    """The settings of the other hospital: noise and spacing changed, all else as given."""
    return replace(
        settings or TorsoSettings(),
        noise_hu=NOISE_HU,
        slice_spacing_mm=SLICE_SPACING_MM,
        in_plane_extent_mm=IN_PLANE_EXTENT_MM,
    )


def reword(text: str) -> str:
    """A report, or a prompt, in the words of the other hospital; a capital letter stays one.

    Examples:
        >>> reword("Cardiomegaly. Pleural effusion on the left.")
        'Widened cardiac silhouette. Hydrothorax on the left.'
    """

    def other(match: re.Match[str]) -> str:
        found = match.group()
        new = _TERMS[found.lower()]
        return new[0].upper() + new[1:] if found[0].isupper() else new[0].lower() + new[1:]

    return _PATTERN.sub(other, text)


def write_other_hospital(
    folder: Path | str,
    num_patients: int,
    *,
    split: str = "train",
    seed: int = 0,
    orientations: Sequence[str] = ("LPS", "LPS", "RAS", "LAS", "LPI"),
    settings: TorsoSettings | None = None,
    num_workers: int = 0,
) -> list[Path]:
    """Paths of the volumes written: as `write_ct_rate` does, but by the other hospital.

    Args:
        folder: created where absent.
        num_patients: of the split.
        split: "train" or "valid".
        seed: of everything drawn; another one than that of the first hospital makes other patients.
        orientations: see `write_ct_rate`.
        settings: of the first hospital.
        num_workers: processes (0: this one).
    """
    paths = write_ct_rate(
        folder,
        num_patients,
        split=split,
        seed=seed,
        orientations=orientations,
        settings=other_hospital(settings),
        num_workers=num_workers,
    )
    for path in paths:
        _add_blotches(path, np.random.default_rng([seed, zlib.crc32(path.name.encode())]))
    _reword_table(Path(folder) / "dataset" / "radiology_text_reports" / f"{TABLE_NAMES[split]}_reports.csv")
    return paths


def blotches(shape: Sequence[int], spacing_mm: Sequence[float], rng: np.random.Generator) -> NDArray[np.float32]:
    """Correlated noise in Hounsfield units; how strong it is, is drawn for each scan.

    Args:
        shape: voxels.
        spacing_mm: along the same axes.
        rng: of everything drawn.
    """
    white = rng.standard_normal(tuple(shape), dtype=np.float32)
    smooth = ndimage.gaussian_filter(white, [BLOTCH_SIGMA_MM / mm for mm in spacing_mm], mode="reflect")
    return smooth * np.float32(rng.uniform(*BLOTCH_HU) / smooth.std())


def _add_blotches(path: Path, rng: np.random.Generator) -> None:
    """Rewrite a scan with blotches."""
    import nibabel as nib

    image: Any = nib.load(path)
    values = np.asarray(image.dataobj, dtype=np.float32)
    noisy = values + blotches(values.shape, image.header.get_zooms()[:3], rng)
    clipped = np.clip(np.rint(noisy), -1024, 3071).astype(np.int16)
    nib.save(nib.Nifti1Image(clipped, image.affine), path)


def _reword_table(path: Path) -> None:
    """Rewrite the reports of a table."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns, rows = list(reader.fieldnames or []), list(reader)
    for row in rows:
        row |= {name: reword(row[name]) for name in _REWORDED_COLUMNS}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)
