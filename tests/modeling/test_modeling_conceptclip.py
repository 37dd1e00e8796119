"""ConceptCLIP's network: its equations, its manners as a transformers model, its refusals."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import BertConfig, BertModel, SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel
from medclip_hf.modeling.conceptclip import ConceptCLIPOutput

TEXT = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 20,
    "patch_size": 6,  # 3 x 3 patches; the last 2 rows and columns of pixels are dropped
    "hidden_act": "gelu",
}


def tiny_model(**kwargs) -> ConceptCLIPModel:
    torch.manual_seed(0)
    return ConceptCLIPModel(ConceptCLIPConfig(text_config=TEXT, vision_config=VISION, **kwargs)).eval()


@pytest.fixture
def model() -> ConceptCLIPModel:
    return tiny_model()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three pairs with 2, 1 and 0 concepts."""
    torch.manual_seed(1)
    input_ids = torch.randint(5, 50, (3, 8))
    input_ids[1, 5:] = 0
    return {
        "input_ids": input_ids,
        "pixel_values": torch.randn(3, 3, 20, 20),
        "concept_token_spans": torch.tensor([[[1, 3], [2, 6]], [[3, 4], [0, 0]], [[0, 0], [0, 0]]]),
        "concept_mask": torch.tensor([[True, True], [True, False], [False, False]]),
    }


# Architecture ----------------------------------------------------------------------------------------------------


def test_the_default_is_the_published_architecture():
    config = ConceptCLIPConfig()
    with torch.device("meta"):
        model = ConceptCLIPModel(config)
    assert sum(p.numel() for p in model.parameters()) == 542_868_036
    assert config.vision_config.hidden_act == "gelu"
    assert config.vision_config.layer_norm_eps == 1e-6
    assert config.text_config.layer_norm_eps == 1e-12


def test_scalars_start_at_the_configured_values():
    model = tiny_model(concept_logit_scale_init_value=1.0, concept_logit_bias_init_value=-3)
    assert model.logit_scale.shape == (1,)
    torch.testing.assert_close(model.logit_scale.exp(), torch.tensor([1 / 0.07]))
    assert model.logit_bias.item() == -10
    assert model.concept_logit_scale.item() == 1
    assert model.concept_logit_bias.item() == -3


def test_stage_one_has_no_parameters_of_stage_two():
    names = {name.split(".")[0] for name, _ in tiny_model(use_patch_concept_alignment=False).named_parameters()}
    assert names == {"vision_model", "text_model", "text_projection", "logit_scale", "logit_bias"}


@pytest.mark.parametrize("is_second_stage", [False, True])
@pytest.mark.parametrize("has_spans", [False, True])
def test_every_parameter_gets_a_gradient_in_either_stage(batch, is_second_stage, has_spans):
    model = tiny_model(use_patch_concept_alignment=is_second_stage)
    if not has_spans:
        batch = {name: batch[name] for name in ("input_ids", "pixel_values")}
    model(**batch, return_loss=True).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


# Equations -------------------------------------------------------------------------------------------------------


def test_text_embedding_is_the_projected_mean_over_real_tokens_with_cls_and_sep(model, batch):
    hidden = model.text_model(batch["input_ids"], attention_mask=batch["input_ids"] != 0).last_hidden_state
    mean = hidden[1, :5].mean(dim=0)
    expected = F.normalize(mean @ model.text_projection.weight.T, dim=-1)
    torch.testing.assert_close(model(batch["input_ids"]).text_embeds[1], expected)


def test_padding_changes_no_text_embedding(model, batch):
    padded = F.pad(batch["input_ids"], (0, 4))
    torch.testing.assert_close(model(padded).text_embeds, model(batch["input_ids"]).text_embeds)


def test_a_given_attention_mask_is_honoured(model, batch):
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 5:] = 0
    shortened = model(batch["input_ids"][:, :5], attention_mask=mask[:, :5]).text_embeds
    torch.testing.assert_close(model(batch["input_ids"], attention_mask=mask).text_embeds, shortened)


