"""The CT pipelines: files or arrays in, findings or embeddings with windows and flags out; clear refusals."""

import json

import nibabel
import numpy as np
import pytest
import torch
from transformers import AutoProcessor, pipeline

from medclip_hf.evaluation.ct_zero_shot import Finding, embed_findings, score_scan
from medclip_hf.pipelines import CTFeatureExtractionPipeline, CTZeroShotClassificationPipeline, inputs

SCORE, EMBED = "ct-zero-shot-classification", "ct-feature-extraction"
FINDINGS = [
    Finding("nodule", "lung", "not nodule.", "nodule."),
    Finding("effusion", "heart", "not effusion.", "effusion."),
]
LABELS_V2 = {1: 10, 2: 51}  # left upper lobe, heart
GRID = {"spacing_mm_dhw": (3.0, 1.0, 1.0), "orientation": "LPS"}


@pytest.fixture(scope="module")
def score(fvlm_folder):
    return pipeline(SCORE, model=str(fvlm_folder), device="cpu")


@pytest.fixture(scope="module")
def embed(fvlm_folder):
    return pipeline(EMBED, model=str(fvlm_folder), device="cpu")


@pytest.fixture
def files(tmp_path, volume, mask):
    """(scan, labels) as NIfTI files on the model's grid."""
    labels = np.zeros_like(mask)
    for ours, theirs in LABELS_V2.items():
        labels[mask == ours] = theirs
    affine = np.diag([-1.0, -1.0, 3.0, 1.0])
    for name, values in (("scan", volume), ("labels", labels)):
        nibabel.save(nibabel.Nifti1Image(values.transpose(2, 1, 0), affine), tmp_path / f"{name}.nii.gz")
    return tmp_path / "scan.nii.gz", tmp_path / "labels.nii.gz"


def probabilities(rows):
    return {row["finding"]: row["probability"] for row in rows}


def test_probabilities_are_those_of_the_protocol(score, volume, mask):
    rows = score(volume, mask=mask, findings=FINDINGS, **GRID)
    prepared = score.image_processor(volume, anatomy_mask=mask)
    expected = score_scan(
        score.model,
        prepared["pixel_values"][0, 0],
        prepared["anatomy_mask"][0],
        embed_findings(score.model, score.tokenizer, FINDINGS),
        window_size_dhw=(8, 8, 8),
    )
    assert probabilities(rows) == pytest.approx(expected)
    assert [row["anatomy"] for row in rows] == ["lung", "heart"]


def test_windows_are_places_in_the_scan_that_hold_the_anatomy(score, volume, mask):
    for protocol in ("published", "shared"):
        rows = score(volume, mask=mask, findings=FINDINGS, protocol=protocol)
        for row in rows:
            window = row["window"]
            place = tuple(
                slice(start, start + size) for start, size in zip(window["start_dhw"], window["size_dhw"], strict=True)
            )
            wanted = 1 if row["anatomy"] == "lung" else 2
            assert (mask[place] == wanted).sum() == (mask == wanted).sum()
            assert window["shape_dhw"] == volume.shape


def test_flags_tell_what_is_missing_cut_off_or_not_checked(score, volume, mask):
    told = score(volume, mask=mask, findings=FINDINGS, **GRID)
    assert [row["flags"] for row in told] == [[], ["heart reaches the edge of the scan and may be cut off"]]
    alone = score(volume, mask=np.where(mask == 1, mask, 0), findings=FINDINGS, **GRID)[1]
    assert alone["probability"] is None
    assert alone["window"] is None
    assert alone["flags"] == ["heart is not in the scan"]
    silent = score(volume, mask=mask, findings=FINDINGS)[0]
    assert silent["flags"] == ["orientation not told and not checked", "spacing_mm_dhw not told and not checked"]


def test_a_file_gives_what_its_array_gives(score, files, volume, mask):
    path, labels = files
    from_file = score(str(path), mask=labels, findings=FINDINGS)
    from_array = score(volume, mask=mask, findings=FINDINGS, **GRID)
    assert probabilities(from_file) == pytest.approx(probabilities(from_array), abs=1e-5)
    assert from_file[0]["window"]["affine"] == np.diag([-1.0, -1.0, 3.0, 1.0]).tolist()


