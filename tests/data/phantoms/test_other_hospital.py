"""The other hospital: what it changes in images and words, and what it leaves as it is."""

import csv

import nibabel
import numpy as np
import pytest

from medclip_hf.data.phantoms.other_hospital import (
    BLOTCH_HU,
    NOISE_HU,
    OTHER_WORDS,
    SLICE_SPACING_MM,
    blotches,
    other_hospital,
    reword,
    write_other_hospital,
)
from medclip_hf.data.phantoms.torso_files import write_ct_rate
from medclip_hf.data.phantoms.torsos import TorsoSettings
from medclip_hf.data.reports.lexicon import mentioned_anatomies

SMALL = TorsoSettings(in_plane_size=24, max_studies=1, max_reconstructions=1, findings=("cardiomegaly",), prevalence=1)


def test_noise_and_spacing_change_and_findings_do_not():
    elsewhere = other_hospital(SMALL)
    assert (elsewhere.noise_hu, elsewhere.slice_spacing_mm) == (NOISE_HU, SLICE_SPACING_MM)
    assert (elsewhere.findings, elsewhere.prevalence) == (SMALL.findings, SMALL.prevalence)


def test_reports_are_told_in_other_words_with_sides_and_sizes_as_before():
    told = reword("Pleural effusion on the left. There is a pulmonary nodule of 9 mm. The heart is not enlarged.")
    assert told == (
        "Hydrothorax on the left. There is a pulmonary rounded density of 9 mm. Cardiac silhouette not widened."
    )


def test_rewording_once_is_enough_and_changes_every_term():
    for old, _ in OTHER_WORDS:
        assert reword(reword(old)) == reword(old) != old


@pytest.mark.parametrize(
    ("text", "anatomy"),
    [("Cardiomegaly.", "heart"), ("Pericardial effusion.", "heart"), ("Hiatal hernia.", "esophagus")],
)
def test_the_anatomy_of_a_finding_can_still_be_told(text, anatomy):
    assert mentioned_anatomies(reword(text)) == mentioned_anatomies(text) == (anatomy,)


def test_blotches_outlive_an_average_over_voxels_of_8_mm():
    noise = blotches((40, 40, 40), (2.0, 2.0, 2.0), np.random.default_rng(0))
    coarse = noise.reshape(10, 4, 10, 4, 10, 4).mean(axis=(1, 3, 5))
    assert BLOTCH_HU[0] <= noise.std() <= BLOTCH_HU[1]
    assert coarse.std() > 0.5 * noise.std()


def test_a_tree_is_that_of_the_first_hospital_but_for_voxels_and_words(tmp_path):
    (path,) = write_other_hospital(tmp_path / "new", 1, seed=3, orientations=("LPS",), settings=SMALL)
    (plain,) = write_ct_rate(tmp_path / "old", 1, seed=3, orientations=("LPS",), settings=other_hospital(SMALL))
    noisy, quiet = nibabel.load(path), nibabel.load(plain)
    np.testing.assert_array_equal(noisy.affine, quiet.affine)
    difference = np.asarray(noisy.dataobj, float) - np.asarray(quiet.dataobj, float)
    assert 50 < difference.std() < BLOTCH_HU[1]  # less than drawn: nothing is below -1024 HU
    reports = [
        next(csv.DictReader((tmp_path / name / "dataset/radiology_text_reports/train_reports.csv").open()))
        for name in ("new", "old")
    ]
    assert reports[0]["Impressions_EN"] == reword(reports[1]["Impressions_EN"])
    assert "silhouette" in (reports[0]["Impressions_EN"] + reports[0]["Findings_EN"]).lower()
    again = write_other_hospital(tmp_path / "again", 1, seed=3, orientations=("LPS",), settings=SMALL)
    assert again[0].read_bytes() == path.read_bytes()
