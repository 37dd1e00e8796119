"""Maps as NIfTI: at the same place in the patient as the scan, on its grid, with nothing of its header's texts."""

import itertools

import nibabel
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from medclip_hf.data.ct.geometry import oriented_volume, resample
from medclip_hf.explain.nifti_export import Grid, grid_of, map_on_grid, patch_grid_affine, write_map_nifti

SHAPE_XYZ = (20, 26, 14)


def rotated_affine(axis_order=(0, 1, 2), signs=(1, 1, 1), spacing=(0.8, 1.1, 2.5), degrees=7.0):
    """Anisotropic, turned a little about z and x, with permuted and flipped axes."""
    angle = np.deg2rad(degrees)
    cosine, sine = np.cos(angle), np.sin(angle)
    turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.eye(3)[:, list(axis_order)] * np.array(signs) * np.array(spacing)
    affine[:3, 3] = (-31.0, 12.5, 140.0)
    return affine


def save_scan(path, affine, values=None):
    image = nibabel.Nifti1Image(np.zeros(SHAPE_XYZ, np.int16) if values is None else values, affine)
    image.header["descrip"] = b"DOE^JANE 1948"
    image.header["aux_file"] = b"doe_jane"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"DOE^JANE"))
    nibabel.save(image, path)
    return path


def blob(shape_xyz, affine, centre_mm, width_mm=4.0):
    index = np.stack(np.meshgrid(*[np.arange(size) for size in shape_xyz], indexing="ij"), axis=-1)
    places = index @ affine[:3, :3].T + affine[:3, 3]
    return np.exp(-(((places - centre_mm) / width_mm) ** 2).sum(axis=-1)).astype(np.float32)


@pytest.mark.parametrize(
    ("order", "signs"),
    [*itertools.product([(0, 1, 2)], itertools.product((1, -1), repeat=3)), ((2, 0, 1), (1, -1, 1))],
)
def test_a_map_of_the_reoriented_resampled_scan_returns_to_the_same_voxel(tmp_path, order, signs):
    affine = rotated_affine(order, signs)
    centre_mm = (affine @ [12, 9, 6, 1])[:3]
    source = blob(SHAPE_XYZ, affine, centre_mm)
    scan = save_scan(tmp_path / "scan.nii.gz", affine)
    seen = resample(oriented_volume(source, affine, "scan"), (1.2, 0.9, 0.9), "trilinear")  # LPS, as a model sees it
    path = write_map_nifti(tmp_path / "map.nii.gz", seen.values, seen.affine, like=scan)
    written = nibabel.load(path)
    assert written.shape == SHAPE_XYZ
    assert written.affine == pytest.approx(affine, abs=1e-5)
    returned = written.get_fdata()
    assert np.unravel_index(returned.argmax(), SHAPE_XYZ) == (12, 9, 6)
    assert np.abs(returned - source)[3:-3, 3:-3, 3:-3].max() < 0.15


def test_a_patch_lies_in_the_middle_of_its_voxels():
    affine = patch_grid_affine(np.diag([1.0, 1.0, 3.0, 1.0]), patch_size_dhw=(2, 4, 4), start_dhw=(1, 0, 10))
    # x: voxels 10 to 13, y: 0 to 3, z: slices 1 and 2 of 3 mm
    assert (affine @ [0, 0, 0, 1])[:3].tolist() == [11.5, 1.5, 4.5]
    assert (affine @ [1, 1, 1, 1])[:3].tolist() == [15.5, 5.5, 10.5]


def test_patches_cover_their_voxels_and_nothing_else():
    patches = np.arange(1, 9, dtype=np.float32).reshape(2, 2, 2)  # of 2 x 4 x 4 voxels, from (1, 1, 1) on
    affine = patch_grid_affine(np.eye(4), (2, 4, 4), (1, 1, 1))
    on_grid = map_on_grid(patches, affine, Grid((10, 10, 6), np.eye(4)), outside=-1.0, nearest=True).T
    expected = np.full((6, 10, 10), -1.0)
    expected[1:5, 1:9, 1:9] = patches.repeat(2, 0).repeat(4, 1).repeat(4, 2)
    assert np.array_equal(on_grid, expected)


