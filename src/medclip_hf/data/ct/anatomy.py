"""Anatomy masks out of TotalSegmentator label volumes: structures of both versions, merged to a model's anatomies.

The two versions number the same structures differently (13 is the left upper lobe in v1, the right middle lobe in v2),
so the version is always named and never guessed. Structures: `map_to_binary.py` of wasserth/TotalSegmentator (classes
"total_v1" and "total"). Anatomies: the 36 of fVLM in the order of damo-radar's preprocessing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medclip_hf.data.ct.geometry import UnusableScan

LabelVersion = Literal["v1", "v2"]

THORACIC_ANATOMIES = ("lung", "heart", "esophagus", "aorta")  # those of the released fVLM weights, in their order

_RIBS = tuple(f"rib_{side}_{number}" for side in ("left", "right") for number in range(1, 13))
_LUMBAR = tuple(f"vertebrae_L{number}" for number in range(5, 0, -1))
_THORACIC = tuple(f"vertebrae_T{number}" for number in range(12, 0, -1))
_CERVICAL = tuple(f"vertebrae_C{number}" for number in range(7, 0, -1))
_LUNG_LOBES = (
    "lung_upper_lobe_left",
    "lung_lower_lobe_left",
    "lung_upper_lobe_right",
    "lung_middle_lobe_right",
    "lung_lower_lobe_right",
)
_GLUTEAL = tuple(f"gluteus_{part}_{side}" for part in ("maximus", "medius", "minimus") for side in ("left", "right"))
_BACK_AND_HIP_MUSCLES = (*_GLUTEAL, "autochthon_left", "autochthon_right", "iliopsoas_left", "iliopsoas_right")
_LIMB_BONES = tuple(
    f"{bone}_{side}" for bone in ("humerus", "scapula", "clavicula", "femur", "hip") for side in ("left", "right")
)
_ILIAC_VESSELS = ("iliac_artery_left", "iliac_artery_right", "iliac_vena_left", "iliac_vena_right")

# The id of a structure is its place in the tuple plus one.
TOTALSEGMENTATOR_STRUCTURES: dict[LabelVersion, tuple[str, ...]] = {
    "v1": (
        *("spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "aorta", "inferior_vena_cava"),
        *("portal_vein_and_splenic_vein", "pancreas", "adrenal_gland_right", "adrenal_gland_left"),
        *_LUNG_LOBES,
        *(*_LUMBAR, *_THORACIC, *_CERVICAL),
        *("esophagus", "trachea", "heart_myocardium", "heart_atrium_left", "heart_ventricle_left"),
        *("heart_atrium_right", "heart_ventricle_right", "pulmonary_artery", "brain"),
        *_ILIAC_VESSELS,
        *("small_bowel", "duodenum", "colon"),
        *_RIBS,
        *_LIMB_BONES,
        *("sacrum", "face"),
        *_BACK_AND_HIP_MUSCLES,
        "urinary_bladder",
    ),
    "v2": (
        *("spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "pancreas"),
        *("adrenal_gland_right", "adrenal_gland_left"),
        *_LUNG_LOBES,
        *("esophagus", "trachea", "thyroid_gland", "small_bowel", "duodenum", "colon", "urinary_bladder", "prostate"),
        *("kidney_cyst_left", "kidney_cyst_right", "sacrum", "vertebrae_S1"),
        *(*_LUMBAR, *_THORACIC, *_CERVICAL),
        *("heart", "aorta", "pulmonary_vein", "brachiocephalic_trunk"),
        *("subclavian_artery_right", "subclavian_artery_left"),
        *("common_carotid_artery_right", "common_carotid_artery_left"),
        *("brachiocephalic_vein_left", "brachiocephalic_vein_right", "atrial_appendage_left"),
        *("superior_vena_cava", "inferior_vena_cava", "portal_vein_and_splenic_vein"),
        *_ILIAC_VESSELS,
        *_LIMB_BONES,
        "spinal_cord",
        *_BACK_AND_HIP_MUSCLES,
        *("brain", "skull"),
        *_RIBS,
        *("sternum", "costal_cartilages"),
    ),
}


def _both(*structures: str) -> tuple[str, ...]:
    return tuple(f"{structure}_{side}" for structure in structures for side in ("left", "right"))


# A structure that a version lacks is simply not there: v2 has one heart where v1 has five parts, and no face.
STRUCTURES_OF_ANATOMY: dict[str, tuple[str, ...]] = {
    "adrenal gland": _both("adrenal_gland"),
    "aorta": ("aorta",),
    "erector spinae": _both("autochthon"),
    "brain": ("brain",),
    "clavicle": _both("clavicula"),
    "colon": ("colon",),
    "duodenum": ("duodenum",),
    "esophagus": ("esophagus",),
    "face": ("face",),
    "femur": _both("femur"),
    "gallbladder": ("gallbladder",),
    "gluteus": _GLUTEAL,
    "heart": (
        *("heart_myocardium", "heart_atrium_left", "heart_ventricle_left"),
        *("heart_atrium_right", "heart_ventricle_right"),
        *("heart", "atrial_appendage_left"),
    ),
    "hip": _both("hip"),
    "humerus": _both("humerus"),
    "iliac artery": _both("iliac_artery"),
    "iliac vein": _both("iliac_vena"),
    "iliopsoas": _both("iliopsoas"),
    "inferior vena cava": ("inferior_vena_cava",),
    "kidney": (*_both("kidney"), *_both("kidney_cyst")),
    "liver": ("liver",),
    "lung": _LUNG_LOBES,
    "pancreas": ("pancreas",),
    "portal and splenic vein": ("portal_vein_and_splenic_vein",),
    "pulmonary artery": ("pulmonary_artery",),
    "rib": _RIBS,
    "sacrum": ("sacrum", "vertebrae_S1"),
    "scapula": _both("scapula"),
    "small bowel": ("small_bowel",),
    "spleen": ("spleen",),
    "stomach": ("stomach",),
    "trachea": ("trachea",),
    "urinary bladder": ("urinary_bladder",),
    "cervical vertebrae": _CERVICAL,
    "lumbar vertebrae": _LUMBAR,
    "thoracic vertebrae": _THORACIC,
}
ALL_ANATOMIES = tuple(STRUCTURES_OF_ANATOMY)


def merge_table(version: LabelVersion, anatomies: Sequence[str]) -> NDArray[np.uint8]:
    """(num_structures + 1,): the anatomy id of every structure id; anatomy i of the list is i + 1, all else 0.

    Args:
        version: of TotalSegmentator.
        anatomies: names out of `ALL_ANATOMIES`, in the order of the model's config.

    Raises:
        ValueError: for an unknown version or anatomy, a name given twice, or an anatomy that the version never labels.
    """
    if version not in TOTALSEGMENTATOR_STRUCTURES:
        raise ValueError(f"label version {version!r}; expected one of {sorted(TOTALSEGMENTATOR_STRUCTURES)}")
    structures = TOTALSEGMENTATOR_STRUCTURES[version]
    unknown = [name for name in anatomies if name not in STRUCTURES_OF_ANATOMY]
    if unknown or not anatomies or len(set(anatomies)) < len(anatomies):
        raise ValueError(
            f"anatomies must be different names out of {list(ALL_ANATOMIES)}; got {list(anatomies)}"
            + (f", of which {unknown} are unknown" if unknown else "")
        )
    table = np.zeros(len(structures) + 1, dtype=np.uint8)
    for number, anatomy in enumerate(anatomies, start=1):
        ids = [structures.index(name) + 1 for name in STRUCTURES_OF_ANATOMY[anatomy] if name in structures]
        if not ids:
            raise ValueError(f"TotalSegmentator {version} has no label for {anatomy!r}. Leave it out of the anatomies.")
        table[ids] = number
    return table


def labelled_anatomies(version: LabelVersion) -> tuple[str, ...]:
    """The anatomies of `ALL_ANATOMIES` that a version of TotalSegmentator labels: 36 (v1) or 34 (v2)."""
    structures = set(TOTALSEGMENTATOR_STRUCTURES[version])
    return tuple(name for name, parts in STRUCTURES_OF_ANATOMY.items() if structures & set(parts))


def merge_labels(
    labels: NDArray[Any], version: LabelVersion, anatomies: Sequence[str], source: str = "labels"
) -> NDArray[np.uint8]:
    """The anatomy mask: anatomy i of the list as i + 1, everything else 0; same shape as `labels`.

    Args:
        labels: structure ids, whole numbers (floats with whole values, which some tools write, are taken too).
        version: of TotalSegmentator that wrote them.
        anatomies: see `merge_table`.
        source: the file, for messages.

    Raises:
        UnusableScan: values that are no ids of that version, or no voxel of any of the anatomies.
    """
    table = merge_table(version, anatomies)
    lowest, highest = labels.min(), labels.max()
    if not (lowest >= 0 and highest < len(table)):  # written so that NaN fails as well
        raise UnusableScan(
            "mask with unknown ids",
            f"{source}: ids from {lowest} to {highest}; TotalSegmentator {version} has 0 to {len(table) - 1}. "
            "Name the other version, or check that this is a label file.",
        )
    ids = labels if labels.dtype == np.uint8 else labels.astype(np.uint8)
    if labels.dtype.kind == "f" and not np.array_equal(ids, labels):
        raise UnusableScan("mask with unknown ids", f"{source}: ids that are no whole numbers; was it interpolated?")
    mask = renumbered(ids, table)
    if not mask.any():
        raise UnusableScan("no anatomy in the mask", f"{source}: none of {list(anatomies)} is labelled")
    return mask


def renumbered(ids: NDArray[np.uint8], table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`table[ids]`, 0 for ids beyond the table; byte by byte, which takes a third of NumPy's time.

    Args:
        ids: of any shape.
        table: at most 256 new ids.
    """
    whole_table = table.tobytes().ljust(256, b"\0")
    return np.frombuffer(bytearray(np.ascontiguousarray(ids)).translate(whole_table), np.uint8).reshape(ids.shape)


