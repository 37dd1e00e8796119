"""fVLM's processor: what it gives the model, what it refuses, and that it survives saving."""

import json

import numpy as np
import pytest
import torch
from transformers import BertTokenizer

from medclip_hf.processing.fvlm import FVLMImageProcessor, FVLMProcessor, index_texts, text_id

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cardiomegaly", "not", ".", "heart", "lung"]
WORDS += ["shows", "no", "significant", "abnormalities"]


def torso(shape=(20, 40, 48)):
    """A body of soft tissue with two lungs in air, Hounsfield units, int16."""
    volume = np.full(shape, -1000, np.int16)
    _, height, width = shape
    volume[:, height // 5 : -height // 5, width // 8 : -width // 8] = 40
    volume[:, height // 3 : height // 2, width // 4 : width // 3] = -850
    volume[:, height // 3 : height // 2, -width // 3 : -width // 4] = -850
    noise = np.random.default_rng(0).normal(0, 15, shape)
    return np.maximum(volume + noise, -1024).astype(np.int16)


def torso_mask(shape=(20, 40, 48)):
    mask = np.zeros(shape, np.uint8)
    mask[8:12, 15:20, 12:16] = 1
    mask[9:11, 21:24, 20:30] = 2
    return mask


@pytest.fixture
def image_processor():
    """A processor of small sizes."""
    return FVLMImageProcessor(size_dhw=(16, 24, 32), patch_size_dhw=(4, 8, 8), crop_margin_dhw=(2, 3, 4))


@pytest.fixture
def processor(image_processor):
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    return FVLMProcessor(image_processor, tokenizer)


def test_the_window_becomes_zero_to_one(image_processor):
    volume = torso()
    volume[0, 0, :3] = [-1150, 350, 2000]
    inputs = image_processor(volume, do_pad=True)
    values = inputs["pixel_values"][0, 0, : volume.shape[0], : volume.shape[1], : volume.shape[2]]
    assert values[0, 0, :3].tolist() == [0.0, 1.0, 1.0]
    expected = (volume[5, 20, 24] + 1150) / 1500
    assert values[5, 20, 24].item() == pytest.approx(expected, abs=1e-6)
    assert inputs["pixel_values"].dtype == torch.float32


def test_the_crop_is_the_box_of_the_anatomies_with_the_published_margins(image_processor):
    window = image_processor._anatomy_window(torso_mask())
    assert [(part.start, part.stop) for part in window] == [(6, 13), (12, 26), (8, 33)]


def test_the_crop_stays_inside_the_volume(image_processor):
    mask = np.zeros((5, 6, 7), np.uint8)
    mask[0, 0, 0] = mask[4, 5, 6] = 1
    assert [(part.start, part.stop) for part in image_processor._anatomy_window(mask)] == [(0, 5), (0, 6), (0, 7)]


def test_padding_is_symmetric_up_to_the_crop_size_and_then_at_the_end_to_whole_patches(image_processor):
    volume = np.linspace(0.1, 1, 11 * 30 * 32).reshape(11, 30, 32)
    inputs = image_processor([volume, volume[:, :20]], do_window=False)
    padded = inputs["pixel_values"][0, 0].numpy()
    assert padded.shape == (16, 32, 32)
    assert np.flatnonzero(padded.any(axis=(1, 2))).tolist() == list(range(2, 13))  # 5 missing: 2 before, 3 after
    assert np.flatnonzero(padded.any(axis=(0, 2))).tolist() == list(range(30))


def test_volume_and_mask_move_together(image_processor):
    volume, mask = torso(), torso_mask()
    volume[mask == 2] = 333
    inputs = image_processor(volume, mask)
    is_heart = inputs["anatomy_mask"][0] == 2
    assert is_heart.sum() == (mask == 2).sum()
    torch.testing.assert_close(inputs["pixel_values"][0, 0][is_heart], torch.full((60,), (333 + 1150) / 1500))
    assert inputs["anatomy_mask"].dtype == torch.uint8
    assert inputs["pixel_values"].shape == (1, 1, 16, 24, 32)


def test_volumes_of_a_batch_are_padded_to_the_largest(image_processor):
    inputs = image_processor([torso((20, 40, 48)), torso((30, 40, 40))])
    assert inputs["pixel_values"].shape == (2, 1, 32, 40, 48)


def test_tensors_lists_and_nested_lists_are_volumes_too(image_processor):
    expected = image_processor(torso())["pixel_values"]
    for images in (torch.from_numpy(torso()), [torso()], [[torso().astype(np.float32)]]):
        assert torch.equal(image_processor(images)["pixel_values"], expected)


def test_volumes_of_bfloat16_are_taken(image_processor):
    volume = torch.from_numpy(torso()).bfloat16()
    pixel_values = image_processor(volume)["pixel_values"]
    torch.testing.assert_close(pixel_values, image_processor(volume.float())["pixel_values"])


def test_scaled_volumes_are_taken_with_the_window_off(image_processor):
    scaled = np.random.default_rng(0).random((16, 24, 32))
    values = image_processor(scaled, do_window=False)["pixel_values"]
    torch.testing.assert_close(values[0, 0], torch.from_numpy(scaled).float())


def test_padding_outside_of_the_reconstruction_circle_is_no_rescale_fault(image_processor):
    for filler in (-2048, -3024, -8192):
        volume = torso()
        volume[:, :6] = filler
        assert image_processor(volume)["pixel_values"].min() == 0


def not_hounsfield():
    volume = torso().astype(np.float32)
    return {
        "rescaled twice by -1024": (volume - 1024, "below -1300 HU.*once more"),
        "rescaled twice by -8192": (volume - 8192, "below -1300 HU.*once more"),
        "not rescaled": (volume + 1024, "not Hounsfield units"),
        "MR": (np.abs(np.random.default_rng(0).normal(300, 200, (20, 40, 48))), "not Hounsfield units"),
        "scaled already": ((volume + 1150) / 1500, "do_window=False"),
        "constant": (np.full((8, 8, 8), -1000.0), "constant"),
        "air alone": (np.random.default_rng(0).normal(-1000, 10, (8, 8, 8)), "soft tissue"),
        "NaN": (np.where(volume > 60, np.nan, volume), "NaN"),
        "infinite": (np.where(volume > 60, np.inf, volume), "NaN or infinite"),
    }


@pytest.mark.parametrize("fault", list(not_hounsfield()))
def test_values_that_cannot_be_hounsfield_units_are_refused(image_processor, fault):
    volume, message = not_hounsfield()[fault]
    with pytest.raises(ValueError, match=message) as error:
        image_processor([torso(), volume])
    assert "images[1]" in str(error.value)


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        (np.zeros((2, 8, 8, 8)), None, "one phase of a 4-D scan"),
        (np.zeros((8, 8)), None, r"must be a volume \(depth, height, width\)"),
        (np.zeros((0, 8, 8)), None, "must be a volume"),
        (np.zeros((8, 8, 8), complex), None, "integers or floats, but complex128"),
        (np.zeros((8, 8, 8), bool), None, "integers or floats, but bool"),
        ("scan.nii.gz", None, "but str came"),
        ([], None, "empty list"),
        (torso(), [torso_mask(), torso_mask()], "1 volumes came with 2 masks"),
        (torso(), torso_mask((19, 40, 48)), "share one grid"),
        (torso(), torso_mask().astype(np.float32), "integer ids"),
        (torso(), torso_mask() + 3, "ids from 3 to 5, but 0 .background. to 4"),
        (torso(), -torso_mask().astype(np.int16), "ids from -2 to 0"),
        (torso(), np.zeros((20, 40, 48), np.uint8), "holds no anatomy"),
    ],
)
def test_arrays_of_the_wrong_kind_are_refused(image_processor, images, masks, message):
    with pytest.raises(ValueError, match=message):
        image_processor(images, masks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"orientation": "RAS"}, "in RAS orientation, but these weights expect LPS"),
        ({"spacing_mm_dhw": (1.0, 1.0, 3.0)}, "Resample the scan"),
        ({"spacing_mm_dhw": (3.5, 1.0, 1.0)}, "Resample the scan"),
        ({"spacing_mm_dhw": (float("nan"), 1.0, 1.0)}, "Resample the scan"),
        ({"do_window": False}, r"must lie in \[0, 1\]"),
        ({"do_pad": False}, "no multiple of the patch"),
    ],
)
def test_another_geometry_is_refused(image_processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        image_processor(torso((21, 40, 48)), **arguments)


def test_the_geometry_of_the_contract_is_taken(image_processor):
    # 62 mm in 20 slices: resampling to whole voxels leaves the spacing a trace above the target
    assert image_processor(torso(), orientation="LPS", spacing_mm_dhw=(3.1, 1.001, 1.0))["pixel_values"].ndim == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hu_min": 400}, "hu_min must"),
        ({"rescale_applied": False}, "rescale_applied must"),
        ({"size_dhw": (8, 8)}, "size_dhw holds a positive number"),
        ({"spacing_mm_dhw": (0, 1, 1)}, "spacing_mm_dhw holds a positive number"),
        ({"crop_margin_dhw": (-1, 20, 20)}, "crop_margin_dhw holds"),
        ({"anatomies": ["lung", "lung"]}, "anatomies must be distinct"),
    ],
)
def test_a_contract_that_cannot_be_kept_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FVLMImageProcessor(**arguments)


