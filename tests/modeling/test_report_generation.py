"""ConceptCLIP's and fVLM's heads for report generation: what is read, trained and kept."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, FVLMConfig, FVLMModel
from medclip_hf.modeling.conceptclip.report_generation_conceptclip import (
    ConceptCLIPForReportGeneration,
    ConceptCLIPReportGenerationConfig,
)
from medclip_hf.modeling.fvlm.report_generation_fvlm import FVLMForReportGeneration, FVLMReportGenerationConfig

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
VISION = {**SIZES, "hidden_size": 16, "image_size": 12, "patch_size": 4, "hidden_act": "gelu"}
TEXT = {**SIZES, "vocab_size": 20, "hidden_size": 8, "max_position_embeddings": 10}
CT_VISION = {**SIZES, "hidden_size": 12, "image_size_dhw": (4, 4, 4), "patch_size_dhw": (2, 2, 2)}
ANATOMIES = ("lung", "heart", "aorta")
ROPE = {**SIZES, "vocab_size": 30, "hidden_size": 8, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
LANGUAGE = {
    "gpt2": GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2),
    "llama": LlamaConfig(**ROPE, pad_token_id=0),
    "qwen2": Qwen2Config(**{**ROPE, "bos_token_id": None}, tie_word_embeddings=True),
}
TEXT_INPUTS = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 2], [5, 6, 9, 2, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
    "labels": torch.tensor([[-100, -100, 7, 8, 2], [-100, -100, 9, 2, -100]]),
}


def make_image_model(language: str = "llama") -> ConceptCLIPForReportGeneration:
    torch.manual_seed(0)
    config = ConceptCLIPReportGenerationConfig(vision_config=VISION, text_config=LANGUAGE[language].to_dict())
    return ConceptCLIPForReportGeneration(config).eval()


def make_ct_model(language: str = "llama") -> FVLMForReportGeneration:
    torch.manual_seed(0)
    fvlm = FVLMConfig(
        text_config=TEXT,
        vision_config=CT_VISION,
        anatomies=ANATOMIES,
        projection_dim=6,
        feature_layers=(0,),
        pooling_num_attention_heads=2,
    )
    return FVLMForReportGeneration(
        FVLMReportGenerationConfig(fvlm_config=fvlm, text_config=LANGUAGE[language].to_dict())
    ).eval()


def image_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {**TEXT_INPUTS, "pixel_values": torch.randn(2, 2, 3, 12, 12, generator=generator)}


def ct_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(2, 4, 4, 4, dtype=torch.uint8)
    mask[:, :2], mask[0, 2:, :2], mask[0, 2:, 2:] = 1, 2, 3
    return {**TEXT_INPUTS, "pixel_values": torch.rand(2, 1, 4, 4, 4, generator=generator), "anatomy_mask": mask}


KINDS = [pytest.param(make_image_model, image_inputs, id="images"), pytest.param(make_ct_model, ct_inputs, id="ct")]


@pytest.mark.parametrize(("make", "inputs"), KINDS)
@pytest.mark.parametrize("language", list(LANGUAGE))
def test_the_loss_is_that_of_the_tokens_predicted_one_by_one(make, inputs, language):
    model, given = make(language), inputs()
    picture = {name: value for name, value in given.items() if name not in TEXT_INPUTS}
    outputs = model(**given)
    for row, ids in enumerate([[5, 6, 7, 8, 2], [5, 6, 9, 2]]):
        alone = {name: value[row : row + 1] for name, value in picture.items()}
        total = 0.0
        for place in range(2, len(ids)):
            # The last row of logits is the prediction of the token behind a text that ends there.
            text = torch.tensor([[*ids[:place], 0]])
            log_probabilities = model(**alone, input_ids=text).logits[0, -1].log_softmax(-1)
            total -= float(log_probabilities.detach()[ids[place]])
        assert outputs.sample_losses[row].item() == pytest.approx(total, rel=1e-4)
    assert outputs.num_tokens.tolist() == [3, 2]
    torch.testing.assert_close(outputs.loss, outputs.sample_losses.sum() / 5)


@pytest.mark.parametrize(("make", "inputs"), KINDS)
@pytest.mark.parametrize("language", list(LANGUAGE))
def test_generation_follows_the_prompt_greedily_whatever_its_padding(make, inputs, language):
    model, given = make(language), inputs()
    picture = {name: value for name, value in given.items() if name not in TEXT_INPUTS}
    generated = model.generate(
        **picture,
        input_ids=torch.tensor([[5, 6, 7], [5, 6, 0]]),
        attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]),
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=2,
    )
    for row, prompt in enumerate([[5, 6, 7], [5, 6]]):
        alone = {name: value[row : row + 1] for name, value in picture.items()}
        text = list(prompt)
        for _ in range(3):
            logits = model(**alone, input_ids=torch.tensor([[*text, 0]])).logits[0, -1].clone()
            logits[2] = -torch.inf  # no end before the third token
            text.append(int(logits.argmax()))
        assert generated[row].tolist() == text[len(prompt) :]


@pytest.mark.parametrize(("make", "inputs"), KINDS)
def test_the_report_depends_on_the_picture(make, inputs):
    model, given = make(), inputs()
    other = {**given, "pixel_values": given["pixel_values"].flip(0)}
    assert not torch.allclose(model(**given).logits[0], model(**other).logits[0])


@pytest.mark.parametrize(("make", "inputs"), KINDS)
def test_only_the_projection_is_trained_and_frozen_parts_use_no_dropout(make, inputs):
    model, given = make("gpt2"), inputs()
    model.freeze_towers_()
    model.train()
    assert not model.language_model.training
    assert model.language_projection.training
    first, second = model(**given).loss, model(**given).loss
    assert torch.equal(first, second)
    first.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {f"language_projection.{name}" for name, _ in model.language_projection.named_parameters()}


@pytest.mark.parametrize(("make", "inputs"), KINDS)
def test_adapters_of_the_language_model_are_trained_beside_the_projection_and_merge(make, inputs):
    model, given = make(), inputs()
    model.freeze_towers_()
    adapted = get_peft_model(
        model,
        LoraConfig(r=2, target_modules=r"language_model\..*\.(q_proj|v_proj)", modules_to_save=["language_projection"]),
    )
    adapted.train()
    adapted(**given).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert any("language_model" in name for name in trained)
    adapted.eval()
    before = adapted(**given).logits
    merged = adapted.merge_and_unload()
    assert type(merged) is type(model)
    torch.testing.assert_close(merged(**given).logits, before)


@pytest.mark.parametrize(("make", "inputs"), KINDS)
@pytest.mark.parametrize("language", list(LANGUAGE))
def test_it_is_saved_and_loaded_whole(make, inputs, language, tmp_path):
    model, given = make(language), inputs()
    model.config.prompt = "Describe the scan: "
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.prompt == "Describe the scan: "
    assert torch.equal(loaded(**given).logits, model(**given).logits)


def test_views_that_do_not_stand_change_nothing_and_the_others_are_averaged():
    model, given = make_image_model(), image_inputs()
    pixel_values = given["pixel_values"]
    embeds, _ = model.embed_study(pixel_values, torch.tensor([[True, True], [True, False]]))
    torch.testing.assert_close(embeds[1:], model.embed_study(pixel_values[1:, 0])[0])
    patches = model.vision_model(pixel_values[0]).last_hidden_state.mean(dim=0)
    torch.testing.assert_close(embeds[0], model.language_projection(patches))
    every = torch.ones(2, 2, dtype=torch.bool)
    torch.testing.assert_close(model.embed_study(pixel_values)[0], model.embed_study(pixel_values, every)[0])


def test_a_study_without_a_view_mask_waits_for_no_number_of_the_device():
    embeds, _ = make_image_model().to("meta").embed_study(image_inputs()["pixel_values"].to("meta"))  # has no numbers
    assert embeds.shape == (2, 9, 8)


def test_an_anatomy_that_is_absent_is_not_read():
    model, given = make_ct_model(), ct_inputs()
    _, mask = model.embed_scan(given["pixel_values"], given["anatomy_mask"])
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    before = model(**given).logits[1]
    with torch.no_grad():
        model.language_projection.anatomy_embedding.weight[1:] += 1.0
    torch.testing.assert_close(model(**given).logits[1], before)


def test_models_start_from_saved_towers_and_a_saved_language_model(tmp_path):
    language = AutoModelForCausalLM.from_config(LANGUAGE["gpt2"])
    language.save_pretrained(tmp_path / "language")
    base = ConceptCLIPModel(ConceptCLIPConfig(text_config=TEXT, vision_config=VISION))
    base.save_pretrained(tmp_path / "conceptclip")
    fvlm = make_ct_model().fvlm
    FVLMModel.save_pretrained(fvlm, tmp_path / "fvlm")
    images = ConceptCLIPForReportGeneration.from_vision_language_pretrained(
        tmp_path / "conceptclip", tmp_path / "language", prompt="Report: "
    )
    ct = FVLMForReportGeneration.from_fvlm_language_pretrained(tmp_path / "fvlm", tmp_path / "language")
    assert images.config.prompt == "Report: "
    for model in (images, ct):
        assert torch.equal(model.language_model.transformer.wte.weight, language.transformer.wte.weight)
        model.save_pretrained(tmp_path / "saved")
        type(model).from_pretrained(tmp_path / "saved")
    patch_weight = "embeddings.patch_embedding.weight"
    assert torch.equal(images.vision_model.get_parameter(patch_weight), base.vision_model.get_parameter(patch_weight))
    assert torch.equal(ct.fvlm.text_projection.weight, fvlm.text_projection.weight)


@pytest.mark.parametrize("language", list(LANGUAGE))
@pytest.mark.parametrize("kind", ["images", "ct"])
def test_a_token_is_predicted_without_those_that_follow_it_in_models_put_together_too(kind, language):
    torch.manual_seed(0)
    given = AutoModelForCausalLM.from_config(copy.deepcopy(LANGUAGE[language]))
    if kind == "images":
        tower = ConceptCLIPModel(ConceptCLIPConfig(text_config=TEXT, vision_config=VISION))
        model = ConceptCLIPForReportGeneration.from_vision_language_pretrained(tower, given).eval()
    else:
        model = FVLMForReportGeneration.from_fvlm_language_pretrained(make_ct_model().fvlm, given).eval()
    inputs = image_inputs() if kind == "images" else ct_inputs()
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, 3:] = 11
    before, after = model(**inputs).logits, model(**other).logits
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[0, 4], after[0, 4])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pixel_values": torch.zeros(2, 3, 8, 8)}, "pixel_values should be"),
        ({"view_mask": torch.tensor([[True, True], [False, False]])}, "at least one view a study"),
        ({"labels": torch.zeros(2, 3, dtype=torch.long)}, "labels should be"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask should be"),
        ({"input_ids": torch.ones(3, 5, dtype=torch.long), "labels": None}, "one row a study"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, told):
    with pytest.raises(ValueError, match=told):
        make_image_model()(**{**image_inputs(), **change})


@pytest.mark.parametrize(("make", "inputs"), KINDS)
@pytest.mark.parametrize("language", list(LANGUAGE))
def test_the_language_model_can_learn_further_words(make, inputs, language, tmp_path):
    model = make(language)
    model.resize_token_embeddings(40)
    assert model(**inputs()).logits.shape[-1] == 40
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    words, head = again.get_input_embeddings().weight, again.get_output_embeddings().weight
    assert (words is head) == again.language_model.config.tie_word_embeddings
    torch.testing.assert_close(again(**inputs()).logits, model(**inputs()).logits, rtol=0, atol=0)
