"""The geometry contract: what is reoriented and resampled how, and what is refused."""

import json

import numpy as np
import pytest

from medclip_hf.data.ct.geometry import (
    STORED_HU_RANGE,
    GeometryContract,
    UnusableScan,
    Volume,
    check_affine,
    check_hounsfield,
    check_same_grid,
    check_slices,
    oriented_volume,
    resample,
    resampled_size,
    stored_hounsfield,
)

RAS = np.diag([2.0, 2.0, 5.0, 1.0])


def torso(shape=(16, 40, 40), seed=0):
    """A body of soft tissue (40 HU) with two lungs (-850) in air (-1000), with noise."""
    d, h, w = (
        np.linspace(-1, 1, n).reshape([-1 if i == axis else 1 for i in range(3)]) for axis, n in enumerate(shape)
    )
    body = (h / 0.8) ** 2 + (w / 0.9) ** 2 + 0 * d < 1
    lungs = (h / 0.5) ** 2 + ((np.abs(w) - 0.45) / 0.3) ** 2 + d**2 < 1
    hu = np.where(lungs, -850.0, np.where(body, 40.0, -1000.0))
    return np.rint(hu + np.random.default_rng(seed).normal(0, 15, shape)).astype(np.int16)


def test_the_default_contract_is_that_of_the_released_weights():
    contract = GeometryContract()
    assert (contract.orientation, contract.spacing_mm_dhw) == ("LPS", (3.0, 1.0, 1.0))
    assert (contract.hu_min, contract.hu_max, contract.rescale_applied) == (-1150.0, 350.0, True)


def test_a_contract_survives_json():
    contract = GeometryContract("RAS", (5.0, 1.0, 1.0), -300.0, 400.0)
    assert GeometryContract.from_dict(json.loads(json.dumps(contract.to_dict()))) == contract


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"orientation": "LPX"}, "orientation"),
        ({"orientation": "LRS"}, "orientation"),
        ({"spacing_mm_dhw": (3.0, 0.0, 1.0)}, "spacing"),
        ({"hu_min": 400.0}, "hu_min"),
        ({"rescale_applied": False}, "rescale_applied"),
        ({"hu_mni": -1000.0}, "hu_mni"),
    ],
)
def test_a_contract_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        GeometryContract.from_dict(values)


@pytest.mark.parametrize("code", ["LPS", "RAS", "LAS", "SRP", "AIL", "RPI"])
def test_one_body_in_any_file_orientation_gives_one_array_and_the_same_place(code):
    from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

    values = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)  # (x, y, z) in RAS
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(tuple(code)))
    turned = oriented_volume(apply_orientation(values, turn), RAS @ inv_ornt_aff(turn, values.shape), "file")
    straight = oriented_volume(values, RAS, "file")
    assert turned.orientation == straight.orientation == "LPS"
    np.testing.assert_array_equal(turned.values, straight.values)
    np.testing.assert_allclose(turned.affine, straight.affine)
    assert straight.values[0, 0, 0] == values[-1, -1, 0]  # foremost, rightmost, lowest voxel


def test_spacing_is_told_along_depth_height_width():
    assert oriented_volume(np.zeros((4, 5, 6)), np.diag([0.7, 0.8, 5.0, 1.0]), "f").spacing_mm_dhw == (5.0, 0.8, 0.7)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6, 2), (4, 5, 1)])
def test_what_is_no_volume_is_refused(shape):
    with pytest.raises(UnusableScan, match=r"scan\.nii.*shape") as error:
        oriented_volume(np.zeros(shape), np.eye(4), "scan.nii")
    assert error.value.reason == "not a 3-D volume"


def tilted(degrees):
    affine = np.eye(4)
    affine[1, 2] = np.tan(np.radians(degrees))  # slices shift in y with z: a tilted gantry
    return affine


def turned(degrees):
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[cosine, -sine, 0, 0], [sine, cosine, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("affine", "reason"),
    [
        (np.diag([1.0, 0.0, 1.0, 1.0]), "geometry damaged"),
        (np.diag([1.0, np.nan, 1.0, 1.0]), "geometry damaged"),
        (np.diag([0.0007, 0.0007, 0.001, 1.0]), "spacing implausible"),
        (np.diag([700.0, 700.0, 1000.0, 1.0]), "spacing implausible"),
        (tilted(12), "gantry tilt"),
        (turned(30), "oblique volume"),
    ],
)
def test_an_affine_that_is_no_grid_of_a_ct_is_refused(affine, reason):
    with pytest.raises(UnusableScan, match="scan") as error:
        check_affine(affine, "scan.nii")
    assert error.value.reason == reason


@pytest.mark.parametrize("affine", [np.eye(4), turned(3), tilted(0.1)])
def test_small_deviations_of_an_affine_are_accepted(affine):
    check_affine(affine, "scan.nii")


def test_a_torso_in_hounsfield_units_is_accepted():
    check_hounsfield(torso(), "scan")


