"""Reading CT volumes and labels: NIfTI and npz, rescale, and every file that must not pass."""

import gzip

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel")

from medclip_hf.data.ct.geometry import GeometryContract, UnusableScan  # noqa: E402
from medclip_hf.data.ct.reading import Rescale, load_ct, read_nifti, read_rad_chestct, read_volume  # noqa: E402

AFFINE = np.diag([-2.0, -2.0, 5.0, 1.0])  # LPS, 2 x 2 x 5 mm
OWN_GRID = GeometryContract(spacing_mm_dhw=(5.0, 2.0, 2.0))  # nothing to resample


def torso(shape=(16, 40, 40), seed=0):
    """HU of a body with two lungs in air, and its TotalSegmentator v2 labels."""
    d, h, w = (
        np.linspace(-1, 1, n).reshape([-1 if i == axis else 1 for i in range(3)]) for axis, n in enumerate(shape)
    )
    body = (h / 0.8) ** 2 + (w / 0.9) ** 2 + 0 * d < 1
    lung = (h / 0.5) ** 2 + ((np.abs(w) - 0.45) / 0.3) ** 2 + d**2 < 1
    heart = (h + 0.1) ** 2 + w**2 + d**2 < 0.03
    hu = np.where(lung, -850.0, np.where(body, 40.0, -1000.0)) + np.random.default_rng(seed).normal(0, 15, shape)
    return np.rint(hu).astype(np.int16), np.where(lung, np.where(w < 0, 12, 10), np.where(heart, 51, 0)).astype(
        np.uint8
    )


def save(path, values_dhw, affine=AFFINE, **header):
    image = nibabel.Nifti1Image(values_dhw.transpose(2, 1, 0), affine)
    for key, value in header.items():
        image.header[key] = value
    nibabel.save(image, path)
    return path


@pytest.fixture
def scan(tmp_path):
    hu, labels = torso()
    return save(tmp_path / "scan.nii.gz", hu), save(tmp_path / "labels.nii.gz", labels)


def test_a_scan_and_its_labels_come_out_under_the_contract(scan):
    image, labels = scan
    loaded = load_ct(image, labels_path=labels)
    assert loaded.image.values.shape == loaded.anatomy_mask.values.shape == (26, 80, 80)
    assert (loaded.image.values.dtype, loaded.anatomy_mask.values.dtype) == (np.int16, np.uint8)
    assert loaded.image.orientation == loaded.anatomy_mask.orientation == "LPS"
    mask = loaded.anatomy_mask.values
    assert np.median(loaded.image.values[mask == 1]) == pytest.approx(-850, abs=15)
    assert np.median(loaded.image.values[mask == 2]) == pytest.approx(40, abs=15)


def test_integers_are_kept_where_nothing_is_resampled(scan):
    hu, labels = torso()
    loaded = load_ct(scan[0], OWN_GRID, labels_path=scan[1], anatomies=("heart", "lung"))
    np.testing.assert_array_equal(loaded.image.values, hu)
    np.testing.assert_array_equal(loaded.anatomy_mask.values, np.select([labels == 51, labels > 0], [1, 2]))


def test_labels_may_lie_in_another_orientation_on_the_same_grid(scan, tmp_path):
    _, labels = torso()
    flipped = AFFINE @ np.array([[-1, 0, 0, 39], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    other = save(tmp_path / "flipped.nii.gz", labels[:, :, ::-1], flipped)
    one, two = (load_ct(scan[0], labels_path=path).anatomy_mask.values for path in (scan[1], other))
    np.testing.assert_array_equal(one, two)


def test_rescale_is_applied_once_and_only_where_it_is_given(tmp_path):
    hu, _ = torso()
    raw = save(tmp_path / "raw.nii.gz", hu.astype(np.int32) + 8192)
    loaded = load_ct(raw, OWN_GRID, rescale=Rescale(1.0, -8192.0))
    np.testing.assert_array_equal(loaded.image.values, hu)
    with pytest.raises(UnusableScan, match="still to be applied") as error:
        load_ct(raw)
    assert error.value.reason == "not Hounsfield units"
    with pytest.raises(UnusableScan, match="do not apply them again") as error:
        load_ct(save(tmp_path / "fixed.nii.gz", hu), rescale=Rescale(1.0, -8192.0))
    assert error.value.reason == "rescaled twice"


def test_the_scaling_of_the_nifti_header_itself_is_applied(tmp_path):
    hu, _ = torso()
    image = nibabel.Nifti1Image((2 * (hu.transpose(2, 1, 0) + 1000)).astype(np.int16), AFFINE)
    image.header.set_slope_inter(0.5, -1000)
    nibabel.save(image, tmp_path / "scaled.nii.gz")
    np.testing.assert_allclose(read_nifti(tmp_path / "scaled.nii.gz").values, hu)


def test_an_affine_overrides_a_header_that_is_wrong(tmp_path):
    hu, _ = torso()
    path = save(tmp_path / "scan.nii.gz", hu, np.eye(4))
    assert read_nifti(path, affine=AFFINE).spacing_mm_dhw == (5.0, 2.0, 2.0)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95])
