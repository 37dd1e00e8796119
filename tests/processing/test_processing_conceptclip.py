"""ConceptCLIP's processor: images of every kind to RGB, character spans to token spans, refusals."""

import base64
import io
import json
import logging
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import ConceptCLIPProcessor
from medclip_hf.processing.conceptclip import processing_conceptclip, to_rgb

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    "chest",
    "radiograph",
    "with",
    "left",
    "pleural",
    "effusion",
    "cardio",
    "##me",
    "##galy",
    "meniere",
    "s",
    "disease",
    ".",
    ",",
]


@pytest.fixture(scope="module")
def processor() -> ConceptCLIPProcessor:
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(SPECIAL + WORDS)})
    return ConceptCLIPProcessor(SiglipImageProcessorPil(size={"height": 28, "width": 28}), tokenizer)


def spans_of(processor, caption: str, *mentions: str, **kwargs) -> list[list[int] | None]:
    """Token span of each mention, None where masked."""
    chars = [(caption.index(mention), caption.index(mention) + len(mention)) for mention in mentions]
    features = processor(text=[caption], concept_char_spans=[chars], **kwargs)
    spans, mask = features["concept_token_spans"][0], features["concept_mask"][0]
    return [span.tolist() if is_valid else None for span, is_valid in zip(spans, mask, strict=True)]


# Spans -----------------------------------------------------------------------------------------------------------


def test_character_spans_become_token_spans_with_cls_counted(processor):
    caption = "Chest radiograph with left pleural effusion, cardiomegaly."
    # [CLS] chest radiograph with left pleural effusion , cardio ##me ##galy . [SEP]
    assert spans_of(processor, caption, "pleural effusion", "cardiomegaly", "Chest") == [[5, 7], [8, 11], [1, 2]]


def test_a_span_inside_a_word_takes_the_tokens_it_touches(processor):
    assert spans_of(processor, "left cardiomegaly", "megaly", "rdiom") == [[3, 5], [2, 4]]


def test_accents_and_blanks_move_no_span(processor):
    caption = "  Ménière's   disease ,\tchest"
    # [CLS] meniere [UNK] s disease , chest [SEP]
    assert spans_of(processor, caption, "Ménière's   disease", " disease ", "chest") == [[1, 5], [4, 5], [6, 7]]


def test_a_span_that_truncation_reaches_is_masked_and_never_moved(processor):
    caption = "chest radiograph with left pleural effusion"
    kwargs = {"max_length": 7}  # [CLS] chest radiograph with left pleural [SEP]
    mentions = ("pleural", "pleural effusion", "effusion")
    assert spans_of(processor, caption, *mentions, **kwargs) == [[5, 6], None, None]


def test_captions_are_cut_at_77_tokens_by_default(processor):
    caption = "left " * 80 + "effusion"
    assert spans_of(processor, caption, "effusion") == [None]
    assert processor(text=[caption])["input_ids"].shape == (1, 77)


def test_truncation_on_the_left_masks_the_first_spans(processor):
    processor.tokenizer.truncation_side = "left"
    try:
        spans = spans_of(processor, "chest radiograph with left pleural", "chest", "pleural", max_length=4)
    finally:
        processor.tokenizer.truncation_side = "right"
    assert spans == [None, [2, 3]]


def test_left_padding_shifts_spans_with_their_tokens(processor):
    text = ["chest radiograph", "left"]
    features = processor(text=text, concept_char_spans=[[(0, 5)], [(0, 4)]], padding_side="left")
    assert features["concept_token_spans"].tolist() == [[[1, 2]], [[2, 3]]]
    assert features["input_ids"][1, 2] == processor.tokenizer.convert_tokens_to_ids("left")


def test_concepts_are_padded_to_the_most_of_a_caption_and_keep_their_places(processor):
    text = ["chest left", "chest", ""]
    features = processor(text=text, concept_char_spans=[[(6, 10), (5, 5), (0, 5)], [], []])
    assert features["concept_token_spans"].tolist() == [[[2, 3], [0, 0], [1, 2]], [[0, 0]] * 3, [[0, 0]] * 3]
    assert features["concept_mask"].tolist() == [[True, False, True], [False] * 3, [False] * 3]
    assert features["concept_token_spans"].dtype == torch.int64
    assert features["concept_mask"].dtype == torch.bool


