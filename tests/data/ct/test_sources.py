"""What scans there are: CT-RATE's two trees, Rad-ChestCT, a hospital's table."""

import csv
import json

import numpy as np
import pytest

from medclip_hf.data.ct.reading import Rescale
from medclip_hf.data.ct.sources import ct_rate_sources, rad_chestct_sources, table_sources, with_texts
from medclip_hf.data.records import AnatomyText


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def ct_rate(root, tree="train_fixed", name="train_1_a_1.nii.gz"):
    place = f"train_1/train_1_a/{name}"
    touch(root / "dataset" / tree / place)
    touch(root / "dataset/ts_seg/ts_total/train_fixed" / place)
    write_csv(
        root / "dataset/metadata/train_metadata.csv",
        [
            {
                "VolumeName": name,
                "RescaleSlope": "1",
                "RescaleIntercept": "-8192",
                "XYSpacing": "[0.7, 0.8]",
                "ZSpacing": "1.5",
                "ImagePositionPatient": "['-100.0', '-90', '-3e2']",
                "ImageOrientationPatient": "[1, 0, 0, 0, 1, 0]",
            }
        ],
    )
    write_csv(
        root / "dataset/radiology_text_reports/train_reports.csv",
        [{"VolumeName": name, "Findings_EN": "Clear lungs,\nno nodule.", "Impressions_EN": "Not given."}],
    )
    write_csv(
        root / "dataset/multi_abnormality_labels/train_predicted_labels.csv",
        [{"VolumeName": name, "Cardiomegaly": "1", "Lung nodule": "0"}],
    )


def test_the_fixed_tree_is_in_hounsfield_units_and_brings_report_labels_and_masks(tmp_path):
    ct_rate(tmp_path)
    (source,) = ct_rate_sources(tmp_path, "train")
    assert (source.scan_id, source.study_id, source.patient_id) == ("train_1_a_1", "train_1_a", "train_1")
    assert source.rescale is None
    assert source.affine is None
    assert source.findings.startswith("Clear lungs")
    assert source.labels == (("Cardiomegaly", True), ("Lung nodule", False))
    assert source.labels_path.is_file()


def test_the_older_tree_takes_slope_intercept_and_place_from_the_table(tmp_path):
    ct_rate(tmp_path, tree="train")
    (source,) = ct_rate_sources(tmp_path / "dataset", "train")
    assert source.rescale == Rescale(1.0, -8192.0)
    expected = np.array([[-0.7, 0, 0, 100], [0, -0.8, 0, 90], [0, 0, 1.5, -300], [0, 0, 0, 1]])
    np.testing.assert_allclose(source.affine, expected)
    assert source.labels_path.is_file()


def test_the_fixed_tree_is_preferred_and_the_other_can_be_named(tmp_path):
    ct_rate(tmp_path, tree="train")
    ct_rate(tmp_path, tree="train_fixed")
    assert ct_rate_sources(tmp_path, "train")[0].rescale is None
    assert ct_rate_sources(tmp_path, "train", "older")[0].rescale is not None


def test_a_volume_without_usable_metadata_is_a_problem_and_not_taken_for_hounsfield_units(tmp_path):
    ct_rate(tmp_path, tree="train")
    touch(tmp_path / "dataset/train/train_2/train_2_a/train_2_a_1.nii.gz")
    first, second = ct_rate_sources(tmp_path, "train")
    assert not first.problem
    assert "not in the metadata table" in second.problem
    rows = [{"VolumeName": "train_1_a_1.nii.gz", "RescaleSlope": "", "RescaleIntercept": "-1024"}]
    write_csv(tmp_path / "dataset/metadata/train_metadata.csv", rows)
    assert "cannot be used" in ct_rate_sources(tmp_path, "train")[0].problem


def test_the_older_tree_without_its_table_and_a_wrong_folder_are_errors(tmp_path):
    touch(tmp_path / "dataset/train/train_1/train_1_a/train_1_a_1.nii.gz")
    with pytest.raises(ValueError, match="needs the metadata table"):
        ct_rate_sources(tmp_path, "train")
    with pytest.raises(ValueError, match="no CT-RATE volumes"):
        ct_rate_sources(tmp_path, "validation")
    with pytest.raises(ValueError, match="has the splits"):
        ct_rate_sources(tmp_path, "test")