def test_a_misspelt_argument_does_not_pass_for_a_geometry_that_was_checked(processor):
    with pytest.raises(ValueError, match="knows orientatoin"):
        processor(torso(), orientatoin="RAS")
    with pytest.raises(ValueError, match="knows orientatoin"):
        processor(torso(), text="Cardiomegaly.", orientatoin="RAS")


# Texts -----------------------------------------------------------------------------------------------------------


def test_equal_texts_are_encoded_once_and_padded_to_the_longest(processor):
    normal = "heart shows no significant abnormalities."
    inputs = processor(
        text=[
            {"heart": normal},
            {"heart": normal, "lung": "not cardiomegaly."},
            {"lung": "  ", "heart": "cardiomegaly."},
        ]
    )
    assert inputs["text_index"].tolist() == [[-1, 0, -1, -1], [1, 0, -1, -1], [-1, 2, -1, -1]]
    assert inputs["input_ids"].shape == (3, 8)  # [CLS], five words and a full stop, [SEP]
    assert inputs["attention_mask"].sum(dim=1).tolist() == [8, 5, 4]
    assert inputs["text_ids"].tolist() == [text_id(normal), text_id("not cardiomegaly."), text_id("cardiomegaly.")]
    assert "token_type_ids" not in inputs


def test_the_identity_of_a_text_is_the_same_in_every_process():
    assert text_id("Cardiomegaly.") == -7640504502083174363
    assert text_id("Cardiomegaly.") != text_id("cardiomegaly.")


