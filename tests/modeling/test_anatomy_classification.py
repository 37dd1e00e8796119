"""fVLM's head: each finding from its own anatomy, nothing from anatomies that are missing."""

import pytest
import torch
from torch.nn import functional as F

from medclip_hf import FVLMConfig, FVLMModel
from medclip_hf.modeling.fvlm.anatomy_classification_fvlm import FVLMForAnatomyClassification, finding_loss

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
FINDINGS = {"nodule": "lung", "cardiomegaly": "heart", "emphysema": "lung"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    vision = {**SIZES, "hidden_size": 16, "image_size_dhw": (8, 8, 8), "patch_size_dhw": (4, 4, 4)}
    config = FVLMConfig(
        text_config={**SIZES, "vocab_size": 20, "hidden_size": 8},
        vision_config=vision,
        feature_layers=(0,),
        projection_dim=8,
        anatomies=("lung", "heart"),
        pooling_num_attention_heads=2,
    )
    folder = tmp_path_factory.mktemp("base")
    FVLMModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def model(base):
    torch.manual_seed(1)
    return FVLMForAnatomyClassification.from_pretrained(base, findings=FINDINGS).eval()


@pytest.fixture
def scans():
    """Two volumes; the second has no heart."""
    mask = torch.zeros(2, 8, 8, 8, dtype=torch.uint8)
    mask[:, 1:3] = 1
    mask[0, 5:7] = 2
    return {"pixel_values": torch.rand(2, 1, 8, 8, 8), "anatomy_mask": mask}


def test_each_finding_rests_on_the_embedding_of_its_anatomy(model, base, scans):
    output = model(**scans)
    expected = FVLMModel.from_pretrained(base).eval()(**scans).anatomy_embeds
    torch.testing.assert_close(output.anatomy_embeds, expected)
    weight, bias = model.classifier.weight, model.classifier.bias
    heart = F.linear(output.anatomy_embeds[0, 1] * 8**0.5, weight[1:2], bias[1:2])
    torch.testing.assert_close(output.logits[0, 1:2], heart)


def test_a_missing_anatomy_has_no_logit_and_no_part_in_the_loss(model, scans):
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    output = model(**scans, labels=labels)
    assert output.logits.isnan().tolist() == [[False] * 3, [False, True, False]]
    others = torch.tensor([[1, 0, 1], [0, 0, 0]])
    torch.testing.assert_close(output.loss, model(**scans, labels=others).loss)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_an_anatomy_that_a_crop_cuts_has_no_part_in_the_loss(model, scans):
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    complete = torch.tensor([[True, False], [True, True]])
    loss = model(**scans, labels=labels, is_complete=complete).loss
    known = model(**scans).logits[:, [0, 2]]
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(known, labels[:, [0, 2]].float()))


def test_embeddings_of_windows_stand_for_the_volume(model, scans):
    seen = model(**scans)
    embeds = seen.anatomy_embeds.detach().clone()
    embeds[1, 1] = torch.nan  # as a scan without a heart is embedded
    torch.testing.assert_close(model(anatomy_embeds=embeds).logits, seen.logits, equal_nan=True)


def test_every_parameter_gets_a_gradient(model, scans):
    torch.nn.init.normal_(model.anatomy_heads[0].query)
    torch.nn.init.normal_(model.anatomy_heads[1].query)
    model(**scans, labels=torch.ones(2, 3).long()).loss.backward()
    without = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert without == []


def test_a_saved_model_loads_with_its_findings_and_equal_logits(model, scans, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = FVLMForAnatomyClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.findings == FINDINGS
    assert list(loaded.config.id2label.values()) == list(FINDINGS)
    torch.testing.assert_close(loaded(**scans).logits, model(**scans).logits, rtol=0, atol=0, equal_nan=True)


def test_unknown_labels_leave_the_loss_and_weights_are_of_the_positives():
    logits, labels = torch.tensor([[1.0, torch.nan], [2.0, 3.0]]), torch.tensor([[1, 1], [0, -100]])
    weights = torch.tensor([4.0, 9.0])
    expected = (4 * F.softplus(torch.tensor(-1.0)) + F.softplus(torch.tensor(2.0))) / 2
    torch.testing.assert_close(finding_loss(logits, labels, weights), expected)


@pytest.mark.parametrize(("findings", "message"), [({"cyst": "kidney"}, r"\['lung', 'heart'\]"), (None, "findings=")])
def test_findings_without_an_anatomy_of_the_model_are_refused(base, findings, message):
    with pytest.raises(ValueError, match=message):
        FVLMForAnatomyClassification.from_pretrained(base, findings=findings)


def test_volumes_and_embeddings_together_are_refused(model, scans):
    with pytest.raises(ValueError, match="Exactly one"):
        model(**scans, anatomy_embeds=torch.zeros(2, 2, 8))
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        model(**scans, labels=torch.zeros(2, 2))