def test_flat_downloads_of_the_tables_are_found(tmp_path):
    ct_rate(tmp_path)
    folder = tmp_path / "dataset/multi_abnormality_labels"
    (folder / "train_predicted_labels.csv").rename(
        tmp_path / "dataset/dataset_multi_abnormality_labels_train_predicted_labels.csv"
    )
    assert ct_rate_sources(tmp_path, "train")[0].labels[0] == ("Cardiomegaly", True)


def test_rad_chestct_findings_are_present_where_any_location_has_them(tmp_path):
    for name in ("trn00001", "trn00002", "tst00001"):
        touch(tmp_path / f"{name}.npz")
    touch(tmp_path / "masks/trn00002.nii.gz")
    row = {"nodule*right_upper": "0", "nodule*left_lower": "1", "atelectasis*right_upper": "0"}
    write_csv(tmp_path / "imgtrain_Abnormality_and_Location_Labels.csv", [{"NoteAcc_DEID": "trn00001"} | row])
    write_csv(tmp_path / "Summary_3630.csv", [{"NoteAcc_DEID": "trn00001", "MRN_DEID": "P7"}])
    first, second = rad_chestct_sources(tmp_path, "train", tmp_path / "masks")
    assert first.labels == (("atelectasis", False), ("nodule", True))
    assert (first.patient_id, second.patient_id) == ("P7", "trn00002")
    assert (first.labels_path, second.labels_path) == (None, tmp_path / "masks/trn00002.nii.gz")
    with pytest.raises(ValueError, match=r"val\*\.npz"):
        rad_chestct_sources(tmp_path, "validation")


def test_a_table_names_files_identifiers_report_and_findings(tmp_path):
    rows = [
        {"image": "a/ct.nii.gz", "labels": "a/seg.nii.gz", "patient_id": "P1", "findings": "f", "label:Nodule": "1"},
        {"image": "Doe_John/series", "labels": "", "patient_id": "", "findings": "", "label:Nodule": ""},
    ]
    write_csv(tmp_path / "scans.csv", rows)
    first, second = table_sources(tmp_path / "scans.csv")
    assert first.image_path == tmp_path / "a/ct.nii.gz"
    assert (first.patient_id, first.labels) == ("P1", (("Nodule", True),))
    assert "Doe" not in second.scan_id + second.study_id + second.patient_id
    assert (second.labels_path, second.labels) == (None, ())
    assert second.scan_id == table_sources(tmp_path / "scans.csv")[1].scan_id


def test_a_table_with_unknown_or_missing_columns_is_an_error(tmp_path):
    write_csv(tmp_path / "a.csv", [{"image": "x", "impresion": "y"}])
    with pytest.raises(ValueError, match="impresion"):
        table_sources(tmp_path / "a.csv")
    write_csv(tmp_path / "b.csv", [{"path": "x"}])
    with pytest.raises(ValueError, match="lacks the columns"):
        table_sources(tmp_path / "b.csv")
    with pytest.raises(ValueError, match="no table"):
        table_sources(tmp_path / "c.csv")


def test_texts_decomposed_before_are_taken_by_study(tmp_path):
    ct_rate(tmp_path)
    sources = ct_rate_sources(tmp_path, "train")
    text = {"anatomy": "lung", "findings": "Clear.", "impression": "", "is_abnormal": False}
    path = tmp_path / "anatomy_texts.jsonl"
    path.write_text(json.dumps({"study_id": "train_1_a", "anatomy_texts": [text]}) + "\n")
    assert with_texts(sources, path)[0].anatomy_texts == (AnatomyText(**text),)
    path.write_text(json.dumps({"study_id": "train_9_a", "anatomy_texts": [text]}) + "\n")
    with pytest.raises(ValueError, match="none of the 1 studies"):
        with_texts(sources, path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is no anatomy_texts"):
        with_texts(sources, path)