def test_the_mapping_of_a_single_volume_needs_no_list(processor):
    alone, listed = (processor(text=text) for text in ({"heart": "cardiomegaly."}, [{"heart": "cardiomegaly."}]))
    assert alone["text_index"].tolist() == [[-1, 0, -1, -1]]  # and the name of the anatomy is not taken for a prompt
    assert torch.equal(alone["input_ids"], listed["input_ids"])


def test_prompts_keep_their_rows(processor):
    inputs = processor(text=["not cardiomegaly.", "cardiomegaly.", "cardiomegaly."])
    assert inputs["input_ids"].shape[0] == 3
    assert "text_index" not in inputs


def test_volumes_and_texts_come_together(processor):
    inputs = processor(images=torso(), anatomy_mask=torso_mask(), text=[{"heart": "cardiomegaly."}], orientation="LPS")
    assert set(inputs) == {"pixel_values", "anatomy_mask", "input_ids", "attention_mask", "text_index", "text_ids"}


def test_long_texts_are_cut_at_the_published_length(processor):
    assert processor(text="heart " * 500)["input_ids"].shape == (1, 384)
    assert processor(text="heart " * 500, max_length=12)["input_ids"].shape == (1, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Neither images nor text"),
        ({"text": [{"liver": "Steatosis."}]}, r"names the anatomies \['liver'\]"),
        ({"text": [{"heart": "Cardiomegaly."}, "Cardiomegaly."]}, r"text\[1\] must be a mapping"),
        ({"text": [{"heart": ""}]}, "no text at all"),
        ({"text": []}, "no text at all"),
        ({"text": [["Cardiomegaly."]]}, "text should be a string"),
        ({"text": 3}, "text should be a string"),
        ({"text": [{"heart": None}]}, r"text\[0\] holds None for heart"),
        ({"text": "Cardiomegaly.", "anatomy_mask": torso_mask()}, "without images"),
        ({"text": [{"heart": "x"}] * 2, "images": torso()}, "1 volumes came with texts of 2"),
    ],
)
def test_texts_that_fit_nothing_are_refused(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_index_texts_follows_the_order_of_the_anatomies():
    assert index_texts([{"a": "x", "b": "y"}, {"b": "x"}], ["b", "a"]) == (["y", "x"], [[0, 1], [1, -1]])


def test_a_real_scan_is_taken_and_refused_with_every_rescale_fault(real_data):
    from medclip_hf.data.ct.reading import load_ct

    folder = real_data / "ct"
    scan = load_ct(folder / "example_ct.nii.gz", labels_path=folder / "example_seg_fast_force_split.nii.gz")
    assert scan.anatomy_mask is not None
    processor = FVLMImageProcessor()
    volume, mask, spacing = scan.image.values, scan.anatomy_mask.values, scan.image.spacing_mm_dhw
    inputs = processor(volume, mask, spacing_mm_dhw=spacing, orientation=scan.image.orientation)
    assert inputs["pixel_values"].shape == inputs["anatomy_mask"][:, None].shape
    stored = volume.astype(np.int32)
    for fault in (stored - 1024, stored - 8192, stored + 1024, 2 * stored, (volume + 1150) / 1500):
        with pytest.raises(ValueError, match=r"[Ss]lope and intercept"):
            processor(fault, mask)


def test_saved_and_loaded_it_gives_the_same(processor, tmp_path):
    arguments = {"images": torso(), "anatomy_mask": torso_mask(), "text": ["cardiomegaly."]}
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
    contract = {name: saved[name] for name in ("orientation", "spacing_mm_dhw", "hu_min", "hu_max", "rescale_applied")}
    assert contract == {
        "orientation": "LPS",
        "spacing_mm_dhw": [3.0, 1.0, 1.0],
        "hu_min": -1150.0,
        "hu_max": 350.0,
        "rescale_applied": True,
    }
    image_processor = FVLMImageProcessor.from_pretrained(tmp_path)
    loaded = FVLMProcessor(image_processor, BertTokenizer.from_pretrained(tmp_path))
    expected = processor(**arguments)
    for name, value in loaded(**arguments).items():
        assert torch.equal(value, expected[name])
