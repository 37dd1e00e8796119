"""Examples to batches: the tensors of the model, concept identities, and what was set aside."""

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf.data.parquet import write_figure_rows
from medclip_hf.data.records import ConceptMention, FigureRow
from medclip_hf.data.stages import Drop
from medclip_hf.processing.conceptclip.processing_conceptclip import ConceptCLIPProcessor
from medclip_hf.processing.pixels import scaled_pixels
from medclip_hf.training.collators import FigureCollator, concept_identity
from medclip_hf.training.datasets import FigureDataset, FigureExample

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "mass", "in", "the", "lung", "no", "edema", "."]


@pytest.fixture(scope="module")
def processor():
    images = SiglipImageProcessorPil(
        size={"height": 8, "width": 8}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return ConceptCLIPProcessor(images, BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}))


def figure(row_id="r", caption="a mass in the lung", concepts=(("C0000007", 2, 6), ("C0000009", 14, 18))):
    mentions = tuple(ConceptMention(cui, caption[start:end], start, end) for cui, start, end in concepts)
    return FigureExample(row_id, Image.new("RGB", (8, 8), (255, 0, 0)), caption, mentions)


def test_a_batch_holds_everything_the_model_takes(processor):
    batch = FigureCollator(processor)([figure("a"), figure("b", "a mass.", [("C0000007", 2, 6)])])
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["pixel_values"][0, :, 0, 0].tolist() == [1.0, -1.0, -1.0]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["token_type_ids"].shape == (2, 7)
    assert batch["concept_token_spans"].tolist() == [[[2, 3], [5, 6]], [[2, 3], [0, 0]]]  # [CLS] counted
    assert batch["concept_mask"].tolist() == [[True, True], [True, False]]
    assert batch["concept_ids"].tolist() == [[7, 9], [7, -1]]
    assert (batch["row_ids"], batch["set_aside"]) == (["a", "b"], [])


def test_dropped_examples_leave_the_batch_and_are_named(processor):
    batch = FigureCollator(processor)([Drop("image damaged", "x.jpg", "bad"), figure("good")])
    assert batch["row_ids"] == ["good"]
    assert batch["pixel_values"].shape[0] == 1
    assert batch["set_aside"] == [{"row_id": "bad", "reason": "image damaged", "detail": "x.jpg"}]


@pytest.mark.parametrize("size", [(8, 8), (31, 17), (640, 480)])
def test_evaluation_gives_the_pixels_that_the_processor_alone_gives(processor, tmp_path, size):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    write_figure_rows([FigureRow("r", "a mass", image_bytes=buffer.getvalue())], tmp_path, "test")
    dataset = FigureDataset(tmp_path, "test", image_size=8, crop_scale=None)
    batch = FigureCollator(processor)([dataset[0]])
    assert torch.equal(batch["pixel_values"], processor(images=Image.open(buffer))["pixel_values"])


@pytest.mark.parametrize("examples", [[], [Drop("image damaged", "x.jpg", "bad")]])
def test_a_batch_without_a_readable_example_has_the_same_tensors_with_no_row(processor, examples):
    full, empty = FigureCollator(processor)([figure()]), FigureCollator(processor)(examples)
    assert empty.keys() == full.keys()
    for name, tensor in full.items():
        if isinstance(tensor, torch.Tensor):
            assert (empty[name].shape[0], empty[name].dtype, empty[name].ndim) == (0, tensor.dtype, tensor.ndim)
    assert empty["pixel_values"].shape == (0, 3, 8, 8)
    assert empty["concept_token_spans"].shape[2] == 2
    assert len(empty["set_aside"]) == len(examples)


def test_a_concept_beyond_the_limit_of_tokens_is_masked(processor):
    batch = FigureCollator(processor, max_length=4)([figure()])
    assert batch["input_ids"].shape == (1, 4)
    assert batch["concept_mask"].tolist() == [[True, False]]


def test_captions_without_concepts_make_a_batch(processor):
    batch = FigureCollator(processor)([figure(concepts=())])
    assert batch["concept_mask"].tolist() == [[False]]
    assert batch["concept_ids"].tolist() == [[-1]]


def test_the_longest_caption_comes_first_with_all_that_is_its_own(processor):
    short, long = figure("short", "a mass", [("C0000007", 2, 6)]), figure("long")
    batch = FigureCollator(processor)([short, replace(long, image=Image.new("RGB", (8, 8)))])
    assert (batch["row_ids"], batch["text_lengths"]) == (["long", "short"], [7, 4])
    assert batch["concept_ids"].tolist() == [[7, 9], [7, -1]]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [-1.0, 1.0]
    assert batch["attention_mask"].sum(dim=1).tolist() == [7, 4]


@pytest.mark.parametrize("changes", [{}, {"do_normalize": False}, {"image_mean": [0.48, 0.46, 0.41]}])
def test_raw_pixels_become_on_the_device_what_the_processor_gives(processor, changes):
    images = copy.copy(processor.image_processor)
    for name, value in changes.items():
        setattr(images, name, value)
    other = ConceptCLIPProcessor(images, processor.tokenizer)
    levels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    examples = [figure("a"), replace(figure("b"), image=Image.fromarray(levels + 64))]
    scaled, raw = (FigureCollator(other, raw_pixels=raw)(examples) for raw in (False, True))
    assert raw["pixel_values"].dtype == torch.uint8
    assert raw["pixel_values"].nbytes * 4 == scaled["pixel_values"].nbytes
    torch.testing.assert_close(scaled_pixels(raw), scaled["pixel_values"], rtol=0, atol=2e-7)
    empty = FigureCollator(other, raw_pixels=True)([])
    assert scaled_pixels(empty).shape == (0, 3, 8, 8)


def test_raw_pixels_without_their_scaling_are_refused():
    with pytest.raises(ValueError, match=r"torch.uint8 without pixel_scaling.*raw_pixels=True"):
        scaled_pixels({"pixel_values": torch.zeros(1, 3, 2, 2, dtype=torch.uint8)})


def test_images_of_another_size_than_the_processors_are_refused(processor):
    example = FigureExample("r", Image.new("RGB", (8, 16)), "a mass", ())
    with pytest.raises(ValueError, match=r"8×8 pixels, but examples have \[\(16, 8\)\]"):
        FigureCollator(processor)([example])


def test_a_limit_of_tokens_without_room_for_a_word_is_refused(processor):
    with pytest.raises(ValueError, match="at least 3"):
        FigureCollator(processor, max_length=2)


def test_a_umls_identifier_is_its_own_number():
    assert concept_identity(ConceptMention("C0178391", "breast implant", 0, 1)) == 178391


def test_other_identifiers_have_stable_numbers_above_all_umls_ones():
    identity = concept_identity(ConceptMention("RADLEX:123", "mass", 0, 1))
    assert identity == 7832902182767786100  # the same in every process, unlike Python's hash()
    assert 10**7 < identity < 2**63
    assert identity != concept_identity(ConceptMention("RADLEX:124", "mass", 0, 1))


def test_mentions_without_an_identifier_are_the_same_concept_by_name():
    one, two = ConceptMention("", "Mass", 0, 4), ConceptMention("", "mass", 9, 13)
    assert concept_identity(one) == concept_identity(two)
    assert concept_identity(one) != concept_identity(ConceptMention("mass", "Mass", 0, 4))
