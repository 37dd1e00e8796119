"""Grey levels as a reader would see them, and nothing of a file but its pixels."""

import numpy as np
import pytest
from PIL import Image

from medclip_hf.data.hospital.grey_levels import UnusablePicture, windowed
from medclip_hf.data.hospital.headers import age_band_of, groups_of_header, identifying_values, sex_of
from medclip_hf.data.hospital.pictures import PictureSettings, encode_picture, facts_of_file, read_pictures

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage  # noqa: E402

RAMP = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)


def dicom(path, pixels=RAMP, photometric="MONOCHROME2", syntax=None, **elements):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    ds.Modality, ds.PhotometricInterpretation = "DX", photometric
    ds.Rows, ds.Columns = pixels.shape[-3:-1] if photometric == "RGB" else pixels.shape[-2:]
    ds.SamplesPerPixel = 3 if photometric == "RGB" else 1
    if photometric == "RGB":
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = 8 * pixels.dtype.itemsize
    ds.BitsStored = elements.pop("BitsStored", ds.BitsAllocated)
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(pixels.dtype.kind == "i")
    for name, value in elements.items():
        setattr(ds, name, value)
    ds.PixelData = pixels.tobytes()
    if syntax is not None:
        ds.compress(syntax)
    ds.save_as(path, enforce_file_format=True)
    return path


def levels(path, **settings):
    return np.asarray(read_pictures(path, PictureSettings(**settings))[0].image).astype(int)


def test_a_window_after_rescale_is_that_of_the_standard(tmp_path):
    path = dicom(tmp_path / "a", RescaleSlope=1, RescaleIntercept=-1000, WindowCenter=40, WindowWidth=400)
    expected = np.clip((RAMP - 1000.0 - 39.5) / 399 + 0.5, 0, 1) * 255
    np.testing.assert_array_equal(levels(path), np.rint(expected))


def test_our_window_equals_pydicoms(tmp_path):
    from pydicom.pixels import apply_windowing

    for function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        path = dicom(tmp_path / function, BitsStored=12, WindowCenter=1000, WindowWidth=900, VOILUTFunction=function)
        theirs = apply_windowing(RAMP, pydicom.dcmread(path)) / 4095
        np.testing.assert_allclose(windowed(RAMP, (1000, 900), function), theirs, atol=1e-9)


def test_monochrome1_is_the_negative_of_monochrome2(tmp_path):
    options = {"WindowCenter": 2048, "WindowWidth": 4096}
    one = levels(dicom(tmp_path / "1", photometric="MONOCHROME1", **options))
    two = levels(dicom(tmp_path / "2", **options))
    assert np.abs(one + two - 255).max() <= 1
    assert one[0, 0] == 255


def test_a_table_of_values_of_interest_is_applied(tmp_path):
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [4096, 0, 16])
    table.add_new("LUTData", "US", [65535 - 16 * value for value in range(4096)])
    path = dicom(tmp_path / "a", BitsStored=12, VOILUTSequence=[table])
    np.testing.assert_array_equal(levels(path), np.rint((65535 - 16.0 * RAMP) / 65535 * 255))


def test_padding_is_black_and_does_not_stretch_the_rest(tmp_path):
    pixels = RAMP.copy()
    pixels[0] = 65535
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        found = levels(dicom(tmp_path / photometric, pixels, photometric, PixelPaddingValue=65535))
        assert (found[0] == 0).all()
        assert found[1:].min() == 0
        assert found[1:].max() == 255


def test_what_lies_in_unused_high_bits_is_no_picture(tmp_path):
    pixels = RAMP.copy()
    pixels[2, 2] |= 0x8000  # an overlay of old scanners
    options = {"BitsStored": 12, "WindowCenter": 2048, "WindowWidth": 4096}
    clean = levels(dicom(tmp_path / "b", RAMP, **options))
    np.testing.assert_array_equal(levels(dicom(tmp_path / "a", pixels, **options)), clean)


def test_colours_and_compressed_frames_are_read(tmp_path):
    colours = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(levels(dicom(tmp_path / "c", colours, "RGB")), colours)
    options = {"BitsStored": 12, "WindowCenter": 2048, "WindowWidth": 4096}
    plain = levels(dicom(tmp_path / "p", **options))
    np.testing.assert_array_equal(levels(dicom(tmp_path / "r", syntax=RLELossless, **options)), plain)