def test_without_any_concept_one_masked_place_remains(processor):
    features = processor(text=["chest", "left"], concept_char_spans=[[], []])
    assert features["concept_token_spans"].shape == (2, 1, 2)
    assert not features["concept_mask"].any()


def test_a_single_caption_takes_its_own_list_of_spans(processor):
    features = processor(text="chest left", concept_char_spans=[(6, 10)])
    assert features["concept_token_spans"].tolist() == [[[2, 3]]]
    assert features["input_ids"].shape == (1, 4)


def test_offsets_come_only_on_request(processor):
    assert "offset_mapping" not in processor(text=["chest"], concept_char_spans=[[]])
    features = processor(text=["chest"], concept_char_spans=[[]], return_offsets_mapping=True)
    assert features["offset_mapping"].tolist() == [[[0, 0], [0, 5], [0, 0]]]


@pytest.mark.parametrize("span", [(3, 11), (-1, 2), (4, 2)])
def test_a_span_outside_its_caption_is_refused(processor, span):
    with pytest.raises(ValueError, match="Caption 1 has 10 characters"):
        processor(text=["chest", "chest left"], concept_char_spans=[[], [span]])


@pytest.mark.parametrize("spans", [(0, 5), None, [(0, 5, 1)], [(0.0, 5.0)]])
def test_what_is_no_list_of_spans_is_refused(processor, spans):
    with pytest.raises(ValueError, match=r"Caption 0 needs a list of \(start, end\) integers"):
        processor(text=["chest"], concept_char_spans=[spans])


def test_captions_may_stay_of_different_lengths(processor):
    features = processor(
        text=["chest", "chest left"], concept_char_spans=[[], [(6, 10)]], padding=False, return_tensors=None
    )
    assert [len(row) for row in features["input_ids"]] == [3, 4]
    assert features["concept_token_spans"].tolist() == [[[0, 0]], [[2, 3]]]


@pytest.mark.parametrize("inputs", [{"images": []}, {"text": []}])
def test_an_empty_list_is_refused(processor, inputs):
    with pytest.raises(ValueError, match="is an empty list"):
        processor(**inputs)


def test_spans_without_their_captions_are_refused(processor):
    with pytest.raises(ValueError, match="1 lists for 2 captions"):
        processor(text=["chest", "left"], concept_char_spans=[[]])
    with pytest.raises(ValueError, match="without text"):
        processor(images=Image.new("RGB", (4, 4)), concept_char_spans=[[]])


def test_spans_of_real_captions_cover_the_words_they_name(processor, real_data):
    """Every word of a real caption, told by its characters, comes back as the tokens of that word."""
    lines = (real_data / "pmc_sample" / "metadata.jsonl").read_text().splitlines()
    captions = [json.loads(line)["caption"] for line in lines]
    tokenizer = processor.tokenizer
    for caption in captions:
        words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(caption.replace("[", "("))
        chars = [place for _, place in words]
        features = processor(text=[caption], concept_char_spans=[chars], truncation=False, max_length=None)
        assert features["concept_mask"].all()
        offsets = tokenizer(caption, return_offsets_mapping=True)["offset_mapping"]
        for (start, end), (first, stop) in zip(chars, features["concept_token_spans"][0].tolist(), strict=True):
            assert offsets[first][0] <= start
            assert end <= offsets[stop - 1][1]


# Pixels ----------------------------------------------------------------------------------------------------------


def test_images_are_squashed_and_normalised_to_minus_one_to_one(processor):
    image = Image.new("RGB", (60, 20), (255, 0, 0))
    pixels = processor(images=[image, image])["pixel_values"]
    assert pixels.shape == (2, 3, 28, 28)
    torch.testing.assert_close(pixels[:, 0], torch.ones(2, 28, 28))
    torch.testing.assert_close(pixels[:, 1:], -torch.ones(2, 2, 28, 28))