def test_a_truncated_nifti_is_refused_by_name(tmp_path, name, share):
    hu, _ = torso()
    content = save(tmp_path / name, hu).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UnusableScan, match=name.replace(".", r"\.")) as error:
        load_ct(tmp_path / name)
    assert error.value.reason == "unreadable NIfTI"


def test_damage_inside_of_the_compressed_file_is_refused(tmp_path):
    hu, _ = torso()
    content = bytearray(save(tmp_path / "scan.nii.gz", hu).read_bytes())
    content[len(content) // 2] ^= 0xFF
    content[len(content) // 2 + 1] ^= 0xFF
    (tmp_path / "scan.nii.gz").write_bytes(content)
    with pytest.raises(UnusableScan, match=r"scan\.nii\.gz"):
        load_ct(tmp_path / "scan.nii.gz")


def test_a_file_that_only_bears_the_name_is_refused(tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(b"no header " * 100))
    with pytest.raises(UnusableScan, match="unreadable NIfTI"):
        load_ct(tmp_path / "scan.nii.gz")


def test_an_unknown_orientation_is_refused(tmp_path):
    hu, _ = torso()
    image = nibabel.Nifti1Image(hu.transpose(2, 1, 0), None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    nibabel.save(image, tmp_path / "scan.nii.gz")
    with pytest.raises(UnusableScan, match="Convert the scan again") as error:
        load_ct(tmp_path / "scan.nii.gz")
    assert error.value.reason == "orientation unknown"


def test_a_header_that_contradicts_itself_is_refused(tmp_path):
    image = nibabel.Nifti1Image(torso()[0].transpose(2, 1, 0), AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(np.diag([2.0, -2.0, 5.0, 1.0]), 1)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    with pytest.raises(UnusableScan, match="LPS by its sform, RPS by its qform") as error:
        load_ct(tmp_path / "scan.nii.gz")
    assert error.value.reason == "orientation unknown"


def test_a_voxel_size_that_the_header_contradicts_is_refused(tmp_path):
    image = nibabel.Nifti1Image(torso()[0].transpose(2, 1, 0), AFFINE)
    image.header["pixdim"][1:4] = 1, 1, 3
    nibabel.save(image, tmp_path / "scan.nii.gz")
    with pytest.raises(UnusableScan, match=r"\[2\.0, 2\.0, 5\.0\] mm by its sform, \[1\.0, 1\.0, 3\.0\] by its pixdim"):
        load_ct(tmp_path / "scan.nii.gz")


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("size", [(30_000, 30_000, 30_000), (-40, 40, 16)])
def test_a_header_that_claims_more_than_the_file_holds_costs_no_memory(tmp_path, name, size):
    content = bytearray(save(tmp_path / "whole.nii", torso()[0]).read_bytes())
    content[42:48] = np.array(size, "<i2").tobytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(UnusableScan, match="cannot hold") as error:
        load_ct(tmp_path / name)
    assert error.value.reason == "unreadable NIfTI"


def test_a_slope_of_zero_in_the_header_means_none(tmp_path):
    hu, _ = torso()
    content = bytearray(save(tmp_path / "scan.nii", hu).read_bytes())
    content[112:116] = np.float32(0).tobytes()
    (tmp_path / "scan.nii").write_bytes(content)
    np.testing.assert_array_equal(read_nifti(tmp_path / "scan.nii").values, hu)


def repeat_slice(hu):
    return hu[[0, 1, 2, 2, *range(3, len(hu))]]


def nan_voxel(hu):
    hu = hu.astype(np.float32)
    hu[3, 4, 5] = np.nan
    return hu


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda hu: np.stack([hu, hu], axis=3).transpose(3, 0, 1, 2), "not a 3-D volume"),
        (lambda hu: hu[:1], "not a 3-D volume"),
        (nan_voxel, "not a number"),
        (repeat_slice, "repeated slices"),
        (lambda hu: np.abs(hu) + 20, "not Hounsfield units"),
        (lambda hu: np.zeros_like(hu), "constant volume"),
        (lambda hu: (hu + 0j).astype(np.complex64), "wrong dtype"),
    ],
    ids=["4-D", "one slice", "NaN", "repeated slice", "MR", "constant", "complex"],
)
def test_volumes_that_are_no_ct_are_refused(tmp_path, change, reason):
    values = change(torso()[0])
    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values.transpose(*reversed(range(values.ndim))), AFFINE), path)
    with pytest.raises(UnusableScan, match=r"scan\.nii\.gz") as error:
        load_ct(path)
    assert error.value.reason == reason


def test_a_colour_nifti_is_refused(tmp_path):
    colours = np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colours, AFFINE), tmp_path / "scan.nii.gz")
    with pytest.raises(UnusableScan, match="wrong dtype"):
        load_ct(tmp_path / "scan.nii.gz")


def test_a_trailing_axis_of_one_is_no_fourth_dimension(tmp_path):
    hu, _ = torso()
    nibabel.save(nibabel.Nifti1Image(hu.transpose(2, 1, 0)[..., None], AFFINE), tmp_path / "scan.nii.gz")
    assert read_volume(tmp_path / "scan.nii.gz").values.shape == hu.shape


