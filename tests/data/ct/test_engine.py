"""The CT engine: scans are independent, refused ones are told, killed runs go on, workers change nothing."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel")

from medclip_hf.data.ct.engine import EngineSettings, prepare_scans  # noqa: E402
from medclip_hf.data.ct.geometry import GeometryContract  # noqa: E402
from medclip_hf.data.ct.reading import load_ct  # noqa: E402
from medclip_hf.data.ct.scan_index import read_scan_rows  # noqa: E402
from medclip_hf.data.ct.sources import ScanSource  # noqa: E402
from medclip_hf.data.ct.volumes import read_crop, read_scan  # noqa: E402
from medclip_hf.data.records import AnatomyText  # noqa: E402

AFFINE = np.diag([-4.0, -4.0, 6.0, 1.0])
SETTINGS = EngineSettings(
    GeometryContract(spacing_mm_dhw=(6.0, 4.0, 4.0)), ("lung", "heart"), margin_mm_dhw=(6.0, 8.0, 8.0)
)


def torso(seed=0, shape=(20, 48, 48)):
    """HU of a body with two lungs in air, and its TotalSegmentator v2 labels."""
    d, h, w = (
        np.linspace(-1, 1, n).reshape([-1 if i == axis else 1 for i in range(3)]) for axis, n in enumerate(shape)
    )
    body = (h / 0.8) ** 2 + (w / 0.9) ** 2 + 0 * d < 1
    lung = (h / 0.5) ** 2 + ((np.abs(w) - 0.45) / 0.3) ** 2 + (d / 0.6) ** 2 < 1
    heart = (h + 0.1) ** 2 + w**2 + d**2 < 0.03
    hu = np.where(lung, -850.0, np.where(body, 40.0, -1000.0)) + np.random.default_rng(seed).normal(0, 15, shape)
    return np.rint(hu).astype(np.int16), np.where(lung, np.where(w < 0, 12, 10), np.where(heart, 51, 0)).astype(
        np.uint8
    )


def save(path, values):
    nibabel.save(nibabel.Nifti1Image(values.transpose(2, 1, 0), AFFINE), path)
    return path


@pytest.fixture
def sources(tmp_path):
    """Four scans of two patients."""
    made = []
    for i in range(4):
        hu, labels = torso(seed=i)
        made.append(
            ScanSource(
                scan_id=f"scan_{i}",
                study_id=f"study_{i}",
                patient_id=f"patient_{i // 2}",
                image_path=save(tmp_path / f"{i}.nii.gz", hu),
                labels_path=save(tmp_path / f"{i}_labels.nii.gz", labels),
                findings="The lungs are clear. The heart is enlarged.",
                impression="Cardiomegaly.",
                labels=(("Cardiomegaly", True),),
            )
        )
    return made


def prepare(sources, folder, **more):
    return prepare_scans(sources, folder, "train", SETTINGS, show_progress=False, **more)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_prepared_scan_is_the_box_around_its_anatomies_with_report_and_geometry(sources, tmp_path):
    report = prepare(sources, tmp_path / "out")
    assert (report.num_prepared, report.num_resumed, report.num_without_texts, report.refused) == (4, 0, 0, {})
    row = read_scan_rows(tmp_path / "out", "train")[1]
    assert (row.scan_id, row.study_id, row.patient_id) == ("scan_1", "study_1", "patient_0")
    assert row.anatomies_present == ("lung", "heart")
    assert [(text.anatomy, text.is_abnormal) for text in row.anatomy_texts] == [("lung", False), ("heart", True)]
    assert row.labels == (("Cardiomegaly", True),)
    hu, labels = torso(seed=1)
    places = np.argwhere(labels > 0)
    margin = np.array([1, 2, 2])
    low, high = np.maximum(places.min(0) - margin, 0), places.max(0) + margin
    box = tuple(slice(*bounds) for bounds in zip(low, high, strict=True))
    image, mask = read_crop(tmp_path / "out" / row.store_path)
    np.testing.assert_array_equal(image, hu[box])
    np.testing.assert_array_equal(mask, np.select([labels == 51, labels > 0], [2, 1])[box])
    assert row.shape_dhw == image.shape
    stored = read_scan(tmp_path / "out" / row.store_path)
    assert stored.contract == SETTINGS.contract
    np.testing.assert_allclose(np.array(stored.affine) @ [0, 0, 0, 1], AFFINE @ [*low[::-1], 1])


def test_whole_scans_are_kept_without_margins(sources, tmp_path):
    settings = replace(SETTINGS, margin_mm_dhw=None)
    prepare_scans(sources[:1], tmp_path / "out", "test", settings, show_progress=False)
    assert read_scan_rows(tmp_path / "out", "test")[0].shape_dhw == (20, 48, 48)


def test_refused_scans_are_listed_with_reason_and_counted_and_the_others_go_on(sources, tmp_path):
    hu, labels = torso()
    (tmp_path / "short.nii.gz").write_bytes(sources[0].image_path.read_bytes()[:500])
    bad = {
        "truncated": {"image_path": tmp_path / "short.nii.gz"},
        "twice": {"image_path": save(tmp_path / "twice.nii.gz", hu - 1024)},
        "grid": {"labels_path": save(tmp_path / "grid.nii.gz", labels[1:])},
        "nothing": {"labels_path": save(tmp_path / "nothing.nii.gz", labels * 0)},
        "unlabelled": {"labels_path": None},
        "problem": {"problem": "not in the metadata table"},
        "german": {"findings": "Die Lunge ist frei. Das Herz ist nicht vergrößert und der Befund ist unauffällig."},
        "missing": {"image_path": tmp_path / "missing.nii.gz"},
    }
    broken = [replace(sources[0], scan_id=name, impression="", **change) for name, change in bad.items()]
    report = prepare([*sources, *broken], tmp_path / "out")
    assert report.num_prepared == 4
    lines = [json.loads(line) for line in (tmp_path / "out/refused/train.jsonl").read_text().splitlines()]
    assert {line["scan_id"]: line["reason"] for line in lines} == {
        "truncated": "unreadable NIfTI",
        "twice": "rescaled twice",
        "grid": "mask on another grid",
        "nothing": "no anatomy in the mask",
        "unlabelled": "no anatomy labels",
        "problem": "metadata missing",
        "german": "report not in English",
        "missing": "file missing",
    }
    assert sum(report.refused.values()) == 8
    assert "short.nii.gz" in next(line["detail"] for line in lines if line["scan_id"] == "truncated")
    assert len(read_scan_rows(tmp_path / "out", "train")) == 4
    assert not list((tmp_path / "out/volumes/train").glob("german*"))


def test_a_refused_scan_is_tried_again_and_a_finished_one_is_not(sources, tmp_path, monkeypatch):
    path = sources[3].image_path
    content = path.read_bytes()
    path.write_bytes(content[:100])
    assert prepare(sources, tmp_path / "out").refused == {"unreadable NIfTI": 1}
    path.write_bytes(content)
    read = []
    monkeypatch.setattr("medclip_hf.data.ct.engine.load_ct", lambda *a, **k: read.append(a) or load_ct(*a, **k))
    report = prepare(sources, tmp_path / "out")
    assert (report.num_prepared, report.num_resumed, report.refused) == (4, 3, {})
    assert len(read) == 1
    assert (tmp_path / "out/refused/train.jsonl").read_text() == ""


def test_any_number_of_workers_gives_the_same_files(sources, tmp_path):
    prepare(sources[::-1], tmp_path / "one")
    report = prepare(sources, tmp_path / "two", num_workers=2)
    assert report.num_prepared == 4
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


KILLED_RUN = """
import pickle, sys, time
from pathlib import Path
import medclip_hf.data.ct.engine as engine
sys.path.insert(0, {tests!r})
import test_engine as test
load = engine.load_ct
def slow(*arguments, **more):
    time.sleep(0.3)
    return load(*arguments, **more)