def test_text_and_images_come_together(processor):
    features = processor(images=Image.new("L", (9, 9)), text=["chest", "left effusion"])
    assert set(features) == {"pixel_values", "input_ids", "attention_mask", "token_type_ids"}
    assert features["input_ids"].shape == (2, 4)


GRADIENT = np.arange(256, dtype=np.uint8).reshape(16, 16)


def through_file(image: Image.Image, file_format: str = "PNG", **kwargs) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **kwargs)
    return to_rgb(buffer.getvalue())


def test_16_bit_grey_is_scaled_and_not_clipped():
    rgb = through_file(Image.fromarray(GRADIENT.astype(np.uint16) * 257))
    assert np.array_equal(np.asarray(rgb), np.stack([GRADIENT] * 3, axis=-1))


@pytest.mark.parametrize("mode", ["I", "I;16"])
def test_32_bit_modes_hold_16_bits(mode):
    image = Image.fromarray(GRADIENT.astype(np.uint16) * 257).convert(mode)
    assert np.array_equal(np.asarray(to_rgb(image))[..., 0], GRADIENT)


def test_16_bit_data_of_fewer_bits_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        to_rgb(Image.fromarray(GRADIENT.astype(np.uint16) * 16))
    assert "brightest value is 4080" in caplog.text


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_places_show_white_paper(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    assert np.asarray(to_rgb(image.convert(mode))).tolist() == [[[255] * 3, [0] * 3]]


def test_a_transparent_palette_entry_shows_white_paper():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    rgb = through_file(image, transparency=0)
    assert np.asarray(rgb).tolist() == [[[255] * 3, [200, 100, 50]]]


def test_a_palette_without_transparency_keeps_its_colours():
    image = Image.new("P", (1, 1))
    image.putpalette([10, 20, 30])
    assert through_file(image).getpixel((0, 0)) == (10, 20, 30)


def test_a_transparent_colour_key_shows_white_paper():
    image = Image.new("L", (2, 1), 7)
    image.putpixel((1, 0), 9)
    rgb = through_file(image, transparency=7)
    assert np.asarray(rgb)[0, :, 0].tolist() == [255, 9]


def test_one_bit_grey_and_cmyk_become_rgb():
    assert to_rgb(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("L", (1, 1), 5)).getpixel((0, 0)) == (5, 5, 5)
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert through_file(red, "JPEG", quality=95).getpixel((4, 4))[0] > 240
    assert through_file(red, "JPEG", quality=95).getpixel((4, 4))[1] < 15


def test_the_orientation_in_exif_is_applied():
    image = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image.putpixel((0, 0), (255, 255, 255))
    upright = through_file(image, exif=exif)
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "array",
    [
        GRADIENT,
        GRADIENT[None],
        GRADIENT[..., None],
        np.stack([GRADIENT] * 3),
        np.stack([GRADIENT] * 3, axis=-1),
        GRADIENT.astype(np.int64),
        GRADIENT.astype(np.uint16) * 257,
        (GRADIENT.astype(np.uint16) * 257).astype(">u2"),
        GRADIENT / 255,
        torch.from_numpy(GRADIENT / np.float32(255)),
        torch.from_numpy(np.stack([GRADIENT] * 3)),
    ],
    ids=lambda array: f"{array.dtype}{tuple(array.shape)}",
)
def test_arrays_and_tensors_of_every_layout_mean_the_same_image(array):
    assert np.array_equal(np.asarray(to_rgb(array)), np.stack([GRADIENT] * 3, axis=-1))


def test_a_tensor_of_bfloat16_is_taken():
    tensor = torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16)
    assert np.asarray(to_rgb(tensor))[0, :, 0].tolist() == [0, 255]


def test_an_array_of_objects_is_refused():
    with pytest.raises(ValueError, match="should hold numbers"):
        to_rgb(np.array([["a", "b"]], dtype=object))


def test_a_boolean_array_is_black_and_white():
    assert np.asarray(to_rgb(np.array([[True, False]])))[0, :, 0].tolist() == [255, 0]


