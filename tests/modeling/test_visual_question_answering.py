"""ConceptCLIP's head for visual question answering: what it computes, trains, refuses and keeps."""

import pytest
import torch

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel
from medclip_hf.modeling.conceptclip.visual_question_answering_conceptclip import (
    ConceptCLIPForVisualQuestionAnswering,
    ConceptCLIPVisualQuestionAnsweringConfig,
)

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
VISION = {**SIZES, "hidden_size": 16, "image_size": 12, "patch_size": 4, "hidden_act": "gelu"}
TEXT = {**SIZES, "vocab_size": 20, "hidden_size": 8, "max_position_embeddings": 10}
CROSS = {**SIZES, "hidden_size": 12, "num_hidden_layers": 2}
ANSWERS = ["no", "yes", "left lung"]


def make_base(**more) -> ConceptCLIPModel:
    torch.manual_seed(0)
    return ConceptCLIPModel(ConceptCLIPConfig(text_config=TEXT, vision_config=VISION, **more)).eval()


@pytest.fixture(scope="module")
def base() -> ConceptCLIPModel:
    return make_base()


@pytest.fixture(scope="module")
def model(base) -> ConceptCLIPForVisualQuestionAnswering:
    torch.manual_seed(1)
    return ConceptCLIPForVisualQuestionAnswering.from_conceptclip(base, ANSWERS, cross_modal_config=CROSS).eval()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "input_ids": torch.tensor([[2, 7, 8, 3, 0, 0], [2, 9, 5, 6, 4, 3]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]),
        "pixel_values": torch.randn(2, 3, 12, 12, generator=generator),
    }


def test_the_defaults_are_the_published_sizes():
    config = ConceptCLIPVisualQuestionAnsweringConfig()
    cross = config.cross_modal_config
    assert (cross.num_hidden_layers, cross.hidden_size, cross.num_attention_heads) == (6, 768, 12)
    assert (cross.intermediate_size, cross.hidden_dropout_prob) == (3072, 0.1)
    assert config.vision_config.hidden_size == 1152


def test_it_starts_from_the_weights_of_a_conceptclip(base, model):
    weights = base.state_dict()
    shared = [name for name in model.state_dict() if name in weights]
    assert any(name.startswith("patch_projection") for name in shared)
    for name in shared:
        assert torch.equal(model.state_dict()[name], weights[name]), name
    assert model.config.answers == tuple(ANSWERS)


def test_a_model_of_the_first_stage_serves_without_projections(inputs):
    first_stage = make_base(use_patch_concept_alignment=False)
    model = ConceptCLIPForVisualQuestionAnswering.from_conceptclip(first_stage, ANSWERS, cross_modal_config=CROSS)
    assert not model.config.project_tokens
    assert model(**inputs).logits.shape == (2, 3)


def test_the_answer_depends_on_both_image_and_question(model, inputs):
    logits = model(**inputs).logits
    other_image = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}).logits
    other_words = model(**{**inputs, "input_ids": inputs["input_ids"].where(inputs["input_ids"] != 7, 11)}).logits
    assert not torch.allclose(logits, other_image)
    assert not torch.allclose(logits[0], other_words[0])
    assert torch.allclose(logits[1], other_words[1])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_changes_nothing_on_either_side(base, inputs, attention):
    torch.manual_seed(1)
    model = ConceptCLIPForVisualQuestionAnswering.from_conceptclip(base, ANSWERS, cross_modal_config=CROSS).eval()
    model.set_attn_implementation(attention)
    padded = model(**inputs).logits[:1]
    short = {"input_ids": inputs["input_ids"][:1, :4], "pixel_values": inputs["pixel_values"][:1]}
    torch.testing.assert_close(padded, model(**short).logits)
    left = {
        "input_ids": torch.tensor([[0, 0, 2, 7, 8, 3]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]]),
        "position_ids": torch.tensor([[0, 0, 0, 1, 2, 3]]),
        "pixel_values": inputs["pixel_values"][:1],
    }
    torch.testing.assert_close(padded, model(**left).logits)


