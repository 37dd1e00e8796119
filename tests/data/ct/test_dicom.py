"""DICOM series: sorted by place, refused where they are no volume."""

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import (  # noqa: E402
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from medclip_hf.data.ct.dicom import is_dicom, read_series  # noqa: E402
from medclip_hf.data.ct.geometry import UnusableScan  # noqa: E402

SERIES = "1.2.3.4"


def dataset(rows=6, columns=8):
    """An element-complete CT slice without pixels."""
    slice_ = Dataset()
    slice_.file_meta = FileMetaDataset()
    slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    slice_.SOPClassUID = slice_.file_meta.MediaStorageSOPClassUID = CTImageStorage
    slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    slice_.SeriesInstanceUID, slice_.Modality, slice_.ImageType = SERIES, "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    slice_.PatientName, slice_.PatientID = "Secret^Name", "MRN-1"
    slice_.Rows, slice_.Columns, slice_.SamplesPerPixel = rows, columns, 1
    slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 12, 11, 0
    slice_.PhotometricInterpretation = "MONOCHROME2"
    slice_.PixelSpacing, slice_.ImageOrientationPatient = [0.5, 0.75], [1, 0, 0, 0, 1, 0]
    slice_.RescaleSlope, slice_.RescaleIntercept, slice_.RescaleType = 1, -1024, "HU"
    return slice_


def stored(z, rows=6, columns=8):
    return (np.arange(rows * columns).reshape(rows, columns) + 100 * z).astype(np.uint16)


def series(folder, count=4, change=None, order=None):
    """Slices 2.5 mm apart from the feet up; `change(slice, z)` alters each before it is written."""
    folder.mkdir(exist_ok=True)
    for number, z in enumerate(order or range(count)):
        slice_ = dataset()
        slice_.InstanceNumber = number
        slice_.ImagePositionPatient = [-100.0, -80.0, 10 + 2.5 * z]
        slice_.PixelData = stored(z).tobytes()
        if change:
            change(slice_, z)
        pydicom.dcmwrite(folder / f"{number:03d}", slice_, enforce_file_format=True)
    return folder


def test_slices_are_sorted_by_place_and_rescaled(tmp_path):
    volume = read_series(series(tmp_path / "s", order=[2, 0, 3, 1]))
    np.testing.assert_array_equal(volume.values, np.stack([stored(z).astype(int) - 1024 for z in range(4)]))
    assert volume.orientation == "LPS"
    assert volume.spacing_mm_dhw == (2.5, 0.5, 0.75)
    np.testing.assert_allclose(volume.affine @ [0, 0, 0, 1], [100, 80, 10, 1])


def test_slices_from_head_to_feet_give_the_same_volume(tmp_path):
    def from_behind(slice_, z):
        slice_.ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]  # the normal points to the feet
        slice_.ImagePositionPatient = [-100 + 7 * 0.75, -80.0, 10 + 2.5 * z]
        slice_.PixelData = stored(z)[:, ::-1].tobytes()

    one, other = read_series(series(tmp_path / "a")), read_series(series(tmp_path / "b", change=from_behind))
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_allclose(one.affine, other.affine)


def test_each_slice_has_its_own_slope_and_intercept(tmp_path):
    def scale(slice_, z):
        slice_.RescaleSlope, slice_.RescaleIntercept = 0.5 * (z + 1), -1000 + z

    volume = read_series(series(tmp_path / "s", change=scale))
    np.testing.assert_allclose(volume.values[3], stored(3) * 2.0 - 997)


