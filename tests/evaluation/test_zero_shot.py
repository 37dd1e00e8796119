"""ConceptCLIP's zero-shot protocol: hand-checked scores on embeddings, and the way from pictures to probabilities."""

import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, SiglipVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, ConceptCLIPProcessor
from medclip_hf.evaluation.zero_shot import (
    ClassEmbeddings,
    average_templates,
    best_patch_mean,
    classify_images,
    embed_classes,
    zero_shot_scores,
)
from medclip_hf.training.tokenizers import train_wordpiece_tokenizer

NAMES = ["cyst", "spiculated mass", "nodule"]
TEMPLATES = ["{}", "an image showing {}.", "{} on a radiograph"]


def unit(*rows):
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


# The scores.


def test_the_global_score_is_the_softmax_of_scaled_cosines():
    scores = zero_shot_scores(unit([1, 0]), unit([1, 0], [0, 1]), logit_scale=2.0)
    assert scores.global_scores[0, 0] == pytest.approx(math.exp(2) / (math.exp(2) + 1))
    assert scores.local_scores is None
    assert np.array_equal(scores.mixed_scores, scores.global_scores)


def test_the_local_score_is_that_of_the_best_patches():
    patches = unit([1, 0], [0.6, 0.8], [0, 1])[None]
    concepts = unit([1, 0])
    assert best_patch_mean(patches, concepts, 1).item() == pytest.approx(1.0)
    assert best_patch_mean(patches, concepts, 2).item() == pytest.approx(0.8)
    assert best_patch_mean(patches, concepts, 128).item() == pytest.approx(1.6 / 3)  # all, where there are fewer


def test_global_and_local_are_mixed_half_and_half():
    scores = zero_shot_scores(
        unit([1, 0]), unit([1, 0], [0, 1]), 3.0, unit([0, 1], [1, 0])[None], unit([1, 0], [1, 1]), 5.0, top_patches=1
    )
    assert np.allclose(scores.mixed_scores, 0.5 * scores.global_scores + 0.5 * scores.local_scores)
    only_local = zero_shot_scores(
        unit([1, 0]), unit([1, 0]), 3.0, unit([0, 1])[None], unit([1, 0]), 5.0, local_weight=1.0
    )
    assert np.array_equal(only_local.mixed_scores, only_local.local_scores)


def test_a_sigmoid_scores_each_class_by_itself():
    one = zero_shot_scores(unit([1, 0]), unit([1, 0]), 2.0, activation="sigmoid")
    two = zero_shot_scores(unit([1, 0]), unit([1, 0], [0, 1]), 2.0, activation="sigmoid")
    assert one.global_scores[0, 0] == two.global_scores[0, 0] == pytest.approx(1 / (1 + math.exp(-2)))


def test_a_bias_moves_sigmoids_and_leaves_a_softmax_alone():
    image, texts = unit([1, 0]), unit([1, 0], [0, 1])
    for activation, is_equal in (("softmax", True), ("sigmoid", False)):
        plain = zero_shot_scores(image, texts, 2.0, activation=activation).global_scores
        biased = zero_shot_scores(image, texts, 2.0, logit_bias=-1.0, activation=activation).global_scores
        assert np.allclose(plain, biased) == is_equal


def test_sigmoids_of_a_trained_scale_do_not_tie():
    texts = unit([1.0, 0.10], [1.0, 0.11])
    scores = zero_shot_scores(unit([1.0, 0.2]), texts, 30.0, activation="sigmoid").global_scores[0]
    assert scores[0] < scores[1] < 1.0


def test_templates_are_averaged_and_normalised_again():
    embeds = torch.stack([unit([1, 0]), unit([0, 1])])  # two templates of one class
    assert torch.allclose(average_templates(embeds), unit([1, 1]))
    assert torch.allclose(average_templates(embeds, [0.0, 2.0]), unit([0, 1]))


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0]])
def test_senseless_template_weights_are_refused(weights):
    with pytest.raises(ValueError, match="2 template weights"):
        average_templates(torch.ones(2, 1, 3), weights)


def test_a_single_template_can_be_picked():
    classes = ClassEmbeddings(("a",), ("{}", "{}."), torch.stack([unit([1, 0]), unit([0, 1])]))
    text_embeds, concept_embeds = classes.averaged([0, 1])
    assert torch.allclose(text_embeds, unit([0, 1]))
    assert concept_embeds is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "tanh"}, "softmax"),
        ({"top_patches": 0}, "top_patches"),
        ({"local_weight": 1.5}, "local_weight"),
        ({"patch_embeds": torch.ones(1, 4, 2)}, "belong together"),
        ({"image_embeds": torch.ones(1, 3)}, "share D"),
        (
            {"patch_embeds": torch.ones(1, 4, 3), "concept_embeds": torch.ones(1, 2), "concept_logit_scale": 1.0},
            "share D",
        ),
    ],
)
def test_embeddings_and_options_that_do_not_fit_are_refused(changes, message):
    arguments = {"image_embeds": unit([1, 0]), "text_embeds": unit([1, 0]), "logit_scale": 1.0}
    with pytest.raises(ValueError, match=message):
        zero_shot_scores(**(arguments | changes))


