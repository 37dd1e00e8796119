import csv
import json
import time

import numpy as np
import pytest

from medclip_hf.data.phantoms.torso_files import CT_RATE_LABELS, plans_of_split, write_ct_rate
from medclip_hf.data.phantoms.torso_findings import FINDINGS
from medclip_hf.data.phantoms.torso_reports import write_report
from medclip_hf.data.phantoms.torsos import TorsoPlan, TorsoSettings, draw_torso, plan_patient

SMALL = TorsoSettings(in_plane_size=64, slice_spacing_mm=(8.0, 8.0), noise_hu=(15.0, 15.0))
LUNG_IDS = range(10, 15)


def plan_with(*findings: str, patient: int = 3, has_contrast: bool = False) -> TorsoPlan:
    rng = np.random.default_rng([5, patient])
    lesions = tuple(lesion for name in findings for lesion in FINDINGS[name].place(rng, name))
    return TorsoPlan(5, patient, 0, 0, lesions, has_contrast, (1.0, 1.0, 1.0), age=60, sex="F")


def test_the_same_seed_and_patient_give_the_same_voxels():
    first, again = (draw_torso(plan_patient(4, 17, SMALL)[0], SMALL) for _ in range(2))
    assert np.array_equal(first.image_hu, again.image_hu)
    assert np.array_equal(first.labels, again.labels)


def test_another_patient_and_another_reconstruction_give_other_voxels():
    plans = [plan for patient in range(6) for plan in plan_patient(4, patient, SMALL)]
    images = {draw_torso(plan, SMALL).image_hu.tobytes() for plan in plans}
    assert len(images) == len(plans)


def test_leaving_a_finding_out_does_not_move_the_others():
    fewer = TorsoSettings(prevalence=1.0, findings=("lung nodule", "hiatal hernia"))
    everything = set(plan_patient(0, 1, TorsoSettings(prevalence=1.0))[0].lesions)
    assert set(plan_patient(0, 1, fewer)[0].lesions) <= everything


def test_chronic_findings_stay_from_study_to_study():
    settings = TorsoSettings(max_studies=3, prevalence=0.5)
    for patient in range(20):
        chronic = [
            tuple(lesion for lesion in plan.lesions if FINDINGS[lesion.finding].is_chronic)
            for plan in plan_patient(0, patient, settings)
        ]
        assert len(set(chronic)) == 1


def test_a_torso_holds_the_four_thoracic_anatomies_and_values_of_ct():
    torso = draw_torso(plan_with(), SMALL)
    assert {*LUNG_IDS, 15, 51, 52} <= set(np.unique(torso.labels))
    assert torso.image_hu.dtype == np.int16
    assert torso.image_hu.min() >= -1024
    assert -900 < np.median(torso.image_hu[np.isin(torso.labels, LUNG_IDS)]) < -750
    assert 20 < np.median(torso.image_hu[torso.labels == 51]) < 70


def test_left_organs_lie_at_larger_x_and_the_spine_at_larger_y_and_the_liver_low():
    labels = draw_torso(plan_with(), SMALL).labels
    centre = {name: np.argwhere(labels == i).mean(axis=0) for name, i in {"spleen": 1, "liver": 5, "heart": 51}.items()}
    spine = np.argwhere((labels >= 32) & (labels <= 43)).mean(axis=0)
    assert centre["spleen"][2] > centre["liver"][2]
    assert spine[1] > centre["heart"][1]
    assert centre["liver"][0] < centre["heart"][0]


@pytest.mark.parametrize("finding", list(FINDINGS))
def test_every_finding_changes_the_image_where_its_mask_is(finding):
    with_finding, without = (draw_torso(plan_with(*names), SMALL) for names in ((finding,), ()))
    mask = with_finding.finding_masks[finding]
    change = np.abs(with_finding.image_hu.astype(int) - without.image_hu)
    assert mask.sum() >= 8
    assert change[mask].mean() > 20
    assert change[mask].mean() > 5 * change[~mask].mean()