def test_logits_hold_scale_and_bias(model, batch):
    with torch.no_grad():
        model.logit_scale.fill_(1.0)
        model.logit_bias.fill_(-2.0)
    outputs = model(**batch)
    expected = outputs.image_embeds @ outputs.text_embeds.T * torch.e - 2
    torch.testing.assert_close(outputs.logits_per_image, expected)
    torch.testing.assert_close(outputs.logits_per_text, expected.T)


def test_images_and_texts_may_differ_in_number(model, batch):
    outputs = model(batch["input_ids"], batch["pixel_values"][:1])
    assert outputs.logits_per_image.shape == (1, 3)


def test_concept_embeddings_are_normalised_span_means_of_projected_tokens_and_zero_where_masked(model, batch):
    outputs = model(**batch)
    tokens = model.token_projection(outputs.text_model_output.last_hidden_state)
    torch.testing.assert_close(outputs.concept_embeds[0, 1], F.normalize(tokens[0, 2:6].mean(0), dim=0))
    assert outputs.concept_embeds[1, 1].abs().sum() == 0
    assert outputs.concept_embeds[2].abs().sum() == 0


def test_concept_logits_compare_each_concept_with_its_best_patch_of_every_image(model, batch):
    outputs = model(**batch)
    best = torch.einsum("ipd,tcd->itcp", outputs.patch_embeds, outputs.concept_embeds).amax(-1)
    expected = best * outputs.concept_logit_scale + outputs.concept_logit_bias
    torch.testing.assert_close(outputs.concept_logits, expected)


def test_loss_is_the_weighted_sum_of_both_losses(batch):
    model = tiny_model(patch_concept_loss_weight=0.25)
    outputs = model(**batch, return_loss=True)
    torch.testing.assert_close(outputs.loss, outputs.image_text_loss + 0.25 * outputs.patch_concept_loss)
    z = 2 * torch.eye(3) - 1
    torch.testing.assert_close(outputs.image_text_loss, F.softplus(-z * outputs.logits_per_image).sum() / 3)
    own = torch.tensor([0, 0, 1])  # image of each of the three concepts
    logits = outputs.concept_logits[:, batch["concept_mask"]]
    z = torch.where(torch.arange(3)[:, None] == own, 1.0, -1.0)
    torch.testing.assert_close(outputs.patch_concept_loss, F.softplus(-z * logits).sum() / 3)


def test_the_same_concept_in_another_caption_is_no_negative_when_identities_are_given(model, batch):
    same = torch.tensor([[7, 8], [7, 0], [0, 0]])
    different = torch.tensor([[7, 8], [9, 0], [0, 0]])
    plain = model(**batch, return_loss=True).patch_concept_loss
    assert model(**batch, concept_ids=different, return_loss=True).patch_concept_loss == plain
    assert model(**batch, concept_ids=same, return_loss=True).patch_concept_loss < plain


def test_a_batch_without_concepts_has_no_patch_concept_loss(model, batch):
    batch["concept_mask"][:] = False
    assert model(**batch, return_loss=True).patch_concept_loss == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_text_without_tokens_stays_finite_with_its_gradients(model, batch, attention):
    model.set_attn_implementation(attention)
    batch["input_ids"][2] = 0
    outputs = model(**batch, return_loss=True)
    outputs.loss.backward()
    assert outputs.text_embeds.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_either_modality_alone_gives_what_both_give(model, batch):
    both = model(**batch)
    image = model(pixel_values=batch["pixel_values"])
    assert torch.equal(image.image_embeds, both.image_embeds)
    assert torch.equal(image.patch_embeds, both.patch_embeds)
    assert image.text_embeds is None
    assert image.logits_per_image is None
    text = model(**{name: value for name, value in batch.items() if name != "pixel_values"})
    assert torch.equal(text.text_embeds, both.text_embeds)
    assert torch.equal(text.concept_embeds, both.concept_embeds)
    assert text[0] is text.text_embeds


def test_logits_are_left_out_on_request(model, batch):
    outputs = model(**batch, return_logits=False)
    assert outputs.logits_per_image is None
    assert outputs.concept_logits is None
    assert outputs.image_embeds is not None