@pytest.mark.parametrize(
    ("order", "signs"), [((0, 1, 2), (1, 1, 1)), ((1, 2, 0), (-1, 1, -1)), ((2, 1, 0), (1, -1, 1))]
)
@pytest.mark.parametrize("nearest", [False, True])
def test_axes_that_run_alike_are_filled_one_by_one_as_all_at_once(order, signs, nearest):
    values = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    grid = Grid((12, 10, 9), rotated_affine(order, signs, spacing=(1.0, 1.3, 1.7)))
    map_affine = rotated_affine(spacing=(4.0, 3.0, 2.5))
    map_affine[:3, 3] = (grid.affine @ [6.2, 5.1, 4.3, 1])[:3] - map_affine[:3, :3] @ [2.0, 1.5, 1.0]
    voxels = np.stack(np.meshgrid(*map(np.arange, grid.shape_xyz), [1], indexing="ij"))[..., 0].reshape(4, -1)
    places = (np.linalg.inv(map_affine) @ grid.affine @ voxels)[2::-1]
    is_inside = ((places >= -0.5) & (places <= np.array(values.shape)[:, None] - 0.5)).all(axis=0)
    expected = np.where(is_inside, map_coordinates(values, places, order=0 if nearest else 1, mode="nearest"), -1.0)
    found = map_on_grid(values, map_affine, grid, outside=-1.0, nearest=nearest)
    assert 0 < is_inside.sum() < is_inside.size
    assert found == pytest.approx(expected.reshape(grid.shape_xyz), abs=1e-6)


def test_no_text_of_the_scans_header_comes_along(tmp_path):
    scan = save_scan(tmp_path / "scan.nii", rotated_affine())
    path = write_map_nifti(tmp_path / "map.nii", np.ones((4, 4, 4)), rotated_affine(), like=scan)
    assert b"DOE" in scan.read_bytes()
    assert b"DOE" not in path.read_bytes()
    assert b"doe" not in path.read_bytes()


def test_the_quaternion_says_the_same_as_the_matrix_or_nothing(tmp_path):
    scan = save_scan(tmp_path / "scan.nii", rotated_affine())
    header = nibabel.load(write_map_nifti(tmp_path / "a.nii", np.ones((4, 4, 4)), rotated_affine(), like=scan)).header
    assert header.get_qform() == pytest.approx(rotated_affine(), abs=1e-4)
    sheared = rotated_affine()
    sheared[1, 2] += 0.4  # a tilted gantry
    header = nibabel.load(
        write_map_nifti(tmp_path / "b.nii", np.ones((4, 4, 4)), sheared, like=Grid(SHAPE_XYZ, sheared))
    ).header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 0)
    assert header.get_sform() == pytest.approx(sheared, abs=1e-5)


def test_a_failed_export_leaves_the_old_file(tmp_path):
    scan = save_scan(tmp_path / "scan.nii", np.eye(4))
    path = write_map_nifti(tmp_path / "map.nii", np.ones((4, 4, 4)), np.eye(4), like=scan)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="finite"):
        write_map_nifti(path, np.full((4, 4, 4), np.nan), np.eye(4), like=scan)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["map.nii", "scan.nii"]


def test_a_real_scan_gets_its_map(tmp_path, real_data):
    scan = real_data / "ct" / "example_ct.nii.gz"
    grid = grid_of(scan)
    path = write_map_nifti(tmp_path / "map.nii.gz", np.ones((2, 2, 2)), grid.affine, like=scan)
    written, source = nibabel.load(path), nibabel.load(scan)
    assert written.shape == source.shape
    assert written.affine == pytest.approx(source.affine, abs=1e-5)
    assert written.get_fdata().sum() == 8


@pytest.mark.parametrize(
    ("values", "affine", "message"),
    [
        (np.ones((4, 4)), np.eye(4), "depth, height, width"),
        (np.ones((4, 4, 4)), np.eye(3), r"\(4, 4\)"),
        (np.ones((4, 4, 4)), np.diag([1, 1, 0, 1]), "singular"),
        (np.ones((4, 4, 4)), [[1, 0, 0, 900], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "another scan"),
    ],
)
def test_a_map_that_cannot_be_placed_is_refused(values, affine, message):
    with pytest.raises(ValueError, match=message):
        map_on_grid(values, affine, Grid(SHAPE_XYZ, np.eye(4)))


def test_a_scan_that_gives_no_grid_is_refused(tmp_path):
    path = tmp_path / "scan.nii"
    path.write_bytes(b"no nifti")
    with pytest.raises(ValueError, match="cannot be read"):
        grid_of(path)
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2, 3), np.int16), np.eye(4)), path)
    with pytest.raises(ValueError, match="one volume"):
        grid_of(path)
    unplaced = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), None)
    nibabel.save(unplaced, path)
    with pytest.raises(ValueError, match="nothing of its orientation"):
        grid_of(path)


def test_a_path_that_is_the_scan_or_no_nifti_is_refused(tmp_path):
    scan = save_scan(tmp_path / "scan.nii", np.eye(4))
    with pytest.raises(ValueError, match="the scan itself"):
        write_map_nifti(scan, np.ones((4, 4, 4)), np.eye(4), like=scan)
    with pytest.raises(ValueError, match="must end in"):
        write_map_nifti(tmp_path / "map.png", np.ones((4, 4, 4)), np.eye(4), like=scan)