def test_a_multi_frame_file_is_the_series_it_replaces(tmp_path):
    enhanced = dataset()
    enhanced.SOPClassUID = enhanced.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    del enhanced.RescaleSlope, enhanced.RescaleIntercept, enhanced.PixelSpacing, enhanced.ImageOrientationPatient
    shared, measures, orientation, rescale = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, orientation.ImageOrientationPatient = [0.5, 0.75], [1, 0, 0, 0, 1, 0]
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 1, -1024, "HU"
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([measures]), Sequence([orientation])
    shared.PixelValueTransformationSequence = Sequence([rescale])
    enhanced.SharedFunctionalGroupsSequence = Sequence([shared])
    frames, order = [], [3, 1, 0, 2]
    for z in order:
        frame, position = Dataset(), Dataset()
        position.ImagePositionPatient = [-100.0, -80.0, 10 + 2.5 * z]
        frame.PlanePositionSequence = Sequence([position])
        frames.append(frame)
    enhanced.PerFrameFunctionalGroupsSequence, enhanced.NumberOfFrames = Sequence(frames), 4
    enhanced.PixelData = np.stack([stored(z) for z in order]).tobytes()
    other = read_series(series(tmp_path / "s"))
    for name in ("enhanced.dcm", "compressed.dcm"):
        pydicom.dcmwrite(tmp_path / name, enhanced, enforce_file_format=True)
        one = read_series(tmp_path / name)
        np.testing.assert_array_equal(one.values, other.values)
        np.testing.assert_allclose(one.affine, other.affine)
        if name == "enhanced.dcm":
            enhanced.compress(RLELossless)


def test_localizers_sheets_other_modalities_and_other_files_are_left_out(tmp_path):
    folder = series(tmp_path / "s")
    for name, change in {
        "localizer": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "ImagePositionPatient": [0, 0, 0]},
        "sheet": {"SeriesInstanceUID": "9", "SOPClassUID": SecondaryCaptureImageStorage},
        "segmentation": {"Modality": "SEG"},
    }.items():
        other = dataset()
        other.PixelData = stored(0).tobytes()
        other.update(
            {
                pydicom.datadict.tag_for_keyword(key): pydicom.DataElement(
                    pydicom.datadict.tag_for_keyword(key), pydicom.datadict.dictionary_VR(key), value
                )
                for key, value in change.items()
            }
        )
        pydicom.dcmwrite(folder / name, other, enforce_file_format=True)
    (folder / "README.txt").write_text("no DICOM")
    assert read_series(folder).values.shape == (4, 6, 8)


def test_copies_of_a_slice_count_once_and_one_identifier_for_all_is_no_copy(tmp_path):
    same = generate_uid()

    def anonymise(slice_, z):
        slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = same

    folder = series(tmp_path / "s", change=anonymise)
    (folder / "copy").write_bytes((folder / "001").read_bytes())
    assert len(read_series(folder).values) == 4


def test_two_series_are_a_choice(tmp_path):
    def second(slice_, z):
        slice_.SeriesInstanceUID = "1.2.3.5" if z % 2 else SERIES
        slice_.ImagePositionPatient = [-100.0, -80.0, 10 + 2.5 * (z // 2)]

    folder = series(tmp_path / "s", count=6, change=second)
    with pytest.raises(UnusableScan, match=r"1\.2\.3\.4 \(3 slices\); 1\.2\.3\.5 \(3 slices\)") as error:
        read_series(folder)
    assert error.value.reason == "several series"
    np.testing.assert_array_equal(read_series(folder, ".5").values[0], stored(1).astype(int) - 1024)
    with pytest.raises(UnusableScan, match=r"no series ends in '\.6'"):
        read_series(folder, ".6")


@pytest.mark.parametrize("name", ["colour", "electron_density", "drop_rescale", "drop_spacing"])
def test_a_series_beside_it_that_is_no_volume_does_not_bar_the_one_chosen(tmp_path, name):
    def second(slice_, z):
        if z >= 4:
            slice_.SeriesInstanceUID = "1.2.3.5"
            globals()[name](slice_, z)

    folder = series(tmp_path / "s", count=8, change=second)
    assert read_series(folder, SERIES).values.shape == (4, 6, 8)
    with pytest.raises(UnusableScan, match=r"1\.2\.3\.4 \(4 slices\); 1\.2\.3\.5 \(4 slices\)"):
        read_series(folder)


def drop_third(slice_, z):
    slice_.ImagePositionPatient = [-100.0, -80.0, 2.5 * (z if z < 2 else z + 1)]


def repeat_third(slice_, z):
    slice_.ImagePositionPatient = [-100.0, -80.0, 2.5 * min(z, 2)]


def interleave(slice_, z):
    slice_.ImagePositionPatient = [-100.0, -80.0, 2.5 * z - (1.0 if z == 3 else 0)]


def tilt(slice_, z):
    slice_.ImagePositionPatient = [-100.0, -80.0 + 0.5 * z, 2.5 * z]


def drop_rescale(slice_, z):
    del slice_.RescaleIntercept


def electron_density(slice_, z):
    slice_.RescaleType = "ED"


def widen_one(slice_, z):
    slice_.PixelSpacing = [0.5, 0.8] if z == 2 else [0.5, 0.75]


def reformat(slice_, z):
    slice_.ImageOrientationPatient = [1, 0, 0, 0, 1, 0] if z else [1, 0, 0, 0, 0, -1]


def magnetic(slice_, z):
    slice_.Modality = "MR"


def drop_position(slice_, z):
    if z == 5:
        del slice_.ImagePositionPatient


def drop_spacing(slice_, z):
    del slice_.PixelSpacing


def shorten(slice_, z):
    slice_.PixelData = slice_.PixelData[:20]


def colour(slice_, z):
    slice_.SamplesPerPixel, slice_.PhotometricInterpretation, slice_.PlanarConfiguration = 3, "RGB", 0
    slice_.PixelData = slice_.PixelData * 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop_third, "missing slices"),
        (repeat_third, "repeated slices"),
        (interleave, "uneven slices"),
        (tilt, "gantry tilt"),
        (drop_rescale, "rescale missing"),
        (electron_density, "not Hounsfield units"),
        (widen_one, "mixed series"),
        (reformat, "mixed series"),
        (magnetic, "no CT series"),
        (drop_spacing, "geometry missing"),
        (drop_position, "geometry missing"),
        (shorten, "pixels unreadable"),
        (colour, "not a CT image"),
    ],
)
def test_a_series_that_is_no_volume_is_refused_with_its_folder_and_without_the_patient(tmp_path, change, reason):
    folder = series(tmp_path / "chest", count=6, change=change)
    with pytest.raises(UnusableScan, match="chest") as error:
        read_series(folder)
    assert error.value.reason == reason
    assert "Secret" not in str(error.value)
    assert "MRN" not in str(error.value)