def test_scales_are_clamped_in_place_to_one_and_a_hundred(model):
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
        model.concept_logit_scale.fill_(-1.0)
    model.clamp_logit_scales_()
    torch.testing.assert_close(model.logit_scale.exp(), torch.tensor([100.0]))
    assert model.concept_logit_scale.item() == 0
    tiny_model(use_patch_concept_alignment=False).clamp_logit_scales_()


# Concept maps ----------------------------------------------------------------------------------------------------


def test_maps_hold_the_cosine_of_every_patch_by_row_and_column(model, batch):
    maps = model.get_concept_maps(**batch)
    outputs = model(**batch)
    assert maps.shape == (3, 2, 3, 3)
    patch = outputs.patch_embeds[0, 1 * 3 + 2]  # row 1, column 2
    torch.testing.assert_close(maps[0, 1, 1, 2], patch @ outputs.concept_embeds[0, 1])
    assert maps[2].abs().sum() == 0


def test_maps_of_larger_images_have_more_rows_and_columns(model, batch):
    pixels = torch.randn(1, 3, 24, 43)
    ids = batch["input_ids"][:1]
    maps = model.get_concept_maps(pixels, ids, interpolate_pos_encoding=True)
    assert maps.shape == (1, 1, 4, 7)


def test_concepts_of_other_texts_are_looked_for_in_every_image(model, batch):
    concepts = model.get_concept_embeds(
        batch["input_ids"],
        concept_token_spans=batch["concept_token_spans"],
        concept_mask=batch["concept_mask"],
    )
    maps = model.get_concept_maps(batch["pixel_values"], concept_embeds=concepts.flatten(0, 1))
    assert maps.shape == (3, 6, 3, 3)
    torch.testing.assert_close(maps[1, 2:4], model.get_concept_maps(**batch)[1])


@pytest.mark.parametrize("side", ["right", "left"])
def test_without_spans_a_whole_text_but_cls_and_sep_is_one_concept(model, side):
    ids = torch.tensor([[2, 7, 8, 9, 3, 0, 0], [2, 6, 3, 0, 0, 0, 0]])
    lengths = [5, 3]
    if side == "left":
        ids = torch.stack([row.roll(7 - length) for row, length in zip(ids, lengths, strict=True)])
    first = [0, 0] if side == "right" else [2, 4]
    spans = torch.tensor([[[f + 1, f + n - 1]] for f, n in zip(first, lengths, strict=True)])
    expected = model.get_concept_embeds(ids, concept_token_spans=spans)
    assert torch.equal(model.get_concept_embeds(ids), expected)
    torch.testing.assert_close(expected.norm(dim=-1), torch.ones(2, 1))


# Manners of a transformers model ---------------------------------------------------------------------------------


def test_features_are_outputs_with_pooled_vectors(model, batch):
    text = model.get_text_features(batch["input_ids"], output_hidden_states=True)
    assert text.pooler_output.shape == (3, 32)
    assert len(text.hidden_states) == 3
    image = model.get_image_features(batch["pixel_values"], return_dict=False)
    assert isinstance(image, tuple)
    assert image[1].shape == (3, 32)


def test_tuples_hidden_states_and_attentions_come_on_request(batch):
    model = tiny_model()
    model.set_attn_implementation("eager")
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(outputs.vision_model_output.hidden_states) == 3
    assert len(outputs.text_model_output.attentions) == 2
    as_tuple = model(**batch, return_dict=False)
    assert torch.equal(as_tuple[0], outputs.logits_per_image)


def test_a_config_that_asks_for_tuples_gets_them(batch):
    assert isinstance(tiny_model(return_dict=False)(**batch, return_loss=True), tuple)