def test_lengths_in_micrometres_are_refused(tmp_path):
    image = nibabel.Nifti1Image(torso()[0].transpose(2, 1, 0), AFFINE)
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "scan.nii.gz")
    with pytest.raises(UnusableScan, match="micron"):
        load_ct(tmp_path / "scan.nii.gz")


def test_labels_of_another_grid_version_or_image_are_refused(scan, tmp_path):
    _, labels = torso()
    v1_lobe = np.zeros_like(labels)
    v1_lobe[4:12, 12:28, 17:23] = 13  # a lung lobe of v1, drawn where the heart is
    cases = {
        "mask on another grid": (labels[:-1], "v2"),
        "mask with unknown ids": (labels.astype(np.int16) * 20, "v2"),
        "no anatomy in the mask": (np.ones_like(labels), "v2"),
        "mask does not fit the image": (v1_lobe, "v1"),
    }
    for reason, (values, version) in cases.items():
        path = save(tmp_path / "other.nii.gz", values)
        with pytest.raises(UnusableScan, match=r"other\.nii\.gz") as error:
            load_ct(scan[0], labels_path=path, label_version=version)
        assert error.value.reason == reason


def test_missing_and_unknown_files_are_told_apart(tmp_path):
    with pytest.raises(UnusableScan, match="file missing"):
        load_ct(tmp_path / "nothing.nii.gz")
    (tmp_path / "scan.mha").write_bytes(b"x" * 200)
    with pytest.raises(UnusableScan, match="unknown file format"):
        load_ct(tmp_path / "scan.mha")


def test_rescale_is_refused_where_the_format_has_its_own(tmp_path):
    (tmp_path / "scan.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="rescale and affine are for NIfTI"):
        load_ct(tmp_path / "scan.npz", rescale=Rescale(1, -1024))
    with pytest.raises(ValueError, match="positive slope"):
        Rescale(0.0, -1024)


def test_rad_chestct_volumes_run_from_head_to_feet(tmp_path):
    hu, _ = torso()
    np.savez_compressed(tmp_path / "trn00001.npz", ct=np.clip(hu[::-1], -1000, 1000))
    volume = read_rad_chestct(tmp_path / "trn00001.npz")
    np.testing.assert_array_equal(volume.values, np.clip(hu, -1000, 1000))
    assert volume.spacing_mm_dhw == (0.8, 0.8, 0.8)
    assert load_ct(tmp_path / "trn00001.npz").image.values.shape == (4, 32, 32)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text"])
def test_an_npz_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "trn00001.npz").write_bytes(content)
    with pytest.raises(UnusableScan, match="unreadable npz"):
        load_ct(tmp_path / "trn00001.npz")


def test_an_npz_with_pickled_objects_or_without_ct_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", ct=np.array([{"x": 1}], dtype=object))
    np.savez(tmp_path / "b.npz", volume=np.zeros((2, 2, 2)))
    np.savez(tmp_path / "c.npz", ct=np.zeros((2, 2)))
    for name, reason in (("a", "unreadable npz"), ("b", "unreadable npz"), ("c", "not a 3-D volume")):
        with pytest.raises(UnusableScan, match=reason):
            load_ct(tmp_path / f"{name}.npz")


def test_the_real_torso_lies_on_its_back_with_the_liver_to_the_right(real_data):
    folder = real_data / "ct"
    loaded = load_ct(
        folder / "example_ct.nii.gz",
        GeometryContract(spacing_mm_dhw=(3.0, 3.0, 3.0)),
        labels_path=folder / "example_seg_fast_force_split.nii.gz",
        anatomies=("lung", "aorta", "liver", "spleen", "thoracic vertebrae", "sacrum"),
    )
    image, mask = loaded.image.values, loaded.anatomy_mask.values
    assert image.shape == (112, 101, 122)
    lung, aorta, liver, spleen, thoracic, sacrum = (np.argwhere(mask == i).mean(axis=0) for i in range(1, 7))
    assert liver[2] < spleen[2]  # index grows to the patient's left
    assert aorta[1] < thoracic[1]  # to the back
    assert sacrum[0] < thoracic[0] < lung[0] + 10  # to the head
    assert np.median(image[mask == 1]) < -700
    assert 20 < np.median(image[mask == 3]) < 150


def test_the_real_dicom_series_fits_its_labels_of_another_orientation(real_data):
    folder = real_data / "ct"
    loaded = load_ct(
        folder / "example_ct_dicom",
        GeometryContract(spacing_mm_dhw=(2.0, 2.0, 2.0)),
        labels_path=folder / "example_seg_dicom.nii.gz",
        anatomies=("aorta", "liver", "thoracic vertebrae"),
    )
    image, mask = loaded.image.values, loaded.anatomy_mask.values
    aorta, liver, spine = (np.argwhere(mask == i).mean(axis=0) for i in (1, 2, 3))
    assert liver[2] < aorta[2]
    assert aorta[1] < spine[1]
    assert np.median(image[mask == 3]) > np.median(image[mask == 2]) > 0