def test_the_loss_is_the_mean_over_questions_with_a_known_answer(model, inputs):
    logits = model(**inputs).logits
    both = model(**inputs, labels=torch.tensor([1, 2])).loss
    torch.testing.assert_close(both, torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2])))
    one = model(**inputs, labels=torch.tensor([1, -100])).loss
    torch.testing.assert_close(one, torch.nn.functional.cross_entropy(logits[:1], torch.tensor([1])))
    assert model(**inputs, labels=torch.tensor([-100, -100])).loss == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient(base, inputs, checkpointing):
    model = ConceptCLIPForVisualQuestionAnswering.from_conceptclip(base, ANSWERS, cross_modal_config=CROSS).train()
    if checkpointing:
        # The name of transformers 5.23, and the one before it.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_it_is_saved_and_loaded_with_its_answers(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = ConceptCLIPForVisualQuestionAnswering.from_pretrained(tmp_path)
    assert loaded.config.answers == tuple(ANSWERS)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pixel_values": torch.zeros(2, 3, 8, 8)}, "pixel_values should be"),
        ({"pixel_values": torch.zeros(1, 3, 12, 12)}, "Each question needs its image"),
        ({"input_ids": torch.ones(2, 11, dtype=torch.long), "attention_mask": None}, "1 to 10 tokens"),
        ({"input_ids": torch.ones(2, 0, dtype=torch.long), "attention_mask": None}, "1 to 10 tokens"),
        ({"attention_mask": torch.ones(2, 3, dtype=torch.long)}, "attention_mask should be"),
        ({"labels": torch.tensor([0, 3])}, "labels hold 3, but the vocabulary has 3 answers"),
        ({"labels": torch.tensor([[0], [1]])}, "labels should be"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model, inputs, change, told):
    with pytest.raises(ValueError, match=told):
        model(**{**inputs, **change})


@pytest.mark.parametrize("answers", [[], ["yes", "yes"], ["yes", " "]])
def test_a_vocabulary_that_cannot_serve_is_refused(base, answers):
    with pytest.raises(ValueError, match="answers must be different"):
        ConceptCLIPForVisualQuestionAnswering.from_conceptclip(base, answers)


def test_the_configuration_says_how_wide_fresh_layers_start(base):
    cross = {**CROSS, "hidden_size": 64, "initializer_range": 0.3}
    model = ConceptCLIPForVisualQuestionAnswering.from_conceptclip(base, ANSWERS, cross_modal_config=cross)
    for layer in (model.image_layers[0].cross_attention.self.query, model.text_pooler, model.stream_embedding):
        assert layer.weight.std().item() == pytest.approx(0.3, rel=0.2)


def test_it_learns_to_answer_by_image_and_question_together():
    """Is the image of the colour that the question names? Neither alone tells: of all sixteen pairs four are right."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 32}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = ConceptCLIPConfig(
        text_config={**sizes, **no_dropout, "vocab_size": 12, "max_position_embeddings": 8},
        vision_config={**sizes, "image_size": 4, "patch_size": 2, "hidden_act": "gelu"},
    )
    cross = {**sizes, **no_dropout, "initializer_range": 0.3}
    model = ConceptCLIPForVisualQuestionAnswering.from_conceptclip(
        ConceptCLIPModel(config), ["no", "yes"], cross_modal_config=cross
    )
    colours = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0], [1.0, 1.0, 1.0]])
    shown, asked = (index.flatten() for index in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
    everything = {
        "pixel_values": colours[shown][:, :, None, None].expand(-1, -1, 4, 4),
        "input_ids": torch.stack([torch.full_like(asked, 2), asked + 5, torch.full_like(asked, 3)], dim=1),
        "labels": (shown == asked).long(),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    for _ in range(100):
        optimizer.zero_grad()
        model(**everything).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    answers = model.eval()(**everything).logits.argmax(dim=-1)
    assert torch.equal(answers, everything["labels"])