def test_saved_and_loaded_again_it_gives_the_same_bits(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = ConceptCLIPModel.from_pretrained(tmp_path)
    before, after = model(**batch, return_loss=True), loaded(**batch, return_loss=True)
    for name in ("loss", "logits_per_image", "concept_logits", "patch_embeds"):
        assert torch.equal(before[name], after[name]), name


def test_weights_missing_from_a_checkpoint_start_as_in_a_new_model_and_others_stay(tmp_path):
    torch.manual_seed(0)
    wide = {**VISION, "hidden_size": 64, "intermediate_size": 128}
    model = ConceptCLIPModel(ConceptCLIPConfig(text_config=TEXT, vision_config=wide))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if name.startswith("text_") or name == "logit_bias"}
    kept["logit_bias"] = torch.tensor([4.0])
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = ConceptCLIPModel.from_pretrained(tmp_path)
    for name, value in kept.items():
        assert torch.equal(loaded.state_dict()[name], value), name
    fresh = dict(model.named_parameters())
    for name, value in loaded.named_parameters():
        assert value.isfinite().all(), name
        if name not in kept and fresh[name].numel() > 1000:
            torch.testing.assert_close(value.std(), fresh[name].std(), rtol=0.1, atol=0)
    assert loaded.concept_logit_bias.item() == -10
    assert torch.equal(loaded.vision_model.embeddings.position_ids, torch.arange(9)[None])


def test_the_second_stage_starts_from_a_checkpoint_of_the_first(batch, tmp_path):
    first = tiny_model(use_patch_concept_alignment=False)
    first.save_pretrained(tmp_path)
    second = ConceptCLIPModel.from_pretrained(tmp_path, use_patch_concept_alignment=True)
    assert torch.equal(second(**batch).image_embeds, first(**batch).image_embeds)
    torch.testing.assert_close(second.concept_logit_scale.exp(), torch.tensor([1 / 0.07]))
    assert second(**batch).concept_logits.isfinite().all()


def test_attention_implementations_agree(batch, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    results = {}
    for name in ("eager", "sdpa"):
        model = ConceptCLIPModel.from_pretrained(tmp_path, attn_implementation=name)
        assert model.vision_model.config._attn_implementation == name
        assert model.text_model.config._attn_implementation == name
        results[name] = model(**batch).logits_per_image
    torch.testing.assert_close(results["eager"], results["sdpa"])


def test_gradient_checkpointing_changes_no_gradient(model, batch):
    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**batch, return_loss=True).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = gradients()
    # The name of transformers 5.23, and the one before it.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    for tower in (model.vision_model, model.text_model):
        assert any(getattr(module, "gradient_checkpointing", False) for module in tower.modules())
    torch.testing.assert_close(gradients(), plain)


def test_word_embeddings_can_be_resized(model, batch):
    model.resize_token_embeddings(60)
    assert model.config.text_config.vocab_size == 60
    assert model.get_input_embeddings().weight.shape == (60, 24)
    assert model(batch["input_ids"] + 10).text_embeds.isfinite().all()


def test_it_loads_and_runs_in_bfloat16(batch, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = ConceptCLIPModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.text_model.dtype == model.vision_model.dtype == torch.bfloat16
    outputs = model(**batch, return_loss=True)
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert model.get_concept_maps(**batch).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_and_biases_stay_exact_in_half_precision(tmp_path, dtype):
    tiny_model(concept_logit_bias_init_value=-9.99).save_pretrained(tmp_path / "full")
    half = ConceptCLIPModel.from_pretrained(tmp_path / "full", dtype=dtype)
    assert half.logit_scale.item() == pytest.approx(math.log(1 / 0.07), abs=1e-6)
    assert half.concept_logit_bias.item() == pytest.approx(-9.99, abs=1e-6)
    half.save_pretrained(tmp_path / "half")  # the precision that is saved is that of the weights
    again = ConceptCLIPModel.from_pretrained(tmp_path / "half")
    assert half.dtype == again.dtype == again.config.dtype == again.vision_model.dtype == dtype
    assert again.logit_scale.dtype == torch.float32


def test_logits_are_computed_in_float32_under_autocast(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**batch, return_loss=True)
    torch.testing.assert_close(outputs.image_embeds.norm(dim=-1), torch.ones(3))
    expected = outputs.image_embeds @ outputs.text_embeds.T * outputs.logit_scale + outputs.logit_bias
    torch.testing.assert_close(outputs.logits_per_image, expected)
    assert outputs.loss.dtype == torch.float32


def shallow_model(**kwargs) -> ConceptCLIPModel:
    """One block a tower: the compiler follows every further block the same way, at the same price."""
    shallow = {"num_hidden_layers": 1}
    torch.manual_seed(0)
    return ConceptCLIPModel(ConceptCLIPConfig(text_config=TEXT | shallow, vision_config=VISION | shallow, **kwargs))


def test_the_forward_pass_compiles_without_a_graph_break(batch):
    model = shallow_model().eval()
    batch = {name: batch[name] for name in ("input_ids", "pixel_values")}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch).logits_per_image, model(**batch).logits_per_image)


