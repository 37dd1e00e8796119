"""The script that prepares CT scans, run on phantoms in CT-RATE's two trees, and on the real scans."""

import csv
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("nibabel")

from medclip_hf.data.ct.scan_index import read_scan_rows
from medclip_hf.data.ct.volumes import is_complete, read_crop
from medclip_hf.data.phantoms.torso_files import write_ct_rate
from medclip_hf.data.phantoms.torsos import TorsoSettings

SMALL = TorsoSettings(in_plane_size=48, slice_spacing_mm=(10.0, 12.0))
COARSE = ("--spacing", "12", "8", "8")


@pytest.fixture
def main(repository):
    """The script's entry point."""
    specification = importlib.util.spec_from_file_location("prepare_ct", repository / "scripts/prepare_ct.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    return lambda *arguments: script.main([str(argument) for argument in arguments])


def test_both_trees_of_ct_rate_give_the_same_arrays_texts_and_labels(main, tmp_path, capsys):
    prepared = {}
    for layout, tree in (("fixed", "fixed"), ("original", "older")):
        write_ct_rate(tmp_path / layout, 2, layout=layout, settings=SMALL)
        assert main("--ct-rate", tmp_path / layout, "--tree", tree, "--output", tmp_path / f"out_{tree}", *COARSE) == 0
        rows = read_scan_rows(tmp_path / f"out_{tree}", "train")
        prepared[tree] = [(row, read_crop(tmp_path / f"out_{tree}" / row.store_path)) for row in rows]
        assert f"{len(rows)} scans prepared (0 by an earlier run, 0 without a report)" in capsys.readouterr().out
    assert len(prepared["fixed"]) == len(prepared["older"]) >= 2
    for (row, arrays), (other_row, other_arrays) in zip(prepared["fixed"], prepared["older"], strict=True):
        assert (row.scan_id, row.anatomy_texts, row.labels) == (
            other_row.scan_id,
            other_row.anatomy_texts,
            other_row.labels,
        )
        for array, other in zip(arrays, other_arrays, strict=True):
            np.testing.assert_array_equal(array, other)
        assert row.anatomies_present == ("lung", "heart", "esophagus", "aorta")
        assert len(row.labels) == 18
        assert np.median(arrays[0][arrays[1] == 1]) < -600  # lung is air


def test_every_scan_refused_is_no_success_and_a_wrong_call_is_told(main, repository, tmp_path, capsys):
    (tmp_path / "broken.nii.gz").write_bytes(b"\x1f\x8b")
    with (tmp_path / "scans.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "labels", "scan_id"], ["broken.nii.gz", "broken.nii.gz", "one"]])
    assert main("--table", tmp_path / "scans.csv", "--output", tmp_path / "out") == 1
    assert "1 refused: unreadable NIfTI" in capsys.readouterr().out
    script = [sys.executable, repository / "scripts/prepare_ct.py"]
    done = subprocess.run(
        [*script, "--ct-rate", tmp_path / "nothing", "--output", tmp_path / "out"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: no CT-RATE volumes")
    assert "Traceback" not in done.stderr


def test_the_real_scans_go_through_a_table_and_a_segmenter(main, real_data, tmp_path, monkeypatch):
    folder = real_data / "ct"
    rows = [
        {"image": folder / "example_ct.nii.gz", "labels": folder / "example_seg_fast_force_split.nii.gz"},
        {"image": folder / "example_ct_dicom", "labels": ""},
    ]
    with (tmp_path / "scans.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "labels", "scan_id"])
        writer.writeheader()
        writer.writerows({**row, "scan_id": name} for row, name in zip(rows, ("torso", "series"), strict=True))
    program = tmp_path / "bin/TotalSegmentator"  # stands for the real one, which needs its weights
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncp {folder / "example_seg_dicom.nii.gz"} "$4"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    arguments = (
        *("--table", tmp_path / "scans.csv", "--split", "test", "--output", tmp_path / "out"),
        *("--anatomies", "aorta, liver, lung", "--segment", "totalsegmentator", "--spacing", "4", "4", "4"),
    )
    assert main(*arguments) == 0
    series, torso = read_scan_rows(tmp_path / "out", "test")
    assert (series.anatomies_present, torso.anatomies_present) == (("aorta", "liver"), ("aorta", "liver", "lung"))
    image, mask = read_crop(tmp_path / "out" / torso.store_path)
    assert 20 < np.median(image[mask == 2]) < 150
    assert is_complete(mask, 3).tolist() == [False, False, False]  # the scan itself ends within each of them
    assert json.loads((tmp_path / "out/engine.json").read_text())["anatomies"] == ["aorta", "liver", "lung"]
