"""Anatomy masks: both tables of TotalSegmentator, merging, boxes."""

import json

import numpy as np
import pytest

from medclip_hf.data.ct.anatomy import (
    ALL_ANATOMIES,
    THORACIC_ANATOMIES,
    TOTALSEGMENTATOR_STRUCTURES,
    bounding_box,
    check_lung_is_air,
    labelled_anatomies,
    margin_voxels,
    merge_labels,
    merge_table,
    renumbered,
)
from medclip_hf.data.ct.geometry import UnusableScan


def test_the_tables_have_the_published_ids():
    v1, v2 = ({name: i + 1 for i, name in enumerate(TOTALSEGMENTATOR_STRUCTURES[v])} for v in ("v1", "v2"))
    assert (len(v1), len(v2)) == (104, 117)
    assert [v1[n] for n in ("aorta", "lung_upper_lobe_left", "vertebrae_L5", "vertebrae_C1", "esophagus")] == [
        *(7, 13, 18, 41, 42)
    ]
    assert [v1[n] for n in ("heart_myocardium", "pulmonary_artery", "brain", "rib_left_1", "rib_right_12")] == [
        *(44, 49, 50, 58, 81)
    ]
    assert [v1[n] for n in ("humerus_left", "sacrum", "face", "autochthon_left", "urinary_bladder")] == [
        *(82, 92, 93, 100, 104)
    ]
    assert [v2[n] for n in ("pancreas", "lung_upper_lobe_left", "esophagus", "vertebrae_S1", "vertebrae_C1")] == [
        *(7, 10, 15, 26, 50)
    ]
    assert [v2[n] for n in ("heart", "aorta", "atrial_appendage_left", "spinal_cord", "rib_left_1")] == [
        *(51, 52, 61, 79, 92)
    ]
    assert [v2[n] for n in ("brain", "skull", "rib_right_12", "sternum", "costal_cartilages")] == [
        *(90, 91, 115, 116, 117)
    ]


def test_real_label_files_carry_the_same_table(real_data):
    import xml.etree.ElementTree as ElementTree

    import nibabel

    header = nibabel.load(real_data / "ct" / "example_seg_dicom.nii.gz").header
    table = ElementTree.fromstring(header.extensions[0].get_content().decode().rstrip("\0"))
    names = {int(label.get("Key")): label.text for label in table.iter("Label")}
    assert names == dict(enumerate(TOTALSEGMENTATOR_STRUCTURES["v2"], start=1))


def test_renumbering_is_a_look_in_the_table_for_any_layout():
    ids = np.random.default_rng(0).integers(0, 9, (4, 5, 6)).astype(np.uint8)
    table = np.array([0, 7, 0, 3, 255, 1, 2, 2, 9], dtype=np.uint8)
    for layout in (ids, ids[::-1, :, ::2], np.asfortranarray(ids), ids[:0]):
        assert np.array_equal(renumbered(layout, table), table[layout])
    assert renumbered(np.array([200], dtype=np.uint8), table)[0] == 0


def test_the_four_thoracic_anatomies_merge_as_published():
    table = merge_table("v2", THORACIC_ANATOMIES)
    assert {int(i): int(table[i]) for i in np.flatnonzero(table)} == {
        **dict.fromkeys(range(10, 15), 1),
        **{51: 2, 61: 2, 15: 3, 52: 4},
    }


def test_version_1_names_all_36_anatomies_and_version_2_lacks_two():
    assert labelled_anatomies("v1") == ALL_ANATOMIES
    assert len(ALL_ANATOMIES) == 36
    assert set(ALL_ANATOMIES) - set(labelled_anatomies("v2")) == {"face", "pulmonary artery"}
    assert (merge_table("v1", ALL_ANATOMIES)[1:] > 0).all()  # every structure of v1 belongs to one anatomy


def test_the_lexicon_of_reports_speaks_of_the_same_anatomies(repository):
    lexicon = json.loads((repository / "src/medclip_hf/data/reports/words/anatomies.json").read_text(encoding="utf-8"))
    assert set(lexicon["anatomies"]) == set(ALL_ANATOMIES)


@pytest.mark.parametrize(
    ("version", "anatomies", "message"),
    [
        ("v3", ("lung",), "v3"),
        ("v2", ("lung", "prostate gland"), "prostate gland"),
        ("v2", ("lung", "lung"), "different names"),
        ("v2", (), "different names"),
        ("v2", ("lung", "face"), "no label for 'face'"),
    ],
)
def test_what_cannot_be_merged_is_an_error(version, anatomies, message):
    with pytest.raises(ValueError, match=message):
        merge_table(version, anatomies)


def test_labels_become_ids_of_the_anatomies_in_their_order():
    labels = np.array([[[0, 10, 14, 52, 51, 1]]])
    assert merge_labels(labels, "v2", ("aorta", "lung")).tolist() == [[[0, 2, 2, 1, 0, 0]]]
    assert merge_labels(labels.astype(np.float32), "v2", ("aorta", "lung")).dtype == np.uint8


@pytest.mark.parametrize(
    ("labels", "version", "reason"),
    [
        ([0, 118], "v2", "mask with unknown ids"),
        ([0, 117], "v1", "mask with unknown ids"),
        ([0, -1], "v2", "mask with unknown ids"),
        ([0, 10.5], "v2", "mask with unknown ids"),
        ([0, float("nan")], "v2", "mask with unknown ids"),
        ([0, 300], "v2", "mask with unknown ids"),
        ([0, 1], "v2", "no anatomy in the mask"),
    ],
)
def test_labels_that_are_not_those_of_the_version_are_refused(labels, version, reason):
    with pytest.raises(UnusableScan, match=r"labels\.nii") as error:
        merge_labels(np.array([[labels]]), version, THORACIC_ANATOMIES, "labels.nii")
    assert error.value.reason == reason


def test_a_lung_mask_on_soft_tissue_is_refused():
    mask = np.ones((10, 10, 20), dtype=np.uint8)
    check_lung_is_air(np.full(mask.shape, -850), mask, ("lung",), "labels.nii")
    with pytest.raises(UnusableScan, match="40 HU"):
        check_lung_is_air(np.full(mask.shape, 40), mask, ("lung",), "labels.nii")
    check_lung_is_air(np.full(mask.shape, 40), mask, ("heart",), "labels.nii")


def test_the_box_has_the_published_margins_and_ends_at_the_array():
    mask = np.zeros((40, 60, 80), dtype=np.uint8)
    mask[10:13, 30:33, 70:73] = 2
    assert margin_voxels((3.0, 1.0, 1.0)) == (5, 20, 20)
    assert bounding_box(mask, (5, 20, 20)) == ((5, 17), (10, 52), (50, 80))
    assert bounding_box(mask, (0, 0, 0)) == ((10, 13), (30, 33), (70, 73))
