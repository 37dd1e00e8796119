"""CT scans as training examples and batches: one reconstruction a study, crops that depend on the key alone."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

zarr = pytest.importorskip("zarr")

from medclip_hf.data.ct.geometry import GeometryContract  # noqa: E402
from medclip_hf.data.ct.scan_index import write_scan_rows  # noqa: E402
from medclip_hf.data.ct.volumes import write_scan  # noqa: E402
from medclip_hf.data.records import AnatomyText, ScanRow  # noqa: E402
from medclip_hf.data.stages import Drop  # noqa: E402
from medclip_hf.processing.fvlm import FVLMImageProcessor, FVLMProcessor, text_id  # noqa: E402
from medclip_hf.processing.pixels import scaled_pixels  # noqa: E402
from medclip_hf.training.collators import ScanCollator  # noqa: E402
from medclip_hf.training.scan_datasets import ScanDataset, report_caption  # noqa: E402
from medclip_hf.training.tokenizers import train_wordpiece_tokenizer  # noqa: E402

SIZE = (8, 8, 8)
ANATOMIES = ("lung", "heart")
SHAPE = (10, 12, 9)
CONTRACT = GeometryContract(spacing_mm_dhw=(6.0, 4.0, 4.0))
NORMAL_HEART = "heart shows no significant abnormalities."


def text(anatomy, impression="", findings=""):
    return AnatomyText(anatomy, findings, impression, bool(impression))


NODULE = (text("lung", "Nodule."), text("heart"))


def a_row(scan_id, texts=NODULE):
    return ScanRow(
        scan_id=scan_id,
        study_id=scan_id[:-2],
        patient_id=scan_id[:-4],
        store_path=f"volumes/train/{scan_id}.zarr",
        shape_dhw=SHAPE,
        spacing_mm_dhw=CONTRACT.spacing_mm_dhw,
        anatomies_present=ANATOMIES,
        anatomy_texts=texts,
        labels=(("Lung nodule", True),),
    )


def arrays(number):
    """Every voxel tells its place and its scan; the lung is inside of every crop, the heart reaches the upper edge."""
    image = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE) - 1000 + number
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[4:6, 5:7, 4:5] = 1
    mask[5:, 6, 5] = 2
    return image, mask


@pytest.fixture
def folder(tmp_path):
    """Two studies: the first of two reconstructions, the second of one."""
    write(tmp_path, [a_row("p1_a_1"), a_row("p1_a_2"), a_row("p2_a_1")])
    return tmp_path


def write(folder, rows, anatomies=ANATOMIES):
    for number, row in enumerate(rows):
        write_scan(
            folder / row.store_path,
            *arrays(number),
            spacing_mm_dhw=CONTRACT.spacing_mm_dhw,
            affine=np.eye(4),
            anatomies=anatomies,
            contract=CONTRACT,
        )
    write_scan_rows(rows, folder, "train")


def opened(folder, **options):
    return ScanDataset(folder, "train", **({"anatomies": ANATOMIES, "size_dhw": SIZE} | options))


def as_tuple(example):
    return example.row_id, example.image.tobytes(), example.anatomy_mask.tobytes()


# Data set -------------------------------------------------------------------------------------------------------------


def test_the_index_counts_studies_and_an_epoch_takes_one_reconstruction_of_each(folder):
    dataset = opened(folder)
    assert len(dataset) == 2
    assert {dataset[(epoch, 0)].row_id for epoch in range(20)} == {"p1_a_1", "p1_a_2"}
    assert {dataset[(epoch, 1)].row_id for epoch in range(20)} == {"p2_a_1"}


def test_an_example_depends_on_seed_epoch_and_index_alone(folder):
    dataset = opened(folder, seed=3)
    first = as_tuple(dataset[(4, 0)])
    assert as_tuple(dataset[(5, 0)]) != first
    assert as_tuple(dataset[(4, 0)]) == first
    assert as_tuple(pickle.loads(pickle.dumps(dataset))[(4, 0)]) == first
    assert as_tuple(dataset[0]) == as_tuple(dataset[(0, 0)])
    assert any(as_tuple(opened(folder, seed=4)[(epoch, 0)]) != as_tuple(dataset[(epoch, 0)]) for epoch in range(3))


def test_workers_give_what_one_process_gives(folder):
    dataset = opened(folder)
    keys = [(epoch, index) for epoch in range(3) for index in range(2)]
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, sampler=keys, num_workers=2, collate_fn=list)
    assert [as_tuple(e) for batch in loader for e in batch] == [as_tuple(dataset[key]) for key in keys]


def test_crop_and_mask_are_one_box_of_the_scan(folder):
    image, mask = arrays(2)
    dataset = opened(folder, flip_probability=(0, 0, 0))
    starts = set()
    for epoch in range(30):
        example = dataset[(epoch, 1)]
        start = tuple(int(place[0]) for place in np.where(image == example.image[0, 0, 0]))
        box = tuple(slice(first, first + size) for first, size in zip(start, SIZE, strict=True))
        np.testing.assert_array_equal(example.image, image[box])
        np.testing.assert_array_equal(example.anatomy_mask, mask[box])
        starts.add(start)
    assert len(starts) > 10


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_flip_turns_image_and_mask_alike(folder, axis):
    plain = opened(folder, flip_probability=(0, 0, 0))[(1, 1)]
    flipped = opened(folder, flip_probability=tuple(float(axis == other) for other in range(3)))[(1, 1)]
    np.testing.assert_array_equal(flipped.image, np.flip(plain.image, axis))
    np.testing.assert_array_equal(flipped.anatomy_mask, np.flip(plain.anatomy_mask, axis))


def test_an_anatomy_is_complete_where_it_touches_no_face_of_the_crop(folder):
    for epoch in range(30):
        example = opened(folder, flip_probability=(0, 0, 0))[(epoch, 1)]
        for number, is_complete in enumerate(example.is_complete, start=1):
            places = np.argwhere(example.anatomy_mask == number)
            inside = len(places) > 0 and places.min() > 0 and (places.max(axis=0) < np.array(SIZE) - 1).all()
            assert is_complete == inside


def test_without_randomness_the_first_reconstruction_is_cropped_in_the_middle(folder):
    example = opened(folder, random_crop=False)[(7, 0)]
    assert example.row_id == "p1_a_1"
    np.testing.assert_array_equal(example.image, arrays(0)[0][1:9, 2:10, 0:8])


def test_a_small_scan_is_padded_with_air(folder):
    example = opened(folder, size_dhw=(12, 12, 16), random_crop=False)[1]
    assert (example.image[0] == -1150).all()
    np.testing.assert_array_equal(example.image[1:11, :, 3:12], arrays(2)[0])


def test_texts_follow_the_order_of_the_anatomies(folder):
    example = opened(folder, anatomies=("heart", "lung"))[0]
    assert example.texts == (NORMAL_HEART, "Nodule.")
    assert example.is_abnormal.tolist() == [False, True]
    assert (example.anatomy_mask == 2).sum() == (opened(folder)[0].anatomy_mask == 1).sum() > 0


def test_a_damaged_scan_is_dropped_with_its_name_and_reason(folder):
    shard = next((folder / "volumes/train/p2_a_1.zarr/image").rglob("0/0/0"))
    shard.write_bytes(shard.read_bytes()[:40])
    drop = opened(folder)[(0, 1)]
    assert isinstance(drop, Drop)
    assert (drop.reason, drop.row_id) == ("store damaged", "p2_a_1")


def test_a_damaged_first_scan_does_not_hinder_the_others(folder):
    (folder / "volumes/train/p1_a_1.zarr/zarr.json").unlink()
    assert opened(folder).contract == CONTRACT


def test_studies_without_a_report_are_left_out(folder, caplog):
    rows = [a_row("p1_a_1"), a_row("p1_a_2"), a_row("p2_a_1", texts=())]
    write_scan_rows(rows, folder, "train")
    assert len(opened(folder)) == 1
    assert "1 studies of train have no report" in caplog.text
    write_scan_rows(rows[2:], folder, "train")
    with pytest.raises(ValueError, match="no study of the split train"):
        opened(folder)


def test_whole_volumes_meet_whole_reports(folder):
    dataset = opened(folder, anatomies=("body",), size_dhw=(12, 12, 16), whole_volume=True, random_crop=False)
    example = dataset[0]
    assert example.texts == ("Nodule.",)
    assert example.is_complete.tolist() == example.is_abnormal.tolist() == [True]
    assert (example.anatomy_mask[1:11, :, 3:12] == 1).all()
    assert example.anatomy_mask.sum() == np.prod(SHAPE)


def test_a_whole_report_tells_shared_sentences_once_and_conclusions_first():
    shared = "No pleural or pericardial effusion."
    texts = (text("lung", "Nodule.", f"Clear. {shared}"), text("heart", "Cardiomegaly.", shared))
    assert report_caption(texts) == f"Nodule. Cardiomegaly. Clear. {shared}"
    assert report_caption((text("lung"),)) == "body shows no significant abnormalities."


def test_a_whole_scan_is_read_for_evaluation(folder):
    dataset = opened(folder, anatomies=("heart",))
    assert [row.scan_id for row in dataset.labelled_rows()] == ["p1_a_1", "p2_a_1"]
    image, mask = dataset.read_whole(dataset.labelled_rows()[1])
    np.testing.assert_array_equal(image, arrays(2)[0])
    np.testing.assert_array_equal(mask, arrays(2)[1] == 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anatomies": ("lung", "liver")}, r"anatomies \['liver'\]"),
        ({"size_dhw": (0, 8, 8)}, "at least 1 voxel"),
        ({"flip_probability": (0.2, 0.2, 2)}, "three probabilities"),
        ({"whole_volume": True}, "one vector a scan"),
        ({"split": "test"}, "splits"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_at_once(folder, options, message):
    split = options.pop("split", "train")
    with pytest.raises(ValueError, match=message):
        ScanDataset(folder, split, **({"anatomies": ANATOMIES, "size_dhw": SIZE} | options))


def test_an_index_outside_of_the_data_is_an_error(folder):
    with pytest.raises(IndexError, match="study 2"):
        opened(folder)[(0, 2)]


# Collator -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def processor():
    tokenizer = train_wordpiece_tokenizer([NORMAL_HEART, "Nodule.", "Cardiomegaly."], 200)
    image_processor = FVLMImageProcessor(anatomies=ANATOMIES, size_dhw=SIZE, patch_size_dhw=(4, 4, 4))
    return FVLMProcessor(image_processor, tokenizer)


@pytest.fixture
def example(folder):
    dataset = opened(folder, flip_probability=(0, 0, 0))
    return next(e for e in (dataset[(epoch, 1)] for epoch in range(99)) if e.is_complete[0])


def complete(example, **changes):
    return replace(example, is_complete=np.array([True, True]), **changes)


def test_equal_texts_are_encoded_once_and_known_again(processor, example):
    batch = ScanCollator(processor)([complete(example), complete(example, texts=("Nodule.", "Cardiomegaly."))])
    assert batch["text_index"].tolist() == [[2, 0], [2, 1]]  # the longest text comes first
    assert batch["text_ids"].tolist() == [text_id(each) for each in (NORMAL_HEART, "Cardiomegaly.", "Nodule.")]
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["text_lengths"] == batch["attention_mask"].sum(dim=1).tolist()
    assert processor.tokenizer.decode(batch["input_ids"][2], skip_special_tokens=True) == "nodule."


def test_texts_are_padded_to_the_longest_and_cut_at_the_limit(processor, example):
    batch = ScanCollator(processor)([complete(example)])
    assert batch["attention_mask"].sum(dim=1).max() == batch["input_ids"].shape[1] < 100
    assert ScanCollator(processor, max_length=4)([complete(example)])["input_ids"].shape[1] == 4


def test_the_text_of_an_incomplete_anatomy_is_not_encoded(processor, example):
    batch = ScanCollator(processor)([replace(example, is_complete=np.array([True, False]))])
    assert batch["text_index"].tolist() == [[0, -1]]
    assert len(batch["input_ids"]) == 1


def test_pixels_are_those_of_the_processor(processor, example):
    batch = ScanCollator(processor)([example])
    image = np.clip((example.image.astype(np.float32) + 1150) / 1500, 0, 1)
    assert batch["pixel_values"].shape == (1, 1, *SIZE)
    np.testing.assert_allclose(batch["pixel_values"][0, 0].numpy(), image, rtol=1e-6)
    assert batch["anatomy_mask"].dtype == torch.uint8


def test_dropped_scans_are_set_aside_and_a_batch_may_be_empty(processor, example):
    drop = Drop("store damaged", "zarr.json", "p9_a_1")
    batch = ScanCollator(processor)([drop, example])
    assert batch["set_aside"] == [{"row_id": "p9_a_1", "reason": "store damaged", "detail": "zarr.json"}]
    assert batch["row_ids"] == ["p2_a_1"]
    empty = ScanCollator(processor)([drop])
    for name, values in ScanCollator(processor)([complete(example)]).items():
        if isinstance(values, torch.Tensor):
            assert (empty[name].dtype, empty[name].ndim, len(empty[name])) == (values.dtype, values.ndim, 0), name


def test_without_reduction_every_text_is_right_for_its_own_scan_alone(processor, example):
    normal = complete(example, texts=("Nodule.", NORMAL_HEART))
    other = replace(normal, row_id="other")
    batch = ScanCollator(processor, reduce_false_negatives=False)([normal, other])
    assert batch["text_index"].tolist() == [[2, 0], [3, 1]]
    assert len(set(batch["text_ids"].tolist())) == 4
    assert batch["is_abnormal"].all()
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])


def test_raw_pixels_are_windowed_on_the_device_to_the_very_same_numbers(processor, example):
    far = replace(example, image=example.image + np.int16(4000))  # beyond the window
    scaled, raw = (ScanCollator(processor, raw_pixels=raw)([example, far]) for raw in (False, True))
    assert (raw["pixel_values"].dtype, raw["pixel_values"].shape) == (torch.int16, (2, 1, *SIZE))
    assert torch.equal(scaled_pixels(raw), scaled["pixel_values"])
    assert scaled_pixels(ScanCollator(processor, raw_pixels=True)([])).shape == (0, 1, *SIZE)


@pytest.mark.parametrize("raw", [False, True])
def test_a_worker_fills_the_batch_where_the_main_process_reads_it(processor, folder, raw):
    dataset = opened(folder)
    collator = ScanCollator(processor, raw_pixels=raw)

    def collate(examples):
        batch = collator(examples)
        return batch | {"shared": [batch[name].is_shared() for name in ("pixel_values", "anatomy_mask")]}

    loader = torch.utils.data.DataLoader(dataset, batch_sampler=[[(0, 0), (0, 1)]], collate_fn=collate, num_workers=1)
    batch, here = next(iter(loader)), collate([dataset[(0, 0)], dataset[(0, 1)]])
    assert (batch["shared"], here["shared"]) == ([True, True], [False, False])
    assert all(torch.equal(batch[name], here[name]) for name in ("pixel_values", "anatomy_mask", "input_ids"))


def test_crops_of_another_size_are_refused(processor, folder):
    with pytest.raises(ValueError, match="processor's size"):
        ScanCollator(processor)([opened(folder, size_dhw=(4, 8, 8))[0]])
