"""ConceptCLIP's head: what its logits rest on, what its loss counts, and how it starts from a pre-trained model."""

import pytest
import torch
from torch.nn import functional as F

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel
from medclip_hf.modeling.conceptclip.image_classification_conceptclip import (
    ConceptCLIPForImageClassification,
    classification_loss,
)

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
LABELS = {0: "normal", 1: "effusion", 2: "mass"}


def config(**fields):
    return ConceptCLIPConfig(
        text_config={**SIZES, "vocab_size": 20, "hidden_size": 8},
        vision_config={**SIZES, "hidden_size": 16, "image_size": 12, "patch_size": 4},
        **fields,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    ConceptCLIPModel(config()).save_pretrained(folder)
    return folder


@pytest.fixture
def model(base):
    torch.manual_seed(1)
    return ConceptCLIPForImageClassification.from_pretrained(base, id2label=LABELS).eval()


def pixels(num=2):
    return torch.randn(num, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def test_from_a_pretrained_model_the_tower_is_the_same_and_the_text_tower_is_gone(model, base):
    pretrained = ConceptCLIPModel.from_pretrained(base).eval()
    torch.testing.assert_close(
        model(pixel_values=pixels()).image_embeds, pretrained(pixel_values=pixels()).image_embeds
    )
    assert not hasattr(model, "text_model")
    assert model.config.num_labels == 3


def test_logits_are_linear_in_the_scaled_embedding(model):
    output = model(pixel_values=pixels())
    torch.testing.assert_close(output.logits, F.linear(output.image_embeds * 4.0, *model.classifier.parameters()))


def test_an_embedding_stands_for_its_image(model):
    seen = model(pixel_values=pixels())
    torch.testing.assert_close(model(image_embeds=seen.image_embeds).logits, seen.logits)


def test_a_saved_classifier_loads_with_its_labels_and_equal_logits(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = ConceptCLIPForImageClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.id2label == LABELS
    torch.testing.assert_close(
        loaded(pixel_values=pixels()).logits, model(pixel_values=pixels()).logits, rtol=0, atol=0
    )


def test_every_parameter_gets_a_gradient_and_checkpointing_gives_the_same(model):
    labels = torch.tensor([0, 2])
    model.train()(pixel_values=pixels(), labels=labels).loss.backward()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    # The name of transformers 5.23, and the one before it.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    model(pixel_values=pixels(), labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


def test_the_loss_of_a_single_label_is_weighted_cross_entropy_without_unknown_ones():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, -100, 1])
    weights = torch.tensor([1.0, 2.0, 3.0])
    expected = F.cross_entropy(logits, labels, weights)
    torch.testing.assert_close(classification_loss(logits, labels, "single_label_classification", weights), expected)


def test_the_loss_of_several_labels_leaves_unknown_ones_out():
    logits = torch.tensor([[0.0, 5.0], [1.0, 0.0]])
    labels = torch.tensor([[1, -100], [0, -100]])
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(classification_loss(logits, labels, "multi_label_classification"), expected)


def test_without_a_known_label_the_loss_is_0_and_has_a_gradient():
    logits = torch.randn(2, 3, requires_grad=True)
    for labels, kind in ((torch.full((2,), -100), "single"), (torch.full((2, 3), -100), "multi")):
        loss = classification_loss(logits, labels, f"{kind}_label_classification")
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(logits.grad, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(), "Exactly one"),
        (lambda m: m(pixel_values=torch.zeros(1, 3, 8, 8)), r"\(B, 3, 12, 12\)"),
        (lambda m: m(pixel_values=pixels(), labels=torch.zeros(2, 2)), "labels for single_label"),
    ],
)
def test_what_does_not_fit_is_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_an_unknown_kind_of_problem_is_refused():
    with pytest.raises(ValueError, match="problem_type"):
        classification_loss(torch.zeros(1, 2), torch.zeros(1), "regression")
