"""One interface for ours and for peers: equal to the models' own output, with an identity that follows every change."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, ConceptCLIPProcessor
from medclip_hf.evaluation.encoders import load_encoder, make_encoder, make_open_clip_encoder
from medclip_hf.training.tokenizers import train_wordpiece_tokenizer

NAMES, TEMPLATES = ["cyst", "mass", "effusion"], ["{}", "an image showing {}."]
SIDE = 32
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": SIDE, "patch_size": 8}
TEXTS = ["a cyst", "an image showing mass and effusion of some size.", "mass"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece_tokenizer([*TEXTS, *NAMES] * 3, vocab_size=200, max_length=32)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(3)]


def conceptclip(tokenizer, has_patch_heads=True, seed=0):
    torch.manual_seed(seed)
    config = ConceptCLIPConfig(
        text_config=BertConfig(vocab_size=len(tokenizer), max_position_embeddings=80, **TOWER).to_dict(),
        vision_config=SiglipVisionConfig(**VISION).to_dict(),
        use_patch_concept_alignment=has_patch_heads,
    )
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return ConceptCLIPModel(config).eval(), ConceptCLIPProcessor(images, tokenizer)


def clip(tokenizer):
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_convert_rgb=True
    )
    return CLIPModel(config).eval(), CLIPProcessor(images, tokenizer)


def siglip(tokenizer):
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    config = SiglipConfig(text_config=text, vision_config=VISION)
    return SiglipModel(config).eval(), SiglipProcessor(
        SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer
    )


MAKERS = {"conceptclip": conceptclip, "clip": clip, "siglip": siglip}


@pytest.mark.parametrize("kind", list(MAKERS))
def test_pixels_travel_as_bytes_and_are_scaled_where_the_model_is(kind, tokenizer, pictures):
    model, processor = MAKERS[kind](tokenizer)
    encoder = make_encoder(model, processor, name=kind)
    large = pictures[0].resize((50, 41))
    assert encoder.preprocess(large).dtype == torch.uint8
    pixels = processor.image_processor(images=large, return_tensors="pt")["pixel_values"]
    expected = getattr(model.get_image_features(pixel_values=pixels), "pooler_output", None)
    found = encoder.encode_pixels(encoder.preprocess(large)[None])
    torch.testing.assert_close(found.image_embeds * found.image_norms[:, None], expected, rtol=0, atol=1e-5)


class Blurred(SiglipImageProcessorPil):
    """One that does more to scaled pixels than to bytes."""

    def normalize(self, image, *args, **kwargs):
        return super().normalize(image, *args, **kwargs) ** 3


def test_an_image_processor_that_does_not_only_scale_at_its_end_makes_the_input_itself(tokenizer, pictures):
    model, processor = siglip(tokenizer)
    processor.image_processor = Blurred(size={"height": SIDE, "width": SIDE})
    encoder = make_encoder(model, processor, name="blurred")
    expected = processor.image_processor(images=pictures[0], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(encoder.preprocess(pictures[0]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", list(MAKERS))
def test_the_interface_gives_the_model_s_own_logits(kind, tokenizer, pictures):
    model, processor = MAKERS[kind](tokenizer)
    encoder = make_encoder(model, processor, name=kind)
    padding = {"padding": "max_length", "max_length": 16} if kind == "siglip" else {"padding": True}
    pixels = processor(images=pictures, return_tensors="pt")
    tokens = processor.tokenizer(TEXTS, truncation=True, return_tensors="pt", **{"max_length": 16, **padding})
    with torch.no_grad():
        expected = model(**pixels, **tokens).logits_per_image
    images, texts = encoder.encode_images(pictures), encoder.encode_texts(TEXTS, batch_size=2)
    logits = encoder.logit_scale * images.image_embeds @ texts.T + encoder.logit_bias
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert images.image_norms.shape == (3,)
    assert encoder.has_patches == (kind == "conceptclip") == (images.patch_embeds is not None)


@pytest.mark.parametrize("kind", list(MAKERS))
def test_a_saved_model_is_the_same_encoder(kind, tokenizer, pictures, tmp_path):
    model, processor = MAKERS[kind](tokenizer)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = load_encoder(tmp_path, device="cpu"), make_encoder(model, processor, name="memory")
    assert loaded.name == tmp_path.name
    assert loaded.identity == again.identity
    torch.testing.assert_close(
        loaded.encode_images(pictures).image_embeds, again.encode_images(pictures).image_embeds, rtol=0, atol=0
    )


def test_the_identity_changes_with_weights_preprocessing_words_and_precision(tokenizer):
    model, processor = conceptclip(tokenizer)
    first = make_encoder(model, processor, name="a").identity
    processor(text=TEXTS)  # leaves padding and truncation behind in the tokenizer
    assert make_encoder(model, processor, name="another name").identity == first
    with torch.no_grad():
        model.logit_bias += 1e-3
    changed = [make_encoder(model, processor, name="a").identity]
    model, processor = conceptclip(tokenizer)
    processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    changed.append(make_encoder(model, processor, name="a").identity)
    other_words = train_wordpiece_tokenizer([*TEXTS, "pneumothorax"] * 3, vocab_size=200, max_length=32)
    model, _ = conceptclip(tokenizer)
    changed.append(make_encoder(model, conceptclip(other_words)[1], name="a").identity)
    changed.append(
        make_encoder(conceptclip(tokenizer)[0], conceptclip(tokenizer)[1], name="a", dtype="bfloat16").identity
    )
    assert len({first, *changed}) == 5


def test_classes_have_concept_vectors_only_with_patch_heads(tokenizer):
    for maker, has_concepts in ((conceptclip, True), (clip, False)):
        encoder = make_encoder(*maker(tokenizer), name="m")
        classes = encoder.encode_classes(NAMES, TEMPLATES)
        assert classes.text_embeds.shape == (2, 3, 16)
        assert (classes.concept_embeds is not None) == has_concepts
        assert torch.allclose(
            classes.text_embeds[1, 2], encoder.encode_texts(["an image showing effusion."])[0], atol=1e-5
        )
    first_stage = make_encoder(*conceptclip(tokenizer, has_patch_heads=False), name="m")
    assert first_stage.encode_classes(NAMES, TEMPLATES).concept_embeds is None
    assert not first_stage.has_patches


def test_half_precision_stays_near(tokenizer, pictures):
    model, processor = conceptclip(tokenizer)
    exact = make_encoder(model, processor, name="a").encode_images(pictures).image_embeds
    half = make_encoder(model, processor, name="a", dtype=torch.bfloat16).encode_images(pictures)
    assert half.image_embeds.dtype == torch.float32
    assert torch.allclose(exact, half.image_embeds, atol=0.05)


class OpenClipStandIn(torch.nn.Module):
    """Has the call signatures of an open_clip model."""

    def __init__(self):
        super().__init__()
        self.pixels, self.words = torch.nn.Linear(12, 4), torch.nn.Embedding(50, 4)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
        self.logit_bias = None

    def encode_image(self, image, normalize=False):
        return self.pixels(image.flatten(1))

    def encode_text(self, text, normalize=False):
        return self.words(text).mean(dim=1)


def stand_in_module():
    torch.manual_seed(0)
    module = types.ModuleType("open_clip")

    def preprocess(image):
        return torch.tensor(np.asarray(image.resize((2, 2)), dtype=np.float32)).permute(2, 0, 1) / 255

    def create_model_from_pretrained(model_name, pretrained=None, device="cpu", **kwargs):
        if model_name != "ViT-B-16":
            raise RuntimeError(f"Model config for {model_name} not found.")
        assert pretrained == "some_tag"
        return OpenClipStandIn().to(device), preprocess

    module.create_model_from_pretrained = create_model_from_pretrained
    module.get_tokenizer = lambda name: lambda texts: torch.tensor([[len(text) % 50] * 3 for text in texts])
    return module


def test_open_clip_s_calls_are_served(monkeypatch, pictures):
    monkeypatch.setitem(sys.modules, "open_clip", stand_in_module())
    encoder = load_encoder("open_clip:ViT-B-16/some_tag", device="cpu")
    assert encoder.name == "some_tag"
    assert encoder.logit_scale == pytest.approx(np.exp(2.0))
    assert encoder.encode_images(pictures).image_embeds.shape == (3, 4)
    assert torch.allclose(encoder.encode_texts(TEXTS).norm(dim=1), torch.ones(3), atol=1e-6)
    assert encoder.encode_classes(NAMES, TEMPLATES).text_embeds.shape == (2, 3, 4)
    with pytest.raises(ValueError, match="open_clip cannot load"):
        load_encoder("open_clip:unknown/tag")


def test_the_identity_of_an_open_clip_model_follows_its_weights():
    preprocess = stand_in_module().create_model_from_pretrained("ViT-B-16", "some_tag")[1]
    torch.manual_seed(1)
    tokenizer = stand_in_module().get_tokenizer("ViT-B-16")
    models = [OpenClipStandIn(), OpenClipStandIn()]
    first, second = (make_open_clip_encoder(model, preprocess, tokenizer, name="m").identity for model in models)
    models[1].load_state_dict(models[0].state_dict())
    assert first != second
    assert make_open_clip_encoder(models[1], preprocess, tokenizer, name="n").identity == first


def test_open_clip_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        load_encoder("open_clip:ViT-B-16/openai")


def test_models_that_cannot_be_compared_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        load_encoder(tmp_path / "absent")
    model, processor = conceptclip(tokenizer)
    with pytest.raises(ValueError, match="no get_image_features"):
        make_encoder(model.text_model, processor, name="only text")
    with pytest.raises(ValueError, match="no image_processor"):
        make_encoder(model, tokenizer, name="no pictures")
    with pytest.raises(ValueError, match="dtype"):
        make_encoder(model, processor, name="m", dtype="int8")


@pytest.fixture
def saved(tokenizer, tmp_path):
    """A complete model of the first stage."""
    for part in conceptclip(tokenizer, has_patch_heads=False):
        part.save_pretrained(tmp_path)
    return tmp_path


def test_weights_that_are_incomplete_are_refused(tokenizer, saved):
    conceptclip(tokenizer)[0].config.save_pretrained(saved)  # now with heads, which the weights lack
    with pytest.raises(ValueError, match="not those of its configuration"):
        load_encoder(saved)


def test_weights_that_are_damaged_are_refused(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot be used"):
        load_encoder(saved)


def test_code_of_a_model_is_neither_run_nor_asked_about(saved, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the code"))
    config = json.loads((saved / "config.json").read_text())
    code = {"model_type": "stranger", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (saved / "config.json").write_text(json.dumps(config | code))
    (saved / "code.py").write_text("raise SystemExit('the code was run')")
    with pytest.raises(ValueError, match="cannot be used"):
        load_encoder(saved)


@pytest.mark.parametrize("texts", ["one string", [], ["fine", " "], ["fine", None]])
def test_texts_that_are_none_are_refused(tokenizer, texts):
    with pytest.raises(ValueError, match=r"texts|empty"):
        make_encoder(*clip(tokenizer), name="m").encode_texts(texts)