def test_thick_slices_are_flagged(score, files, tmp_path):
    thick = [tmp_path / name for name in ("thick.nii", "thick_labels.nii")]
    for source, target in zip(files, thick, strict=True):
        image = nibabel.load(source)
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), np.diag([-1.0, -1.0, 7.5, 1.0])), target)
    flags = score(thick[0], mask=thick[1], findings=FINDINGS)[0]["flags"]
    assert flags == ["slices 7.5 mm apart, the model's are 3"]


def test_batches_lists_and_generators_give_what_single_scans_give(score, files, volume, mask):
    scans = [
        {"image": volume, "mask": mask, **GRID},
        {"image": files[0], "mask": files[1]},
        {"image": np.concatenate([volume, volume]), "mask": np.concatenate([mask, mask]), **GRID},
    ]
    single = [probabilities(score(scan, findings=FINDINGS)) for scan in scans]
    for found in (
        score(scans, findings=FINDINGS, batch_size=2),
        list(score((scan for scan in scans), findings=FINDINGS, batch_size=2)),
        score([score.prepare(scan) for scan in scans], findings=FINDINGS),
    ):
        assert [probabilities(rows) for rows in found] == [pytest.approx(one) for one in single]
    assert score([], findings=FINDINGS) == []


def test_a_scan_without_a_mask_names_the_ways_out_and_is_scored_whole_on_request(score, files, volume):
    for scan in (volume, str(files[0])):
        with pytest.raises(ValueError, match=r"(?s)TotalSegmentator.*bundle.*whole-volume"):
            score(scan, findings=FINDINGS)
        rows = score(scan, findings=FINDINGS, without_mask="whole-volume")
        assert all(0 <= row["probability"] <= 1 for row in rows)
        assert all(any("no anatomy mask" in flag for flag in row["flags"]) for row in rows)
        assert rows[0]["window"]["start_dhw"] == (0, 0, 0)
        assert rows[0]["window"]["size_dhw"] == volume.shape


def test_a_segmenter_makes_the_mask_and_is_named_in_the_flags(score, files, monkeypatch):
    def segment(volume, segmenter, target):
        return files[1]

    monkeypatch.setattr(inputs, "segment", segment)
    monkeypatch.setattr("medclip_hf.data.ct.segmenters.shutil.which", lambda name: name)
    made = score(files[0], segmenter="totalsegmentator", findings=FINDINGS)
    assert probabilities(made) == probabilities(score(files[0], mask=files[1], findings=FINDINGS))
    assert made[0]["flags"] == ["mask made by totalsegmentator, not checked by a person"]


def test_a_segmenter_that_is_not_there_is_told(score, files):
    with pytest.raises(ValueError, match="TotalSegmentator is not installed"):
        score(files[0], segmenter="totalsegmentator")


def test_findings_of_ct_rate_are_taken_where_none_are_named(score, volume, mask):
    rows = score(volume, mask=mask)
    assert {row["anatomy"] for row in rows} == {"lung", "heart"}
    assert len(rows) == 14  # aorta's and esophagus's are left out


def test_embeddings_are_unit_vectors_and_missing_anatomies_are_not_a_number(embed, volume, mask):
    found = embed(volume, mask=np.where(mask == 1, mask, 0), **GRID)
    assert found["anatomies"] == ["lung", "heart"]
    assert found["embeddings"].shape == (2, 12)
    assert np.linalg.norm(found["embeddings"][0]) == pytest.approx(1, abs=1e-5)
    assert np.isnan(found["embeddings"][1]).all()
    assert found["windows"][1] is None
    assert isinstance(embed(volume, mask=mask, return_tensors=True)["embeddings"], torch.Tensor)


def test_arguments_of_pipeline_itself_are_no_misspelt_ones(fvlm_folder, volume, mask):
    made = pipeline(SCORE, model=str(fvlm_folder), device="cpu", local_files_only=True, findings=FINDINGS, batch_size=2)
    assert len(made(volume, mask=mask)) == len(FINDINGS)


def test_another_number_format_is_taken(fvlm_folder, volume, mask):
    half = pipeline(SCORE, model=str(fvlm_folder), dtype=torch.bfloat16, device="cpu")
    assert all(0 <= row["probability"] <= 1 for row in half(volume, mask=mask, findings=FINDINGS))


# Saving ----------------------------------------------------------------------------------------------------------


def test_either_saved_pipeline_carries_both(embed, tmp_path):
    embed.save_pretrained(tmp_path / "saved")
    for task, expected in ((SCORE, CTZeroShotClassificationPipeline), (EMBED, CTFeatureExtractionPipeline)):
        assert type(pipeline(task, model=str(tmp_path / "saved"), device="cpu")) is expected
    AutoProcessor.from_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["custom_pipelines"].keys() == {SCORE, EMBED}