def test_the_middle_gap_is_told(tmp_path):
    with pytest.raises(UnusableScan, match=r"2\.50 mm apart, but 5\.00 mm after the one at 2\.50 mm; about 1"):
        read_series(series(tmp_path / "s", count=6, change=drop_third))


def test_a_single_slice_an_empty_folder_and_another_file_are_refused(tmp_path):
    with pytest.raises(UnusableScan, match="too few slices"):
        read_series(series(tmp_path / "one", count=1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnusableScan, match="no DICOM image"):
        read_series(tmp_path / "empty")
    (tmp_path / "text.dcm").write_text("text")
    with pytest.raises(UnusableScan, match="not DICOM"):
        read_series(tmp_path / "text.dcm")
    assert not is_dicom(tmp_path / "text.dcm")
    assert not is_dicom(tmp_path / "empty")


def test_a_truncated_file_is_refused_by_name(tmp_path):
    folder = series(tmp_path / "s")
    content = (folder / "002").read_bytes()
    (folder / "002").write_bytes(content[:-60])
    with pytest.raises(UnusableScan, match="002") as error:
        read_series(folder)
    assert error.value.reason == "pixels unreadable"


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_a_file_whose_header_breaks_off_is_not_passed_over(tmp_path, share):
    folder = series(tmp_path / "s")
    content = (folder / "003").read_bytes()  # the last slice: no gap would tell
    header = len(content) - 6 * 8 * 2
    (folder / "003").write_bytes(content[: int(header * share)])
    with pytest.raises(UnusableScan, match="003"):
        read_series(folder)


def test_the_real_jpeg_2000_series_is_read_as_monai_reads_it(real_data):
    from monai.transforms import Compose, LoadImage, Orientation

    folder = real_data / "ct" / "example_ct_dicom"
    assert is_dicom(folder)
    ours = read_series(folder)
    assert ours.values.shape == (20, 512, 512)
    assert ours.spacing_mm_dhw == (2.0, 0.9765625, 0.9765625)
    load = Compose(
        [LoadImage(image_only=True, ensure_channel_first=True, reader="PydicomReader"), Orientation("LPS", labels=None)]
    )
    theirs = load(folder)
    np.testing.assert_array_equal(ours.values, theirs[0].numpy().transpose(2, 1, 0))
    np.testing.assert_allclose(ours.affine, theirs.affine.numpy(), atol=1e-4)