def test_a_slice_of_a_real_scanner_in_jpeg_2000_is_read_through_its_own_window(real_data):
    path = sorted((real_data / "ct" / "example_ct_dicom").iterdir())[0]
    found = levels(path)
    assert found.shape == (512, 512)
    assert found[256, 256] > 60  # soft tissue
    assert found[2, 2] == 0  # air outside of the body


def test_frames_are_chosen_and_counted(tmp_path):
    frames = np.stack([np.full((8, 8), value, np.uint8) for value in (10, 20, 30)])
    path = dicom(tmp_path / "m", frames, NumberOfFrames=3, WindowCenter=128, WindowWidth=256)
    assert levels(path, frames="first")[0, 0] == 10
    assert levels(path, frames="middle")[0, 0] == 20
    assert [picture.frame for picture in read_pictures(path, PictureSettings(frames="all"))] == [0, 1, 2]


def test_pixels_become_square(tmp_path):
    path = dicom(tmp_path / "s", PixelSpacing=[2, 1], WindowCenter=2048, WindowWidth=4096)
    assert levels(path).shape == (16, 8)


def test_sixteen_bit_pictures_are_stretched_and_white_zero_is_turned(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    found = levels(tmp_path / "a.png")
    assert (found[0, 0], found[-1, -1]) == (0, 255)
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "w.tif", RAMP, photometric="miniswhite")
    np.testing.assert_array_equal(levels(tmp_path / "w.tif"), 255 - found)


def test_exif_rotation_is_applied_and_left_behind(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "Zebulonsky"
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.jpg", exif=exif)
    picture = read_pictures(tmp_path / "a.jpg", PictureSettings())[0]
    assert picture.image.size == (10, 20)
    assert b"Zebulonsky" not in encode_picture(picture.image, 0)


def test_a_nifti_of_one_slice_is_a_picture_and_of_several_a_volume(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    for count in (1, 4):
        nibabel.save(nibabel.Nifti1Image(np.ones((8, 8, count), np.int16), np.eye(4)), tmp_path / f"{count}.nii.gz")
    assert facts_of_file(tmp_path / "1.nii.gz").kind == "picture"
    assert facts_of_file(tmp_path / "4.nii.gz").kind == "volume"
    assert read_pictures(tmp_path / "1.nii.gz", PictureSettings())[0].image.size == (8, 8)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "image file empty"),
        (b"Zebulonsky", "image not recognised"),
        (b"\0" * 128 + b"DICM" + b"Zebulonsky" * 9, "DICOM without a picture"),
        (b"\x89PNG\r\n\x1a\nZebulonsky", "image damaged"),
    ],
)
def test_a_bad_file_has_a_reason_that_does_not_quote_it(tmp_path, content, reason):
    path = tmp_path / "Zebulonsky.png"
    path.write_bytes(content)
    with pytest.raises(UnusablePicture) as error:
        read_pictures(path, PictureSettings())
    assert "Zebulonsky" not in str(error.value)
    assert error.value.reason in (reason, "DICOM cannot be read")


def test_truncated_pixels_are_a_reason(tmp_path):
    path = dicom(tmp_path / "t")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UnusablePicture, match="pixels cannot be decoded"):
        read_pictures(path, PictureSettings())


def test_of_a_header_only_what_the_list_allows_comes_along():
    ds = Dataset()
    ds.PatientName, ds.PatientID, ds.InstitutionName = "Zebulonsky^Martha", "PX-1", "Wimbledorf"
    ds.PatientSex, ds.PatientAge, ds.Modality, ds.BodyPartExamined = "F", "093Y", "DX", "CHEST"
    ds.ManufacturerModelName, ds.ViewPosition = "SOMATOM Force", "ZEBULONSKY"
    groups = groups_of_header(ds)
    assert (groups.sex, groups.age_band, groups.scanner, groups.body_part) == ("F", "90+", "SOMATOM Force", "CHEST")
    assert groups.view == ""
    assert set(identifying_values(ds)) == {"Zebulonsky^Martha", "PX-1", "Wimbledorf"}


def test_ages_and_sexes_of_tables_are_understood():
    assert [age_band_of(text) for text in ("64", "064Y", "018M", "90", "", "old", "200")] == [
        *("60-69", "60-69", "0-9", "90+", "", "", ""),
    ]
    assert [sex_of(text) for text in ("f", "Male", "W", "x")] == ["F", "M", "F", ""]