engine.load_ct = slow
test.prepare(test.sources_below(Path({folder!r})), Path({folder!r}) / "out")
"""


def sources_below(folder):
    return [
        ScanSource(f"scan_{i}", f"study_{i}", "p", folder / f"{i}.nii.gz", folder / f"{i}_labels.nii.gz")
        for i in range(4)
    ]


def test_a_killed_run_goes_on_to_the_same_files(sources, tmp_path, repository):
    script = KILLED_RUN.format(tests=str(repository / "tests/data/ct"), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script])
    rows = tmp_path / "out/rows/train"
    while not (rows.is_dir() and len(list(rows.glob("[!.]*.json"))) >= 2) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert not (tmp_path / "out/train-00000-of-00001.parquet").exists()
    (tmp_path / "out/volumes/train/.scan_2.zarr.1.tmp").mkdir()  # what a kill amid writing leaves
    (tmp_path / "out/rows/train/.scan_2.json.tmp").write_text("{")
    report = prepare(sources_below(tmp_path), tmp_path / "out")
    assert report.num_resumed in (2, 3)
    prepare(sources_below(tmp_path), tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_an_unexpected_fault_sets_the_scan_aside_and_a_full_disk_stops_the_run(sources, tmp_path, monkeypatch):
    def fail(error):
        def write(*arguments, **more):
            raise error

        monkeypatch.setattr("medclip_hf.data.ct.engine.write_scan", write)

    fail(ZeroDivisionError("surprise"))
    assert prepare(sources, tmp_path / "a").refused == {"unexpected error": 4}
    fail(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space"):
        prepare(sources, tmp_path / "b")


def test_a_second_run_takes_new_texts_without_reading_the_volumes(sources, tmp_path, monkeypatch):
    prepare(sources[:1], tmp_path / "out")
    arrays = contents(tmp_path / "out/volumes")
    monkeypatch.setattr("medclip_hf.data.ct.engine.load_ct", None)
    again = replace(sources[0], findings="The lungs are clear.", impression="", labels=(("Cardiomegaly", False),))
    assert prepare([again], tmp_path / "out").num_prepared == 1
    row = read_scan_rows(tmp_path / "out", "train")[0]
    assert [text.is_abnormal for text in row.anatomy_texts] == [False, False]
    assert row.labels == (("Cardiomegaly", False),)
    assert contents(tmp_path / "out/volumes") == arrays


def test_other_settings_for_the_same_folder_are_refused(sources, tmp_path):
    prepare(sources[:1], tmp_path / "out")
    other = replace(SETTINGS, anatomies=("heart", "lung"))
    with pytest.raises(ValueError, match=r"other settings \(anatomies differ"):
        prepare_scans(sources, tmp_path / "out", "validation", other, show_progress=False)


def test_scan_ids_that_repeat_or_name_no_file_are_errors(sources, tmp_path):
    with pytest.raises(ValueError, match="unique"):
        prepare([sources[0], sources[0]], tmp_path / "out")
    for name in ("../x", "a/b", "", ".hidden", "x" * 300):
        with pytest.raises(ValueError, match="scan ids name files"):
            prepare([replace(sources[0], scan_id=name)], tmp_path / "out")
    with pytest.raises(ValueError, match="no scan"):
        prepare([], tmp_path / "out")


def test_anatomies_that_the_labels_cannot_have_are_an_error():
    with pytest.raises(ValueError, match="no label for 'face'"):
        EngineSettings(anatomies=("face",))


def test_a_scan_without_report_has_no_texts_rather_than_normal_ones(sources, tmp_path):
    silent = [
        replace(sources[0], findings="", impression=""),
        replace(sources[1], findings="Not given.", impression="Not given."),
    ]
    assert prepare(silent, tmp_path / "out").num_without_texts == 2
    assert [row.anatomy_texts for row in read_scan_rows(tmp_path / "out", "train")] == [(), ()]


def test_texts_decomposed_before_are_taken_in_the_order_of_the_anatomies(sources, tmp_path):
    texts = tuple(AnatomyText(name, "told", "", False) for name in ("aorta", "heart", "lung"))
    known, other = replace(sources[0], anatomy_texts=texts), replace(sources[1], anatomy_texts=texts[:1])
    report = prepare([known, other], tmp_path / "out")
    assert report.refused == {"texts of other anatomies": 1}
    assert [text.anatomy for text in read_scan_rows(tmp_path / "out", "train")[0].anatomy_texts] == ["lung", "heart"]


def test_neither_the_log_nor_the_refusals_name_the_patient(sources, tmp_path, caplog):
    with caplog.at_level("DEBUG"):
        prepare([sources[0], replace(sources[1], labels_path=None)], tmp_path / "out")
    assert "patient_0" not in caplog.text + (tmp_path / "out/refused/train.jsonl").read_text()
    assert "enlarged" not in caplog.text