# From pictures to probabilities.


@pytest.fixture(scope="module")
def processor():
    captions = [template.format(name) for name in NAMES for template in TEMPLATES] * 2
    tokenizer = train_wordpiece_tokenizer(captions, vocab_size=200, max_length=32)
    return ConceptCLIPProcessor(SiglipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)


def make_model(processor, has_patch_heads=True):
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ConceptCLIPConfig(
        text_config=BertConfig(vocab_size=len(processor.tokenizer), max_position_embeddings=80, **tower).to_dict(),
        vision_config=SiglipVisionConfig(image_size=32, patch_size=8, **tower).to_dict(),
        use_patch_concept_alignment=has_patch_heads,
    )
    return ConceptCLIPModel(config).eval()


@pytest.fixture(scope="module")
def model(processor):
    return make_model(processor)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(5)]


def test_every_class_is_embedded_in_every_template(model, processor):
    classes = embed_classes(model, processor, NAMES, TEMPLATES, batch_size=4)
    assert classes.text_embeds.shape == (3, 3, 16)
    assert classes.concept_embeds.shape == (3, 3, 16)
    prompt = processor(text=["an image showing spiculated mass."], concept_char_spans=[[(17, 32)]])
    alone = model(**prompt)
    torch.testing.assert_close(classes.text_embeds[1, 1], alone.text_embeds[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(classes.concept_embeds[1, 1], alone.concept_embeds[0, 0], rtol=1e-4, atol=1e-5)


def test_the_protocol_is_the_scores_of_its_embeddings(model, processor, pictures):
    scores = classify_images(model, processor, pictures, NAMES, TEMPLATES, batch_size=2)
    text_embeds, concept_embeds = embed_classes(model, processor, NAMES, TEMPLATES).averaged()
    with torch.no_grad():
        outputs = model(**processor(images=pictures))
        expected = zero_shot_scores(
            outputs.image_embeds,
            text_embeds,
            model.logit_scale.exp(),
            outputs.patch_embeds,
            concept_embeds,
            model.concept_logit_scale.exp(),
        )
    assert scores.mixed_scores.shape == (5, 3)
    assert np.allclose(scores.mixed_scores, expected.mixed_scores, atol=1e-5)
    assert np.allclose(scores.mixed_scores.sum(axis=1), 1.0)


def test_a_model_without_patch_heads_scores_globally(processor, pictures):
    scores = classify_images(make_model(processor, has_patch_heads=False), processor, pictures, NAMES, TEMPLATES)
    assert scores.local_scores is None
    assert np.array_equal(scores.mixed_scores, scores.global_scores)


def test_an_image_that_cannot_be_read_is_named_and_has_no_row(model, processor, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n not much of a picture")
    images = (image for image in [pictures[0], broken, pictures[1]])
    scores = classify_images(model, processor, images, NAMES, TEMPLATES)
    assert scores.mixed_scores.shape == (2, 3)
    ((position, reason),) = scores.unreadable
    assert position == 1
    assert "broken.png" in reason


def test_no_readable_image_is_an_error(model, processor, tmp_path):
    with pytest.raises(ValueError, match=r"no image could be scored.*missing\.png"):
        classify_images(model, processor, [tmp_path / "missing.png"], NAMES)
    with pytest.raises(ValueError, match="none was given"):
        classify_images(model, processor, [], NAMES)


def test_scoring_is_free_of_dropout_and_leaves_the_model_in_its_mode(model, processor, pictures):
    model.train()
    first = classify_images(model, processor, pictures, NAMES)
    assert model.training
    model.eval()
    assert np.array_equal(first.mixed_scores, classify_images(model, processor, pictures, NAMES).mixed_scores)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["{}"], "at least one class"),
        (["cyst"], [], "at least one class"),
        (["cyst", "cyst"], ["{}"], "different"),
        ([" "], ["{}"], "not empty"),
        ("cyst", ["{}"], "lists of strings"),
        (["cyst"], ["no slot"], "exactly once"),
        (["cyst"], ["{} and {}"], "exactly once"),
        (["cyst"], ["radiograph " * 80 + "{}"], "token limit"),
    ],
)
def test_prompts_that_cannot_be_embedded_are_refused(model, processor, names, templates, message):
    with pytest.raises(ValueError, match=message):
        embed_classes(model, processor, names, templates)


def test_braces_in_a_class_name_are_only_text(model, processor):
    assert embed_classes(model, processor, ["cyst {0}"], ["{} seen"]).text_embeds.shape == (1, 1, 16)