def test_paths_bytes_batches_and_nested_lists_are_taken(processor, tmp_path):
    path = tmp_path / "figure.png"
    Image.fromarray(GRADIENT).save(path)
    batch = np.stack([np.stack([GRADIENT] * 3, axis=-1)] * 2)
    pixels = processor(images=[path, [str(path), path.read_bytes()], batch])["pixel_values"]
    assert pixels.shape == (5, 3, 28, 28)
    assert all(torch.equal(image, pixels[0]) for image in pixels)


# Refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def address(tmp_path):
    """Of a web server on this machine that shows `tmp_path`."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_an_image_behind_a_url_is_what_its_file_is(tmp_path, address):
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "grey.png")
    Image.new("RGBA", (2, 2), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    for name in ("grey.png", "clear.png"):
        content = base64.b64encode((tmp_path / name).read_bytes()).decode()
        for url in (f"{address}/{name}", f"data:image/png;base64,{content}"):
            assert np.array_equal(to_rgb(url), to_rgb(tmp_path / name))


def test_a_url_that_shows_no_image_is_told(tmp_path, address, monkeypatch):
    (tmp_path / "page.html").write_text("<html>" * 20)
    with pytest.raises(ValueError, match=r"absent\.png cannot be fetched: HTTP Error 404"):
        to_rgb(f"{address}/absent.png")
    with pytest.raises(ValueError, match=r"page\.html cannot be opened as an image"):
        to_rgb(f"{address}/page.html")
    with pytest.raises(ValueError, match="cannot be fetched"):
        to_rgb("http://127.0.0.1:1/a.png")
    with pytest.raises(ValueError, match="cannot be opened as an image"):
        to_rgb("data:image/png;base64,???")
    monkeypatch.setattr(processing_conceptclip, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="more than the 100 bytes allowed"):
        to_rgb(f"{address}/page.html")


def test_a_missing_file_is_refused_by_name(processor, tmp_path):
    with pytest.raises(ValueError, match=r"absent\.png is not a file"):
        processor(images=str(tmp_path / "absent.png"))


def test_a_file_that_is_no_image_is_refused_by_name(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("no image")
    with pytest.raises(ValueError, match=r"notes\.png cannot be opened"):
        to_rgb(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_truncated_file_is_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    Image.effect_noise((200, 200), 80).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=f"cut.{suffix} cannot be"):
        to_rgb(path)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (3000, 1000)).save(path)
    monkeypatch.setattr(processing_conceptclip, "MAX_PIXELS", 1_000_000)
    with pytest.raises(ValueError, match=r"bomb\.png has 3000 x 1000 pixels"):
        to_rgb(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(ValueError, match=r"bomb\.png may be a decompression bomb"):
        to_rgb(path)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="0 x 5"):
        to_rgb(Image.new("RGB", (0, 5)))
    with pytest.raises(ValueError, match=r"\(0, 5, 3\)"):
        to_rgb(np.zeros((0, 5, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "array",
    [np.array([[-1000.0, 300.0]]), np.array([[np.nan]]), np.array([[300]]), np.array([[-1]], dtype=np.int16)],
    ids=["hounsfield", "nan", "int300", "negative"],
)
def test_values_on_no_known_scale_are_refused(array):
    with pytest.raises(ValueError, match="Window it first"):
        to_rgb(array)


def test_values_beyond_16_bits_are_refused():
    with pytest.raises(ValueError, match="beyond 16 bits"):
        to_rgb(Image.fromarray(np.array([[70000]], dtype=np.int32)))


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match="got int"):
        to_rgb(3)
    with pytest.raises(ValueError, match=r"got \(2, 3, 4, 5, 6\)"):
        to_rgb(np.zeros((2, 3, 4, 5, 6)))


# Saving ----------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_again_it_gives_the_same_inputs(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = ConceptCLIPProcessor.from_pretrained(tmp_path)
    inputs = {"images": Image.effect_noise((40, 30), 60), "text": ["chest left"], "concept_char_spans": [[(0, 5)]]}
    before, after = processor(**inputs), loaded(**inputs)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_saving_leaves_the_processor_as_it_was(processor, tmp_path):
    before = processor.to_dict()
    processor.save_pretrained(tmp_path)
    assert processor.to_dict() == before