@pytest.mark.parametrize(
    ("finding", "ids"),
    [(name, {"lung": LUNG_IDS, "heart": (51,), "esophagus": (15,), "aorta": (52,)}[f.anatomy])
     for name, f in FINDINGS.items() if f.ct_rate_name],
)  # fmt: skip
def test_every_finding_of_ct_rate_touches_its_anatomy(finding, ids):
    torso = draw_torso(plan_with(finding), SMALL)
    organ = np.isin(torso.labels, ids)
    near = np.zeros_like(organ)
    for shift in (-2, -1, 0, 1, 2):
        for axis in range(3):
            near |= np.roll(organ, shift, axis=axis)
    assert (near & torso.finding_masks[finding]).any()


def test_at_least_eight_findings_carry_names_of_ct_rate():
    names = [finding.ct_rate_name for finding in FINDINGS.values() if finding.ct_rate_name]
    assert len(names) >= 8
    assert set(names) <= set(CT_RATE_LABELS)


def test_a_volume_of_128_by_128_by_64_is_drawn_in_a_fraction_of_a_second():
    settings = TorsoSettings(slice_spacing_mm=(4.5, 4.5))
    plan = plan_with("lung nodule", "pleural effusion", "aortic wall calcification")
    draw_torso(plan, settings)
    start = time.process_time()
    draw_torso(plan, settings)
    assert time.process_time() - start < 2  # 0.2 on an idle machine


def test_normal_anatomies_are_not_named_in_the_impression_and_untrue_sentences_not_in_the_findings():
    for patient in range(40):
        plan = plan_patient(2, patient)[0]
        report = write_report(plan)
        if "cardiomegaly" in plan.findings:
            assert "not enlarged" not in report.findings
        if not any(FINDINGS[name].anatomy == "heart" for name in plan.findings):
            assert not any(word in report.impression.lower() for word in ("heart", "cardi", "coronar"))


def test_reports_of_one_finding_vary_in_wording():
    reports = {write_report(plan_with("pleural effusion", patient=i)).findings for i in range(12)}
    assert len(reports) == 12


def test_silent_impressions_leave_findings_to_the_findings_section():
    plan = plan_with("cardiomegaly")
    assert write_report(plan, TorsoSettings(silent_impression=1.0)).impression in (
        "Not given.", "", "No acute pathology was detected.", "Findings within normal limits.",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"findings": ("broken heart",)}, "broken heart"),
        ({"prevalence": 1.5}, "prevalence"),
        ({"max_studies": 0}, "max_studies"),
        ({"noise_hu": (50.0, 10.0)}, "noise_hu"),
    ],
)
def test_settings_that_cannot_be_drawn_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TorsoSettings(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"split": "test"}, {"layout": "dicom"}, {"orientations": ("LPX",)}, {"orientations": ()}]
)
def test_a_tree_that_cannot_be_written_is_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        write_ct_rate(tmp_path, 1, **arguments)


def read_rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return {row["VolumeName"]: row for row in csv.DictReader(file)}


def in_lps(nib, image):
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple("LPS"))
    )
    return np.asarray(image.as_reoriented(turn).dataobj).transpose(2, 1, 0)


def test_the_fixed_tree_gives_the_drawn_voxels_back_whatever_the_orientation(tmp_path):
    nib = pytest.importorskip("nibabel")
    paths = write_ct_rate(tmp_path, 3, seed=1, settings=SMALL)
    plans = plans_of_split(3, seed=1, settings=SMALL)
    codes = set()
    for path, plan in zip(paths, plans, strict=True):
        image = nib.load(path)
        codes.add("".join(nib.aff2axcodes(image.affine)))
        torso = draw_torso(plan, SMALL)
        assert np.array_equal(in_lps(nib, image), torso.image_hu)
        assert np.allclose(sorted(image.header.get_zooms()), sorted(torso.spacing_mm_dhw))
        labels = nib.load(tmp_path / "dataset/ts_seg/ts_total" / path.relative_to(tmp_path / "dataset"))
        assert np.allclose(labels.affine, image.affine)
        assert np.array_equal(in_lps(nib, labels), torso.labels)
    assert len(codes) > 1