def check_lung_is_air(image: NDArray[Any], mask: NDArray[np.uint8], anatomies: Sequence[str], source: str) -> None:
    """Refuse a mask whose lung does not lie on aerated voxels: labels of the other version, or of a flipped volume.

    Args:
        image: (D, H, W) in Hounsfield units.
        mask: (D, H, W), anatomy ids.
        anatomies: names of the ids; without a lung nothing is checked.
        source: the label file, for messages.

    Raises:
        UnusableScan: with the median found.
    """
    if "lung" not in anatomies:
        return
    lung = image[mask == anatomies.index("lung") + 1]
    if lung.size < 1000:
        return
    median = float(np.median(lung))
    if median > -250:
        raise UnusableScan(
            "mask does not fit the image",
            f"{source}: the median inside of the lung is {median:.0f} HU (expected about -850). The labels belong to "
            "another version of TotalSegmentator, or to a volume that was flipped or rescaled since.",
        )


def bounding_box(
    mask: NDArray[np.uint8], margin_voxels_dhw: tuple[int, int, int]
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """[start, end) along depth, height and width around everything that is not 0, widened and cut at the array.

    The margin counts from the outermost voxel on either side, as published; so the upper side, whose end is exclusive,
    gains one voxel less.
    """
    plane = mask.max(axis=0)
    lines = (mask.max(axis=(1, 2)), plane.max(axis=1), plane.max(axis=0))
    bounds = []
    for line, margin in zip(lines, margin_voxels_dhw, strict=True):
        occupied = np.flatnonzero(line)
        start, last = int(occupied[0]), int(occupied[-1])
        bounds.append((max(0, start - margin), min(len(line), max(last + margin, last + 1))))
    depth, height, width = bounds
    return depth, height, width


def margin_voxels(
    spacing_mm_dhw: tuple[float, ...], margin_mm_dhw: tuple[float, ...] = (15.0, 20.0, 20.0)
) -> tuple[int, int, int]:
    """The published margins (5 slices of 3 mm, 20 pixels of 1 mm) as voxels of any spacing."""
    counts = (round(margin / step) for margin, step in zip(margin_mm_dhw, spacing_mm_dhw, strict=True))
    depth, height, width = counts
    return depth, height, width