@pytest.mark.parametrize("padding", [-2000, -2048, -3024, -8192])
def test_a_constant_around_the_reconstruction_circle_is_no_fault(padding):
    hu = torso().astype(np.int32)
    hu[:, :6] = padding
    check_hounsfield(hu, "scan")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda hu: hu - 1024, "rescaled twice"),
        (lambda hu: hu - 8192, "rescaled twice"),
        (lambda hu: np.clip(hu, -1024, None) - 1024, "rescaled twice"),
        (lambda hu: hu * 2, "rescaled twice"),
        (lambda hu: hu + 1024, "not Hounsfield units"),  # stored values
        (lambda hu: hu + 8192, "not Hounsfield units"),
        (lambda hu: hu * 0.5, "not Hounsfield units"),
        (lambda hu: (np.clip(hu, -1150, 350) + 1150) / 1500, "not Hounsfield units"),  # a window
        (lambda hu: (hu - hu.mean()) / hu.std(), "not Hounsfield units"),
        (lambda hu: -hu, "not Hounsfield units"),
        (lambda hu: np.where(hu > -500, 300, 0) + np.abs(hu) % 50, "not Hounsfield units"),  # MR: no air
        (lambda hu: np.full_like(hu, -1000), "constant volume"),
        (lambda hu: hu.astype(complex), "wrong dtype"),
    ],
)
def test_values_that_cannot_be_hounsfield_units_are_refused(fault, reason):
    with pytest.raises(UnusableScan, match=r"scan\.nii") as error:
        check_hounsfield(fault(torso().astype(np.int32)), "scan.nii")
    assert error.value.reason == reason


def test_raw_values_are_refused_also_with_padding_below_them():
    raw = torso().astype(np.int32) + 1024
    raw[:, :6] = -2000
    with pytest.raises(UnusableScan, match="slope and intercept are still to be applied"):
        check_hounsfield(raw, "scan")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_voxel_that_is_no_number_is_refused(bad):
    hu = torso().astype(np.float32)
    hu[3, 4, 5] = bad
    with pytest.raises(UnusableScan, match="not a number"):
        check_hounsfield(hu, "scan")


def test_a_repeated_slice_is_refused():
    hu = torso()
    hu[7] = hu[6]
    with pytest.raises(UnusableScan, match="first number 7 from the feet") as error:
        check_slices(hu, "scan.nii")
    assert error.value.reason == "repeated slices"


def test_padding_and_drawn_slices_may_repeat():
    hu = torso()
    hu[:3] = -1024
    check_slices(hu, "scan")
    check_slices(np.repeat(np.where(torso()[:1] > -500, 40, -1000), 8, axis=0), "scan")


def test_sizes_after_resampling_are_cut_down_to_whole_voxels():
    assert resampled_size((300, 512, 512), (1.0, 0.6, 0.6), (3.0, 1.0, 1.0)) == (100, 307, 307)
    assert resampled_size((100, 100, 100), (0.6, 0.6, 0.6), (1.0, 1.0, 1.0)) == (60, 60, 60)  # 59.999... by floats


def test_resampling_is_the_published_call_and_keeps_the_outer_faces():
    import torch

    values = np.random.default_rng(0).normal(size=(6, 10, 15)).astype(np.float32)
    volume = Volume(values, np.diag([2.0, 1.0, 1.5, 1.0]), "scan")
    result = resample(volume, (3.0, 1.0, 1.0), "trilinear")
    published = torch.nn.functional.interpolate(torch.from_numpy(values)[None, None], (3, 10, 30), mode="trilinear")
    np.testing.assert_allclose(result.values, published[0, 0].numpy(), atol=1e-6)
    assert result.spacing_mm_dhw == (3.0, 1.0, 1.0)
    for corner in ((-0.5, -0.5, -0.5), (1.0, 1.0, 1.0)):
        is_far = corner[0] > 0
        old = [n - 0.5 if is_far else -0.5 for n in values.shape[::-1]]
        new = [n - 0.5 if is_far else -0.5 for n in result.values.shape[::-1]]
        np.testing.assert_allclose((volume.affine @ [*old, 1])[:3], (result.affine @ [*new, 1])[:3])


def test_labels_are_resampled_onto_the_image():
    ramp = np.broadcast_to(np.arange(12.0), (12, 12, 12))
    image = resample(Volume(ramp, np.eye(4), "i"), (3.0, 3.0, 3.0), "trilinear").values
    labels = resample(Volume((ramp > 5).astype(np.uint8), np.eye(4), "l"), (3.0, 3.0, 3.0), "nearest").values
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels[0, 0], [0, 0, 1, 1])
    np.testing.assert_array_equal(labels, image > 5.5)


def test_labels_on_another_grid_are_refused():
    image = Volume(np.zeros((4, 5, 6)), np.eye(4), "image.nii")
    shifted, flipped = np.eye(4), np.diag([-1.0, 1.0, 1.0, 1.0])
    shifted[0, 3] = 2.0
    check_same_grid(image, Volume(np.zeros((4, 5, 6)), np.eye(4) + 1e-4, "labels.nii"))
    for labels in (
        Volume(np.zeros((4, 5, 7)), np.eye(4), "labels.nii"),
        Volume(np.zeros((4, 5, 6)), shifted, "labels.nii"),
        Volume(np.zeros((4, 5, 6)), flipped, "labels.nii"),
    ):
        with pytest.raises(UnusableScan, match=r"labels\.nii.*image\.nii") as error:
            check_same_grid(image, labels)
        assert error.value.reason == "mask on another grid"


def test_stored_values_are_whole_and_within_twelve_bits_above_the_window():
    stored = stored_hounsfield(np.array([-8192.0, -1150.4, 40.6, 30000.0]))
    assert stored.dtype == np.int16
    assert stored.tolist() == [STORED_HU_RANGE[0], -1150, 41, STORED_HU_RANGE[1]]