def test_truth_volumes_hold_the_masks_of_the_findings(tmp_path):
    nib = pytest.importorskip("nibabel")
    settings = TorsoSettings(in_plane_size=48, slice_spacing_mm=(10.0, 10.0), prevalence=0.6, max_studies=1)
    path = write_ct_rate(tmp_path, 1, settings=settings)[0]
    truth = in_lps(nib, nib.load(tmp_path / "dataset/phantom_truth" / path.relative_to(tmp_path / "dataset")))
    names = json.loads((tmp_path / "dataset/phantom_truth/findings.json").read_text())
    torso = draw_torso(plans_of_split(1, settings=settings)[0], settings)
    for i, name in enumerate(names):
        assert np.array_equal((truth >> i & 1).astype(bool), torso.finding_masks.get(name, np.zeros(truth.shape, bool)))


def test_the_original_tree_needs_the_slope_and_intercept_of_the_metadata_table(tmp_path):
    nib = pytest.importorskip("nibabel")
    paths = write_ct_rate(tmp_path, 4, split="valid", layout="original", settings=SMALL)
    metadata = read_rows(tmp_path / "dataset/metadata/validation_metadata.csv")
    intercepts = set()
    for path, plan in zip(paths, plans_of_split(4, split="valid", settings=SMALL), strict=True):
        row, image = metadata[path.name], nib.load(path)
        stored = np.asarray(image.dataobj).transpose(2, 1, 0).astype(int)
        torso = draw_torso(plan, SMALL)
        assert np.array_equal(stored * int(row["RescaleSlope"]) + int(row["RescaleIntercept"]), torso.image_hu)
        assert np.allclose([*json.loads(row["XYSpacing"]), float(row["ZSpacing"])], torso.spacing_mm_dhw[::-1])
        assert np.array_equal(image.affine, np.eye(4))
        intercepts.add(row["RescaleIntercept"])
    assert intercepts == {"-1024", "-8192"}


def test_the_tables_agree_with_the_plans(tmp_path):
    pytest.importorskip("nibabel")
    paths = write_ct_rate(tmp_path, 3, seed=2, settings=SMALL)
    labels = read_rows(tmp_path / "dataset/multi_abnormality_labels/train_predicted_labels.csv")
    reports = read_rows(tmp_path / "dataset/radiology_text_reports/train_reports.csv")
    assert tuple(next(iter(labels.values())))[1:] == CT_RATE_LABELS
    for path, plan in zip(paths, plans_of_split(3, seed=2, settings=SMALL), strict=True):
        present = {name for name in CT_RATE_LABELS if labels[path.name][name] == "1"}
        assert present == {FINDINGS[name].ct_rate_name for name in plan.findings} - {None}
        assert reports[path.name]["Findings_EN"] == write_report(plan, SMALL).findings


def test_splits_share_no_patient():
    train, valid = (plans_of_split(5, split=split) for split in ("train", "valid"))
    assert not {plan.patient for plan in train} & {plan.patient for plan in valid}


def test_the_files_do_not_depend_on_the_number_of_processes(tmp_path):
    pytest.importorskip("nibabel")
    tiny = TorsoSettings(in_plane_size=24, slice_spacing_mm=(20.0, 20.0), max_studies=1)
    for workers in (1, 2):
        write_ct_rate(tmp_path / str(workers), 3, settings=tiny, num_workers=workers)
    one, two = (
        {path.relative_to(root): path for path in sorted(root.rglob("*")) if path.is_file()}
        for root in (tmp_path / "1", tmp_path / "2")
    )
    assert one.keys() == two.keys()
    for name in one:
        if name.suffix == ".csv":
            assert one[name].read_bytes() == two[name].read_bytes()
