"""The array store of CT scans: what is written is read, in any box; completeness of anatomies in a crop."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pytest

zarr = pytest.importorskip("zarr")

from medclip_hf.data.ct.geometry import GeometryContract, UnusableScan  # noqa: E402
from medclip_hf.data.ct.volumes import (  # noqa: E402
    PADDING_HU,
    crop_start,
    is_complete,
    present_ids,
    read_crop,
    read_scan,
    write_scan,
)

ANATOMIES = ("lung", "heart")


def arrays(shape=(37, 20, 25), seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(-1000, 400, shape).astype(np.int16)
    mask = np.zeros(shape, dtype=np.uint8)
    mask[3:9, 4:10, 5:12] = 1  # slabs beyond the first hold background alone
    return image, mask


def store(path, image, mask):
    return write_scan(path, image, mask, spacing_mm_dhw=(3, 1, 1), affine=np.eye(4), anatomies=ANATOMIES)


@pytest.fixture
def scan(tmp_path):
    image, mask = arrays()
    store(tmp_path / "a.zarr", image, mask)
    return tmp_path / "a.zarr", image, mask


def test_the_whole_scan_is_read_back(scan):
    path, image, mask = scan
    for read, written in zip(read_crop(path), (image, mask), strict=True):
        assert read.dtype == written.dtype
        np.testing.assert_array_equal(read, written)


def test_what_is_known_of_the_scan_is_read_back(tmp_path):
    contract = GeometryContract("RAS", (5.0, 1.0, 1.0), -300.0, 400.0)
    affine = np.diag([-1.0, -1.0, 5.0, 1.0])
    written = write_scan(
        tmp_path / "a.zarr", *arrays(), spacing_mm_dhw=(5, 1, 1), affine=affine, anatomies=ANATOMIES, contract=contract
    )
    assert read_scan(tmp_path / "a.zarr") == written
    assert written.contract == contract
    np.testing.assert_array_equal(written.affine, affine)


def test_any_zarr_library_reads_the_same_arrays(scan):
    path, image, mask = scan
    group = zarr.open_group(path, mode="r")
    np.testing.assert_array_equal(group["image"][...], image)
    np.testing.assert_array_equal(group["anatomy_mask"][...], mask)
    assert group["image"].metadata.dimension_names == ("depth", "height", "width")


@pytest.mark.parametrize(
    ("start", "size"),
    [
        ((0, 0, 0), (1, 1, 1)),
        ((15, 3, 4), (3, 10, 20)),
        ((36, 19, 24), (1, 1, 1)),
        ((-4, -5, -6), (50, 40, 45)),
        ((30, 15, 20), (20, 20, 20)),
        ((-10, 2, 2), (5, 5, 5)),
        ((40, 0, 0), (2, 2, 2)),
    ],
)
def test_a_box_is_the_slice_and_what_lies_beyond_is_padding(scan, start, size):
    path, *arrays_ = scan
    for read, whole, fill in zip(read_crop(path, start, size), arrays_, (PADDING_HU, 0), strict=True):
        padded = np.pad(whole, 60, constant_values=fill)
        box = tuple(slice(first + 60, first + 60 + count) for first, count in zip(start, size, strict=True))
        np.testing.assert_array_equal(read, padded[box])


def test_random_boxes_agree_with_slices(scan):
    path, image, mask = scan
    rng = np.random.default_rng(1)
    for _ in range(30):
        start = [int(rng.integers(0, n)) for n in image.shape]
        size = [int(rng.integers(1, n - s + 1)) for n, s in zip(image.shape, start, strict=True)]
        box = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
        read_image, read_mask = read_crop(path, start, size)
        np.testing.assert_array_equal(read_image, image[box])
        np.testing.assert_array_equal(read_mask, mask[box])


@pytest.mark.parametrize(("start", "size"), [((0, 0), (1, 1, 1)), ((0, 0, 0), (0, 1, 1))])
def test_what_is_no_box_is_an_error(scan, start, size):
    with pytest.raises(ValueError, match=r"zip\(\)|box"):
        read_crop(scan[0], start, size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image, mask: (image.astype(np.float32), mask), "int16"),
        (lambda image, mask: (image, mask[:-1]), "uint8 mask"),
        (lambda image, mask: (image, mask.astype(bool)), "uint8 mask"),
        (lambda image, mask: (image, mask * 3), "id 3"),
        (lambda image, mask: (image, mask * 0), "nothing to store"),
    ],
)
def test_arrays_of_another_kind_are_an_error_and_leave_nothing(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        store(tmp_path / "a.zarr", *change(*arrays()))
    assert list(tmp_path.iterdir()) == []


def test_writing_again_replaces_and_the_bytes_depend_on_the_arrays_alone(tmp_path):
    store(tmp_path / "a.zarr", *arrays(seed=1))
    store(tmp_path / "a.zarr", *arrays(seed=2))
    store(tmp_path / "b.zarr", *arrays(seed=2))
    files = [
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (tmp_path / "a.zarr", tmp_path / "b.zarr")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "zarr.json").unlink(),
        lambda path: (path / "zarr.json").write_text("{"),
        lambda path: (path / "zarr.json").write_text("{}"),
        lambda path: (path / "image/c/0/0/0").unlink(),
        lambda path: (path / "image/c/0/0/0").write_bytes(b""),
        lambda path: (path / "image/c/0/0/0").write_bytes((path / "image/c/0/0/0").read_bytes()[:-1000]),
        lambda path: (path / "image/c/0/0/0").write_bytes(b"\0" * (path / "image/c/0/0/0").stat().st_size),
        lambda path: (path / "anatomy_mask/c/0/0/0").unlink(),
    ],
)
def test_a_damaged_store_is_refused_by_name(scan, damage):
    damage(scan[0])
    with pytest.raises(UnusableScan, match=r"a\.zarr") as error:
        read_crop(scan[0])
    assert error.value.reason == "store damaged"


def test_a_store_of_another_version_is_refused(scan):
    document = json.loads((scan[0] / "zarr.json").read_text())
    document["attributes"]["medclip_hf"]["format_version"] = 99
    (scan[0] / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(UnusableScan, match="version 99"):
        read_crop(scan[0])


def _kill_while_writing(path):
    import medclip_hf.data.ct.volumes as volumes

    write_array = volumes._write_group

    def write_and_die(folder, scan, arrays_):
        write_array(folder, scan, {"image": arrays_["image"]})
        os.kill(os.getpid(), signal.SIGKILL)

    volumes._write_group = write_and_die
    store(path, *arrays())


def test_a_process_killed_while_writing_leaves_no_scan(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_kill_while_writing, args=(tmp_path / "a.zarr",))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name[0] for path in tmp_path.iterdir()] == ["."]  # hidden, for the engine to sweep


def test_crops_start_at_random_where_there_is_room_and_centred_where_not():
    rng = np.random.default_rng(0)
    starts = {crop_start((12, 10, 8), (10, 10, 11), rng) for _ in range(200)}
    assert starts == {(d, 0, -1) for d in (0, 1, 2)}
    assert crop_start((12, 10, 8), (10, 10, 11)) == (1, 0, -1)


def test_an_anatomy_is_complete_where_it_occurs_and_touches_no_face():
    mask = np.zeros((6, 7, 8), dtype=np.uint8)
    mask[1:3, 1:3, 1:3] = 1
    mask[4, 4, 4] = 2
    mask[3, 3, 7] = 3  # on the last face
    mask[0, 5, 5] = 4
    assert is_complete(mask, 5).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("shape", [(3, 3, 3), (5, 6, 7), (8, 8, 8), (4, 9, 16)])
def test_completeness_agrees_with_its_definition_on_random_masks(shape):
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = (rng.integers(0, 30, shape) * (rng.random(shape) < 0.1)).astype(np.uint8)
        inner = mask[1:-1, 1:-1, 1:-1]
        faces = mask.copy()
        faces[1:-1, 1:-1, 1:-1] = 0
        expected = [(inner == i).any() and not (faces == i).any() for i in range(1, 30)]
        assert is_complete(mask, 29).tolist() == expected
        assert is_complete(mask[::-1, :, ::-1], 29).tolist() == expected  # a flipped view
        assert np.flatnonzero(present_ids(mask)).tolist() == np.unique(mask).tolist()


def test_a_mask_of_other_ids_or_kind_is_an_error():
    with pytest.raises(ValueError, match="id 5, but there are 4"):
        is_complete(np.full((3, 3, 3), 5, dtype=np.uint8), 4)
    with pytest.raises(ValueError, match="uint8"):
        is_complete(np.zeros((3, 3, 3), dtype=np.int64), 4)
    with pytest.raises(ValueError, match="uint8"):
        is_complete(np.zeros((1, 3, 3, 3), dtype=np.uint8), 4)