def test_the_first_stage_compiles_with_its_loss(batch):
    model = shallow_model(use_patch_concept_alignment=False).eval()
    batch = {name: batch[name] for name in ("input_ids", "pixel_values")}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch, return_loss=True).loss, model(**batch, return_loss=True).loss)


def test_the_second_stage_compiles_with_its_logits_loss_and_gradients(batch):
    model = shallow_model().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    runs = []
    for run in (compiled, model):
        outputs = run(**batch, return_loss=True)
        gradients = torch.autograd.grad(outputs.loss, list(model.parameters()))
        runs.append((outputs.loss, outputs.logits_per_image, outputs.concept_logits, gradients))
    torch.testing.assert_close(runs[0], runs[1])


def test_it_exports(model, batch):
    with torch.no_grad():
        program = torch.export.export(model, args=(), kwargs=batch, strict=False)
        exported = program.module()(**batch)
    torch.testing.assert_close(exported.logits_per_image, model(**batch).logits_per_image)
    assert isinstance(exported, ConceptCLIPOutput)


def test_no_tensor_lives_outside_parameters_and_buffers(model):
    for name, module in model.named_modules():
        plain = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert plain == [], name


# Starting from two towers ----------------------------------------------------------------------------------------


@pytest.fixture
def tower_folders(tmp_path):
    torch.manual_seed(2)
    text_config = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    siglip = SiglipModel(
        SiglipConfig(vision_config={**VISION, "hidden_act": "gelu_pytorch_tanh"}, text_config=text_config)
    )
    siglip.save_pretrained(tmp_path / "siglip")
    siglip.vision_model.save_pretrained(tmp_path / "siglip_vision")
    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path / "bert")
    return tmp_path


@pytest.mark.parametrize("vision_folder", ["siglip", "siglip_vision"])
def test_it_starts_from_a_siglip_and_a_bert_folder(tower_folders, vision_folder):
    model = ConceptCLIPModel.from_vision_text_pretrained(
        tower_folders / vision_folder, tower_folders / "bert", patch_concept_loss_weight=0.3
    )
    vision = SiglipVisionModel.from_pretrained(tower_folders / "siglip_vision").state_dict()
    text = BertModel.from_pretrained(tower_folders / "bert", add_pooling_layer=False).state_dict()
    torch.testing.assert_close(dict(model.vision_model.state_dict()), dict(vision), rtol=0, atol=0)
    torch.testing.assert_close(dict(model.text_model.state_dict()), dict(text), rtol=0, atol=0)
    assert model.config.vision_config.hidden_act == "gelu_pytorch_tanh"
    assert model.config.patch_concept_loss_weight == 0.3
    assert model.text_model.config is model.config.text_config


def test_a_folder_that_lacks_weights_of_its_tower_is_refused(tower_folders):
    weights = load_file(tower_folders / "bert" / "model.safetensors")
    weights.pop("embeddings.word_embeddings.weight")
    save_file(weights, tower_folders / "bert" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"bert is no complete BertModel: 1 weights.*word_embeddings"):
        ConceptCLIPModel.from_vision_text_pretrained(tower_folders / "siglip", tower_folders / "bert")


# Refusals --------------------------------------------------------------------------------------------------------


def test_a_misspelt_configuration_key_is_refused_with_the_right_one():
    with pytest.raises(ValueError, match="Did you mean 'use_patch_concept_alignment'"):
        ConceptCLIPConfig(use_patch_concept_aligment=False)


