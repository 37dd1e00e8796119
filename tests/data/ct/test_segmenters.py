"""Segmenters are programs: how they are called, what they must leave, what happens where they fail."""

import json
import os

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel")

from medclip_hf.data.ct.geometry import UnusableScan, Volume  # noqa: E402
from medclip_hf.data.ct.segmenters import Segmenter, segment  # noqa: E402

VOLUME = Volume(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.diag([-1.0, -1.0, 2.0, 1.0]), "scan.nii.gz")


def install(folder, monkeypatch, body):
    """A program named TotalSegmentator that runs `body` with $IN and $OUT set."""
    program = folder / "bin" / "TotalSegmentator"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nIN="$2"\nOUT="$4"\n{body}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_the_program_sees_the_volume_and_its_labels_are_kept(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, f'[ "$5" = --ml ] && cp "$IN" "$OUT" && echo run >> {tmp_path}/runs')
    segmenter = Segmenter.from_text("totalsegmentator")
    assert segmenter.label_version == "v2"
    target = tmp_path / "segmentations" / "scan.nii.gz"
    for _ in range(2):
        assert segment(VOLUME, segmenter, target) == target
    image = nibabel.load(target)
    np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), VOLUME.values)
    np.testing.assert_allclose(image.affine, VOLUME.affine)
    assert (tmp_path / "runs").read_text() == "run\n"  # the second time the file was there
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("body", ["echo no memory >&2; exit 3", "exit 0"])
def test_a_program_that_fails_or_writes_nothing_refuses_the_scan(tmp_path, monkeypatch, body):
    install(tmp_path, monkeypatch, body)
    with pytest.raises(UnusableScan, match=r"scan\.nii\.gz") as error:
        segment(VOLUME, Segmenter.from_text("totalsegmentator"), tmp_path / "out" / "scan.nii.gz")
    assert error.value.reason == "segmentation failed"
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_not_installed_or_not_known_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="pip install TotalSegmentator"):
        Segmenter.from_text("totalsegmentator")
    with pytest.raises(ValueError, match="no MONAI bundle"):
        Segmenter.from_text(f"bundle:{tmp_path}")
    for text in ("nnunet", "bundle:", "totalsegmentator:x", ""):
        with pytest.raises(ValueError, match="expected 'totalsegmentator'"):
            Segmenter.from_text(text)


def test_a_bundle_is_run_by_monai_and_writes_ids_of_version_1(tmp_path):
    (tmp_path / "configs").mkdir()
    configuration = {
        "imports": ["$import shutil"],
        "bundle_root": ".",
        "output_dir": "eval",
        "datalist": [],
        "run": ["$shutil.copy(@datalist#0, @output_dir + '/image_trans.nii.gz')"],
    }
    (tmp_path / "configs/inference.json").write_text(json.dumps(configuration))
    segmenter = Segmenter.from_text(f"bundle:{tmp_path}")
    assert segmenter.label_version == "v1"
    labels = nibabel.load(segment(VOLUME, segmenter, tmp_path / "scan.nii.gz"))
    np.testing.assert_array_equal(np.asarray(labels.dataobj).transpose(2, 1, 0), VOLUME.values)