STRANGER = """
import json, sys
import numpy as np
from transformers import pipeline
folder, second, scan, result = sys.argv[1:]
arrays = np.load(scan)
findings = [{"name": "nodule", "anatomy": "lung", "absent": "not nodule.", "present": "nodule."}]
found = []
for place in (folder, second):
    score = pipeline("ct-zero-shot-classification", model=place, trust_remote_code=True)
    found.append(score(arrays["volume"], mask=arrays["mask"], findings=findings))
    if place == folder:
        score.save_pretrained(second)
assert found[0] == found[1], found
embed = pipeline("ct-feature-extraction", model=second, trust_remote_code=True)
vectors = embed(arrays["volume"], mask=arrays["mask"])["embeddings"]
assert abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
try:
    score("scan.nii.gz")
except ValueError as error:
    assert "medclip-hf[ct]" in str(error), error
json.dump(found[0], open(result, "w"))
"""


def test_arrays_are_scored_the_same_where_the_package_is_absent(score, volume, mask, tmp_path, run_without_package):
    score.save_pretrained(tmp_path / "first")
    np.savez(tmp_path / "scan.npz", volume=volume, mask=mask)
    run_without_package(
        STRANGER, tmp_path / "first", tmp_path / "second", tmp_path / "scan.npz", tmp_path / "result.json"
    )
    here = score(volume, mask=mask, findings=FINDINGS[:1])
    there = json.loads((tmp_path / "result.json").read_text())
    assert probabilities(there) == pytest.approx(probabilities(here), rel=1e-5)
    assert there[0]["window"]["start_dhw"] == list(here[0]["window"]["start_dhw"])


# Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "needs 'image'"),
        ({"picture": 1}, r"a scan has no \['picture'\]"),
        ({"mask": "labels.nii.gz"}, "anatomy_mask must be an array"),
        ({"orientation": "RAS"}, "RAS orientation, but these weights expect LPS"),
        ({"spacing_mm_dhw": (1, 1, 1)}, "Resample the scan"),
        ({"image": np.zeros((4, 4, 4))}, "its volume has|is constant|no air"),
    ],
)
def test_a_scan_that_cannot_be_used_is_refused(score, volume, mask, change, message):
    with pytest.raises(ValueError, match=message):
        score({"image": volume, "mask": mask, **change}, findings=FINDINGS)


def test_what_is_no_scan_is_refused(score, files, mask, tmp_path):
    with pytest.raises(ValueError, match="but int came"):
        score(3)
    with pytest.raises(ValueError, match="the mask of a file must be a file"):
        score(files[0], mask=mask)
    with pytest.raises(ValueError, match="are read from the file"):
        score(files[0], mask=files[1], orientation="LPS")
    with pytest.raises(ValueError, match="does not exist"):
        score(tmp_path / "absent.nii.gz", mask=files[1])
    with pytest.raises(ValueError, match="without_mask is 'whole-volume'"):
        score(files[0], without_mask="guess")
    with pytest.raises(ValueError, match=r"knows no \['masks'\]"):
        score(files[0], masks=files[1])
    for size in ((1, 2), (0, 8, 8), 8, "abc"):
        with pytest.raises(ValueError, match="window_size_dhw must be 3 numbers of 1 or more"):
            score(files[0], mask=files[1], window_size_dhw=size)
    for rescale in (3, ("a", "b"), (1, float("nan"))):
        with pytest.raises(ValueError, match="rescale must be 2 numbers, but"):
            score(files[0], mask=files[1], rescale=rescale)


@pytest.mark.parametrize(
    ("findings", "message"),
    [
        ([], "at least one"),
        ([{"name": "nodule"}], "is no finding"),
        ([{"name": "nodule", "anatomy": "lung", "absent": "", "present": "x"}], "none empty"),
        (["nodule"], "is no finding"),
        ([FINDINGS[0], FINDINGS[0]], "a name of its own"),
        ([Finding("cyst", "liver", "no", "yes")], "findings of \\['liver'\\]"),
    ],
)
def test_what_is_no_finding_is_refused(score, volume, mask, findings, message):
    with pytest.raises(ValueError, match=message):
        score(volume, mask=mask, findings=findings)


def test_another_model_is_refused(conceptclip_folder):
    with pytest.raises(ValueError, match="needs an fVLM"):
        pipeline(EMBED, model=str(conceptclip_folder), device="cpu")