def test_a_misspelt_key_in_a_saved_configuration_is_refused(tmp_path):
    config = ConceptCLIPConfig(text_config=TEXT, vision_config=VISION)
    values = config.to_dict()
    values["patch_concept_loss_wieght"] = values.pop("patch_concept_loss_weight")
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="patch_concept_loss_wieght"):
        ConceptCLIPConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["concept_token_span", "retrun_loss", "output_hiden_states"])
def test_a_misspelt_argument_is_refused_with_the_right_one(model, batch, name):
    with pytest.raises(ValueError, match=f"knows no '{name}'. Did you mean"):
        model(**batch, **{name: True})
    assert model(**batch, a_column_of_the_data_set=1).loss is None


def test_towers_that_cannot_serve_are_refused():
    with pytest.raises(ValueError, match="vision_use_head"):
        ConceptCLIPConfig(vision_config={**VISION, "vision_use_head": False})
    with pytest.raises(ValueError, match="square"):
        ConceptCLIPConfig(vision_config=SiglipVisionConfig(image_size=[20, 24], patch_size=4))


def test_nothing_to_embed_is_refused(model):
    with pytest.raises(ValueError, match="pixel_values, input_ids or both"):
        model()


def test_a_loss_without_pairs_is_refused(model, batch):
    with pytest.raises(ValueError, match="3 images and 0 texts"):
        model(pixel_values=batch["pixel_values"], return_loss=True)
    with pytest.raises(ValueError, match="2 images and 3 texts"):
        model(batch["input_ids"], batch["pixel_values"][:2], return_loss=True)


@pytest.mark.parametrize("shape", [(1, 3, 26, 20), (1, 3, 12, 12), (1, 1, 20, 20), (3, 20, 20), (20,)])
def test_images_that_do_not_fit_are_refused(model, shape):
    with pytest.raises(ValueError, match=r"should be \(B, 3, 20, 20\)"):
        model(pixel_values=torch.randn(shape))


@pytest.mark.parametrize("shape", [(1, 3, 26, 5), (3, 26, 26), (1, 1, 26, 26)])
def test_images_without_a_whole_patch_are_refused_at_every_size(model, shape):
    with pytest.raises(ValueError, match="at least 6 pixels"):
        model.get_concept_maps(torch.randn(shape), concept_embeds=torch.randn(2, 32), interpolate_pos_encoding=True)


def test_texts_that_do_not_fit_are_refused(model, batch):
    with pytest.raises(ValueError, match="1 to 16 tokens"):
        model(torch.ones(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="1 to 16 tokens"):
        model(torch.ones(2, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="attention_mask should be"):
        model(batch["input_ids"], attention_mask=torch.ones(3, 7))


def test_concepts_that_do_not_fit_are_refused(model, batch):
    with pytest.raises(ValueError, match="concept_token_spans should be"):
        model(**{**batch, "concept_token_spans": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="concept_mask should be"):
        model(**{**batch, "concept_mask": torch.ones(3, 3)})
    with pytest.raises(ValueError, match="concept_ids should be"):
        model(**batch, concept_ids=torch.zeros(3, 3), return_loss=True)


def test_maps_are_refused_without_heads_concepts_or_matching_texts(model, batch):
    pixels, ids = batch["pixel_values"], batch["input_ids"]
    with pytest.raises(ValueError, match="use_patch_concept_alignment=False"):
        tiny_model(use_patch_concept_alignment=False).get_concept_maps(pixels, ids)
    with pytest.raises(ValueError, match="give input_ids or concept_embeds"):
        model.get_concept_maps(pixels)
    with pytest.raises(ValueError, match="both came"):
        model.get_concept_maps(pixels, ids, concept_embeds=torch.randn(2, 32))
    with pytest.raises(ValueError, match="1 images but concepts of 3 texts"):
        model.get_concept_maps(pixels[:1], ids)
    with pytest.raises(ValueError, match=r"concept_embeds should be \(N, 32\)"):
        model.get_concept_maps(pixels, concept_embeds=torch.randn(2, 7))
