"""FVLMModel: the official values, what transformers expects of a model, and bad input."""

import copy
import inspect
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from medclip_hf.hub.convert_fvlm import from_official_state_dict, to_official_state_dict
from medclip_hf.modeling.fvlm import FVLMConfig, FVLMModel, FVLMVisionConfig, FVLMVisionModel
from medclip_hf.modeling.fvlm.anatomy_masks_fvlm import anatomy_token_mask, complete_anatomies
from medclip_hf.modeling.fvlm.anatomy_pooling_fvlm import FVLMAnatomyPooling
from medclip_hf.modeling.fvlm.loss_fvlm import anatomy_logits, normalize_rows, positive_pairs

CASES = ("all_intact", "cropped_border", "organ_missing", "all_normal_organ", "single_patient_organ")
SIZE_DHW, PATCH_DHW = (8, 12, 16), (4, 4, 8)
NUM_PATCHES = 2 * 3 * 2


def tiny_config(**changes):
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size_dhw": SIZE_DHW,
        "patch_size_dhw": PATCH_DHW,
    }
    text = {
        "vocab_size": 50,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    }
    values = {"vision_config": vision, "text_config": text, "projection_dim": 16, "feature_layers": (0, 1)}
    return FVLMConfig(**values | changes)


@pytest.fixture
def model():
    """A tiny model in eval mode whose queries are not zero."""
    torch.manual_seed(0)
    model = FVLMModel(tiny_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for head in model.anatomy_heads:
            head.query.normal_()
    return model


@pytest.fixture
def inputs():
    """Three volumes with four cuboids each; the aorta of the first touches a face; the last has no heart."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(3, *SIZE_DHW, dtype=torch.uint8)
    mask[:, 1:5, 1:6, 1:9] = 1
    mask[:2, 5:7, 6:11, 9:14] = 2
    mask[:, 1:3, 7:9, 9:12] = 3
    mask[0, 6:8, 1:4, 10:13] = 4
    mask[1:, 5:7, 1:4, 10:13] = 4
    return {
        "input_ids": torch.randint(1, 50, (5, 7), generator=generator),
        "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 7, [1] * 5 + [0] * 2, [1] * 7]),
        "pixel_values": torch.rand(3, 1, *SIZE_DHW, generator=generator),
        "anatomy_mask": mask,
        "text_index": torch.tensor([[0, 1, 2, 3], [4, 3, 1, 0], [2, -1, 3, 1]]),
        "is_abnormal": torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]]).bool(),
    }


# Official values -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(goldens):
    """The official tiny model, converted, with the volumes of all cases and the captions."""
    weights = load_file(goldens / "fvlm_model_tiny.safetensors")
    settings = json.loads((goldens / "fvlm_model_tiny.config.json").read_text())
    text_keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = FVLMConfig(
        text_config={key: settings["bert"][key] for key in (*text_keys, "max_position_embeddings")},
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "image_size_dhw": (32, 48, 96),
        },
    )
    model = FVLMModel(config).eval()
    converted, _ = from_official_state_dict({key[3:]: value for key, value in weights.items() if key[:3] == "sd."})
    model.load_state_dict(converted)
    cases = json.loads((goldens / "fvlm_cases.json").read_text())
    return {"model": model, "pixel_values": weights["in.image"], "cases": cases, "folder": goldens}


def official_case(official, name):
    """(inputs of the model, reference values) of a case; captions identify texts, stripped texts are encoded."""
    reference = load_file(official["folder"] / f"fvlm_case_{name}.safetensors")
    captions = official["cases"][name]["captions"]
    texts, input_ids, attention_mask = [], [], []
    text_index = torch.full((4, 4), -1)
    for column, anatomy in enumerate(official["model"].config.anatomies):
        for row, scan in enumerate(reference.get(f"{anatomy}.patient_ids", torch.zeros(0)).tolist()):
            caption = captions[anatomy][scan]
            if caption not in texts:
                texts.append(caption)
                input_ids.append(reference[f"{anatomy}.input_ids"][row])
                attention_mask.append(reference[f"{anatomy}.attention_mask"][row])
            text_index[scan, column] = texts.index(caption)
    inputs = {
        "input_ids": torch.stack(input_ids),
        "attention_mask": torch.stack(attention_mask),
        "pixel_values": official["pixel_values"],
        "anatomy_mask": reference["in.seg"],
        "text_index": text_index,
        "is_abnormal": reference["in.organ_abnormal_flags"],
    }
    return inputs, reference


@pytest.mark.parametrize("name", CASES)
def test_losses_features_and_targets_are_those_of_the_release(official, name):
    inputs, reference = official_case(official, name)
    model = official["model"]
    pooled = []
    hook = model.anatomy_pooling.register_forward_hook(lambda module, args, output: pooled.append(output[0]))
    with torch.no_grad():
        outputs = model(**inputs, return_loss=True)
    hook.remove()
    torch.testing.assert_close(outputs.loss, reference["out.total_loss"], rtol=1e-5, atol=0)
    is_used = complete_anatomies(inputs["anatomy_mask"], 4) & (inputs["text_index"] >= 0)
    text_ids = inputs["text_index"].clamp(min=0)
    targets = normalize_rows(positive_pairs(text_ids, inputs["is_abnormal"], is_used).float())
    logits = anatomy_logits(outputs.anatomy_embeds, outputs.text_embeds[text_ids], outputs.logit_scale)
    for column, anatomy in enumerate(model.config.anatomies):
        expected_loss = reference.get(f"out.loss.{anatomy}_itc", torch.tensor(0.0))
        torch.testing.assert_close(outputs.anatomy_losses[column], expected_loss, rtol=1e-5, atol=0)
        if f"{anatomy}.patient_ids" not in reference:
            continue
        scans = reference[f"{anatomy}.patient_ids"]
        assert is_used[:, column].nonzero()[:, 0].tolist() == scans.tolist()
        attended = pooled[0][scans, column]
        torch.testing.assert_close(attended, reference[f"{anatomy}.roi_attention_out"], rtol=0, atol=1e-4)
        embeds = outputs.anatomy_embeds[scans, column]
        torch.testing.assert_close(embeds, reference[f"{anatomy}.image_feat"], rtol=0, atol=1e-5)
        texts = outputs.text_embeds[inputs["text_index"][scans, column]]
        torch.testing.assert_close(texts, reference[f"{anatomy}.text_feat"], rtol=0, atol=1e-5)
        pairs = (column, scans[:, None], scans[None, :])
        torch.testing.assert_close(targets[pairs], reference[f"{anatomy}.sim_targets"])
        if f"{anatomy}.sim_i2t" in reference:
            torch.testing.assert_close(logits[pairs], reference[f"{anatomy}.sim_i2t"], rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(logits[pairs].T, reference[f"{anatomy}.sim_t2i"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_release(official, name):
    inputs, reference = official_case(official, name)
    model = official["model"]
    model.zero_grad()
    model(**inputs, return_loss=True).loss.backward()
    gradients = {
        key: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for key, parameter in model.named_parameters()
    }
    gradients["text_model.embeddings.token_type_embeddings.weight"] = torch.zeros(2, 32)  # the release has none
    named = to_official_state_dict(gradients)
    named["temp"] = -gradients["logit_scale"][0] / 0.07  # d(-log temp) / d temp
    compared = [key for key in reference if key.startswith("grad.")]
    assert len(compared) >= 16 - 4
    for key in compared:
        torch.testing.assert_close(
            named[key[5:]], reference[key], rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_the_four_levels_and_the_patches_of_an_anatomy_are_those_of_the_release(official):
    inputs, reference = official_case(official, "all_intact")
    with torch.no_grad():
        outputs = official["model"].vision_model(inputs["pixel_values"], feature_layers=(3, 6, 9))
    for level in range(4):
        expected = reference[f"out.hidden_level{level}"]
        torch.testing.assert_close(outputs.feature_levels[:, level], expected, rtol=1e-5, atol=1e-4)
    token_mask = anatomy_token_mask(inputs["anatomy_mask"], 4, (16, 16, 32))
    assert torch.equal(token_mask, reference["out.organ_token_flags"])


@pytest.mark.parametrize("grid", [(5, 12, 9), (7, 16, 11), (7, 18, 11), (8, 16, 12)])
def test_positions_of_other_grids_are_those_of_the_release(goldens, grid):
    reference = load_file(goldens / "fvlm_pos_embed_interpolation.safetensors")
    config = FVLMVisionConfig(hidden_size=8, num_attention_heads=1, intermediate_size=8, num_hidden_layers=1)
    embeddings = FVLMVisionModel(config).embeddings
    embeddings.position_embedding.data = reference["position_embeddings"]
    expected = reference["interpolated.{}_{}_{}".format(*grid)]
    torch.testing.assert_close(embeddings.interpolate_pos_encoding(grid), expected, rtol=0, atol=1e-6)


def test_the_published_model_has_as_many_parameters_as_the_release():
    with torch.device("meta"):
        model = FVLMModel(FVLMConfig())
    count = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    # conv 768 * (8192 + 1), positions 1232 * 768, 12 blocks of 7 087 872, last norm
    assert count["vision_model"] == 768 * 8193 + 1232 * 768 + 12 * 7_087_872 + 2 * 768
    assert count["anatomy_pooling"] == 4 * 768 * 768 + 4 * 768
    assert count["anatomy_heads"] == 4 * (768 + 256 * 768 + 256)


# Masks and pooling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_anatomies", [1, 6, 7, 29, 30, 61])
def test_patches_of_an_anatomy_are_those_that_max_pooling_finds(num_anatomies):
    mask = torch.randint(0, num_anatomies + 3, (2, 6, 8, 10), generator=torch.Generator().manual_seed(0)).byte()
    mask[torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.9] = 0
    found = anatomy_token_mask(mask, num_anatomies, (3, 2, 5))
    one_hot = torch.stack([mask == index + 1 for index in range(num_anatomies)], dim=1).float()
    pooled = torch.nn.functional.max_pool3d(one_hot, (3, 2, 5), (3, 2, 5)).flatten(2) > 0
    assert torch.equal(found, pooled)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_masks_may_have_any_integer_type(dtype):
    mask = torch.zeros(1, *SIZE_DHW, dtype=dtype)
    mask[0, 1, 1, 1] = 2
    assert anatomy_token_mask(mask, 4, PATCH_DHW).nonzero().tolist() == [[0, 1, 0]]


def test_an_anatomy_is_complete_if_it_is_there_and_touches_no_face():
    mask = torch.zeros(7, 5, 5, 5, dtype=torch.uint8)
    mask[:, 2, 2, 2] = 1
    for row, corner in enumerate([(0, 2, 2), (4, 2, 2), (2, 0, 2), (2, 4, 2), (2, 2, 0), (2, 2, 4)]):
        mask[(row, *corner)] = 1
    assert complete_anatomies(mask, 2).tolist() == [[False, False]] * 6 + [[True, False]]


@pytest.mark.parametrize("heads", [1, 4])
def test_pooling_gives_the_numbers_of_multihead_attention(heads):
    torch.manual_seed(0)
    reference = torch.nn.MultiheadAttention(16, heads, batch_first=True).double()
    torch.nn.init.normal_(reference.in_proj_bias)
    torch.nn.init.normal_(reference.out_proj.bias)
    pooling = FVLMAnatomyPooling(16, heads, dropout=0.0).double()
    pooling.load_state_dict(reference.state_dict())
    queries, levels = torch.randn(3, 16).double(), torch.randn(2, 2, 5, 16).double()
    mask = torch.tensor(
        [[[1, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], [[0, 1, 0, 0, 0], [0] * 5, [1, 0, 0, 1, 0]]]
    ).bool()
    pooled, weights = pooling(queries, levels, mask)
    for row in range(2):
        for anatomy in range(3):
            tokens = levels[row, :, mask[row, anatomy]].reshape(1, -1, 16)
            if tokens.shape[1] == 0:
                assert pooled[row, anatomy].abs().max() == 0
                assert weights[row, :, anatomy].abs().max() == 0
                continue
            expected, _ = reference(queries[None, anatomy : anatomy + 1], tokens, tokens)
            torch.testing.assert_close(pooled[row, anatomy], expected[0, 0])
            torch.testing.assert_close(weights[row, :, anatomy].sum((-2, -1)), torch.ones(heads).double())


def test_dropped_attention_weights_carry_their_share_of_the_bias():
    """With values that are all bias, a head's output is the bias times the sum of the weights that were kept."""
    pooling = FVLMAnatomyPooling(4, 1, dropout=0.5).train()
    torch.nn.init.zeros_(pooling.in_proj_weight)
    torch.nn.init.ones_(pooling.in_proj_bias)
    torch.nn.init.eye_(pooling.out_proj.weight)
    torch.nn.init.zeros_(pooling.out_proj.bias)
    torch.manual_seed(0)
    pooled, _ = pooling(torch.zeros(1, 4), torch.randn(1, 1, 10, 4), torch.ones(1, 1, 10, dtype=torch.bool))
    multiples_of_a_kept_weight = pooled.flatten() / 0.2
    torch.testing.assert_close(multiples_of_a_kept_weight, multiples_of_a_kept_weight.round())
    assert 0 < pooled.flatten()[0] < 2


def test_an_anatomy_without_a_token_gives_a_finite_masked_row_and_no_gradient(model, inputs):
    outputs = model(**inputs, return_loss=True)
    assert outputs.anatomy_present.tolist() == [[True] * 4, [True] * 4, [True, False, True, True]]
    assert outputs.anatomy_embeds[2, 1].abs().max() == 0
    outputs.anatomy_embeds[2, 1].sum().backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


def test_embeddings_have_unit_length(model, inputs):
    outputs = model(**inputs)
    torch.testing.assert_close(outputs.text_embeds.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(outputs.anatomy_embeds[0].norm(dim=-1), torch.ones(4))


def test_a_token_mask_may_stand_for_the_anatomy_mask(model, inputs):
    token_mask = anatomy_token_mask(inputs["anatomy_mask"], 4, PATCH_DHW)
    expected = model(**inputs).anatomy_embeds
    del inputs["anatomy_mask"]
    assert torch.equal(model(**inputs, anatomy_token_mask=token_mask).anatomy_embeds, expected)


def test_logits_are_scaled_cosines(model, inputs):
    outputs = model(**inputs)
    expected = torch.einsum("bad,td->bat", outputs.anatomy_embeds, outputs.text_embeds) * outputs.logit_scale
    torch.testing.assert_close(outputs.logits_per_anatomy, expected)
    assert model(**inputs, return_logits=False).logits_per_anatomy is None


def test_a_text_given_twice_counts_as_the_same_text_by_its_id(model, inputs):
    expected = model(**inputs, return_loss=True).loss
    twice = dict(inputs)
    twice["input_ids"] = torch.cat([inputs["input_ids"], inputs["input_ids"][3:4]])
    twice["attention_mask"] = torch.cat([inputs["attention_mask"], inputs["attention_mask"][3:4]])
    twice["text_index"] = inputs["text_index"].clone()
    twice["text_index"][1, 1] = 5
    with_ids = model(**twice, text_ids=torch.tensor([0, 1, 2, 3, 4, 3]), return_loss=True).loss
    torch.testing.assert_close(with_ids, expected)


def test_padding_changes_no_text_embedding(model, inputs):
    texts = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    padded = {name: torch.nn.functional.pad(value, (0, 9)) for name, value in texts.items()}
    torch.testing.assert_close(model(**padded).text_embeds, model(**texts).text_embeds)


def test_each_side_may_come_alone(model, inputs):
    assert model(input_ids=inputs["input_ids"]).anatomy_embeds is None
    assert model(pixel_values=inputs["pixel_values"], anatomy_mask=inputs["anatomy_mask"]).text_embeds is None


def test_other_volume_sizes_work(model):
    pixel_values, mask = torch.rand(1, 1, 12, 8, 24), torch.ones(1, 12, 8, 24, dtype=torch.uint8)
    assert model(pixel_values=pixel_values, anatomy_mask=mask).anatomy_present.tolist() == [[True, False, False, False]]


# What transformers expects ---------------------------------------------------------------------------------------


def test_the_main_inputs_are_the_first_arguments():
    for kind in (FVLMModel, FVLMVisionModel):
        assert list(inspect.signature(kind.forward).parameters)[1] == kind.main_input_name


def test_towers_share_the_config_objects(model):
    assert model.vision_model.config is model.config.vision_config
    assert model.text_model.config is model.config.text_config


def test_every_parameter_gets_a_gradient(model, inputs):
    model.train()
    model(**inputs, return_loss=True).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_checkpointing_changes_no_gradient(model, inputs):
    checkpointed = copy.deepcopy(model)
    # The name of transformers 5.23, and the one before it.
    enable = getattr(checkpointed, "activation_checkpointing_enable", checkpointed.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    for each in (model, checkpointed):
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        each.config.text_config.attention_probs_dropout_prob = 0.0
        each.train()
        for layer in each.vision_model.layers:
            layer.self_attn.attention_dropout = 0.0
        for layer in each.text_model.encoder.layer:
            layer.attention.self.dropout.p = 0.0
        each.anatomy_pooling.attention_dropout = 0.0
        each(**inputs, return_loss=True).loss.backward()
    assert any(getattr(module, "gradient_checkpointing", False) for module in checkpointed.vision_model.modules())
    for (name, one), (_, two) in zip(model.named_parameters(), checkpointed.named_parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_sdpa_and_eager_attention_agree(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    eager = FVLMModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert eager.vision_model.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(**inputs).logits_per_anatomy, model(**inputs).logits_per_anatomy)


def test_hidden_states_and_attentions_come_on_request(inputs, tmp_path, model):
    model.save_pretrained(tmp_path)
    eager = FVLMModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    outputs = eager(**inputs, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in outputs.vision_model_output.hidden_states] == [(3, NUM_PATCHES, 32)] * 4
    shape = (3, 4, NUM_PATCHES, NUM_PATCHES)
    assert [tuple(weights.shape) for weights in outputs.vision_model_output.attentions] == [shape] * 3
    assert len(outputs.text_model_output.hidden_states) == 3
    assert len(outputs.text_model_output.attentions) == 2
    assert outputs.vision_model_output.anatomy_attentions.shape == (3, 4, 4, 3, NUM_PATCHES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling_num_attention_heads": 5}, "multiple of pooling_num_attention_heads 5"),
        ({"vision_config": {"num_attention_heads": 7}}, "multiple of num_attention_heads 7"),
    ],
)
def test_heads_that_do_not_divide_the_width_are_refused(changes, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        FVLMModel(FVLMConfig(**changes))


def test_a_tuple_holds_what_the_output_holds(model, inputs):
    outputs = model(**inputs)
    assert outputs.anatomy_present.dtype == torch.bool
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    for one, two in zip(as_tuple, outputs.to_tuple(), strict=True):
        if isinstance(one, torch.Tensor):
            assert one.dtype != torch.bool  # transformers' own checks subtract what tuples hold
            assert torch.equal(one, two)
    assert isinstance(model.get_text_features(inputs["input_ids"], return_dict=False), tuple)


def test_a_saved_model_loads_with_the_same_outputs(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = FVLMModel.from_pretrained(tmp_path).eval()
    assert loaded.config.anatomies == model.config.anatomies
    assert loaded.config.feature_layers == (0, 1)
    assert torch.equal(loaded(**inputs).logits_per_anatomy, model(**inputs).logits_per_anatomy)


def test_the_vision_tower_loads_alone(model, inputs, tmp_path):
    model.vision_model.save_pretrained(tmp_path)
    tower = FVLMVisionModel.from_pretrained(tmp_path).eval()
    expected = model.vision_model(inputs["pixel_values"]).last_hidden_state
    assert torch.equal(tower(pixel_values=inputs["pixel_values"]).last_hidden_state, expected)


def test_weights_that_a_checkpoint_lacks_are_initialised(model, tmp_path):
    """Whatever is missing gets its initial distribution, and what was loaded stays."""
    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lacking = ("position_embedding", "query", "in_proj", "logit_scale", "layers.1.")
    kept = {name: value for name, value in weights.items() if not any(word in name for word in lacking)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = FVLMModel.from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in kept.items())
    assert loaded.logit_scale.item() == pytest.approx(-math.log(0.07))
    assert all(head.query.abs().max() == 0 for head in loaded.anatomy_heads)
    assert 0.01 < loaded.vision_model.embeddings.position_embedding.std() < 0.03
    assert loaded.anatomy_pooling.in_proj_bias.abs().max() == 0
    assert 0.1 < loaded.anatomy_pooling.in_proj_weight.std() < 0.15  # Xavier over (96, 32): sqrt(2 / 128)
    layer = loaded.vision_model.layers[1]
    assert 0.015 < layer.mlp.fc1.weight.std() < 0.025
    assert layer.layer_norm1.weight.tolist() == [1.0] * 32


def test_word_embeddings_can_grow(model, inputs):
    expected = model(**inputs).text_embeds
    model.resize_token_embeddings(60)
    assert model.config.text_config.vocab_size == 60
    assert torch.equal(model(**inputs).text_embeds, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scale_stays_exact_in_half_precision(model, tmp_path, dtype):
    model.save_pretrained(tmp_path / "full")
    half = FVLMModel.from_pretrained(tmp_path / "full", dtype=dtype)
    assert half.logit_scale.item() == model.logit_scale.item()
    half.save_pretrained(tmp_path / "half")  # the precision that is saved is that of the weights
    again = FVLMModel.from_pretrained(tmp_path / "half")
    assert half.dtype == again.dtype == again.config.dtype == again.vision_model.dtype == dtype


@pytest.mark.parametrize("name", ["text_indx", "retrun_loss"])
def test_a_misspelt_argument_is_refused_with_the_right_one(model, inputs, name):
    with pytest.raises(ValueError, match=f"knows no '{name}'. Did you mean"):
        model(**inputs, **{name: True})


def test_a_misspelt_configuration_key_is_refused_with_the_right_one():
    with pytest.raises(ValueError, match="Did you mean 'feature_layers'"):
        tiny_config(feature_layer=(0,))
    with pytest.raises(ValueError, match="Did you mean 'patch_size_dhw'"):
        FVLMVisionConfig(patch_sise_dhw=(16, 16, 32))


def test_bfloat16_weights_run(model, inputs):
    outputs = model.to(torch.bfloat16)(**inputs, return_loss=True)
    assert outputs.vision_model_output.pooler_output.dtype == torch.bfloat16
    assert outputs.logits_per_anatomy.dtype == torch.float32  # embeddings are normalised and compared exactly
    assert torch.isfinite(outputs.loss)


def test_autocast_stays_close_to_float32(model, inputs):
    expected = model(**inputs).anatomy_embeds
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**inputs, return_loss=True)
    assert (outputs.anatomy_embeds - expected).abs().max() < 0.05
    torch.testing.assert_close(outputs.text_embeds.norm(dim=-1), torch.ones(5))
    logits = torch.einsum("bad,td->bat", outputs.anatomy_embeds, outputs.text_embeds) * outputs.logit_scale
    torch.testing.assert_close(outputs.logits_per_anatomy, logits)
    assert outputs.loss.dtype == torch.float32


def test_the_forward_pass_is_one_graph_for_the_compiler(inputs):
    config = tiny_config(feature_layers=(0,))
    # The compiler follows every further block the same way, at the same price.
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    model = FVLMModel(config).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(**inputs, return_loss=True)
    expected = model(**inputs, return_loss=True)
    torch.testing.assert_close(outputs.logits_per_anatomy, expected.logits_per_anatomy)
    torch.testing.assert_close(outputs.loss, expected.loss)


def test_the_forward_pass_can_be_exported(model, inputs):
    names = ("input_ids", "attention_mask", "pixel_values", "anatomy_mask")
    kept = {name: inputs[name] for name in names}
    exported = torch.export.export(model, (), kwargs=kept)
    expected = model(**kept).logits_per_anatomy
    torch.testing.assert_close(exported.module()(**kept).logits_per_anatomy, expected)


def test_the_temperature_is_kept_within_the_published_bounds(model):
    for value, expected in ((100.0, -math.log(0.001)), (-5.0, -math.log(0.5)), (2.0, 2.0)):
        with torch.no_grad():
            model.logit_scale.fill_(value)
        model.clamp_logit_scales_()
        assert model.logit_scale.item() == pytest.approx(expected)


# New anatomies ---------------------------------------------------------------------------------------------------


def test_new_anatomies_leave_the_old_ones_as_they_were(model, inputs, tmp_path):
    expected = model(**inputs).logits_per_anatomy
    model.add_anatomies(["liver", "spleen"])
    assert model.config.anatomies == ("lung", "heart", "esophagus", "aorta", "liver", "spleen")
    assert torch.equal(model(**inputs).logits_per_anatomy[:, :4], expected)
    inputs["anatomy_mask"][:, 1, 1, 1] = 6
    assert model(**inputs).anatomy_present[:, 5].all()
    model.save_pretrained(tmp_path)
    loaded = FVLMModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs).anatomy_embeds, model(**inputs).anatomy_embeds)


def test_frozen_anatomies_stay_exactly_the_same_through_training(model, inputs):
    model.add_anatomies(["liver"], freeze_existing=True)
    expected = model(**inputs).anatomy_embeds[:, :4].clone()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 3  # query, weight and bias of the new head
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    inputs["anatomy_mask"][0, 5:7, 5:7, 1:3] = 5
    model(**inputs).anatomy_embeds[0, 4, 0].backward()
    optimizer.step()
    assert torch.equal(model(**inputs).anatomy_embeds[1:, :4], expected[1:])
    assert model.anatomy_heads[4].query.abs().max() > 0


@pytest.mark.parametrize("names", [["heart"], ["liver", "liver"], [""], [f"part {i}" for i in range(58)]])
def test_anatomies_that_cannot_be_added_are_refused(model, names):
    with pytest.raises(ValueError, match="anatomies"):
        model.add_anatomies(names)
    assert len(model.anatomy_heads) == 4


# Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": torch.zeros(3, *SIZE_DHW)}, r"pixel_values has shape \(batch, 1, depth, height, width\)"),
        ({"pixel_values": torch.zeros(3, 2, *SIZE_DHW)}, "pixel_values has shape"),
        (
            {"pixel_values": torch.zeros(3, 1, 7, 12, 16), "anatomy_mask": torch.zeros(3, 7, 12, 16).byte()},
            "no multiple of the patch",
        ),
        ({"anatomy_mask": torch.zeros(3, 1, *SIZE_DHW).byte()}, "share one grid"),
        ({"anatomy_mask": torch.zeros(3, *SIZE_DHW)}, "integer ids"),
        ({"anatomy_mask": torch.zeros(3, 4, 12, 16).byte()}, "share one grid"),
        ({"anatomy_mask": None}, "Exactly one of anatomy_mask and anatomy_token_mask"),
        ({"anatomy_token_mask": torch.ones(3, 4, NUM_PATCHES)}, "Exactly one of"),
        ({"anatomy_mask": None, "anatomy_token_mask": torch.ones(3, 4, 5).bool()}, "must have shape"),
        ({"is_abnormal": None}, "needs text_index and is_abnormal"),
        ({"text_index": None}, "needs text_index and is_abnormal"),
        ({"input_ids": None}, "must both come"),
        # What has one row or one column would be broadcast and change the loss without a sign.
        ({"text_index": torch.zeros(1, 4).long()}, r"text_index must have shape \(3, 4\)"),
        ({"is_abnormal": torch.ones(3, 1).bool()}, "is_abnormal must have shape"),
        ({"is_complete": torch.ones(4).bool()}, "is_complete must have shape"),
        ({"text_ids": torch.arange(9)}, r"text_ids must have shape \(5,\)"),
        ({"input_ids": torch.ones(5, 33).long(), "attention_mask": None}, "1 to 32 tokens"),
        ({"attention_mask": torch.ones(5, 6).long()}, "attention_mask should be"),
        ({"input_ids": None, "pixel_values": None}, "Neither input_ids nor pixel_values"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(model, inputs, changes, message):
    with pytest.raises(ValueError, match=message):
        model(**inputs | changes, return_loss=True)


def test_an_index_beyond_the_last_text_is_an_error_and_not_taken_for_none(model, inputs):
    beyond = torch.where(inputs["text_index"] == 4, 5, inputs["text_index"])
    with pytest.raises(IndexError):
        model(**inputs | {"text_index": beyond}, return_loss=True)


def test_a_block_that_does_not_exist_is_refused(model, inputs):
    with pytest.raises(ValueError, match="blocks are 0 to 2"):
        model.vision_model(inputs["pixel_values"], feature_layers=(0, 3))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (FVLMConfig, {"anatomies": []}, "1 to 61 names"),
        (FVLMConfig, {"anatomies": ["lung", "lung"]}, "distinct names"),
        (FVLMConfig, {"feature_layers": (12,)}, "12 blocks"),
        (FVLMConfig, {"projection_dim": "256"}, "projection_dim"),
        (FVLMVisionConfig, {"image_size_dhw": (112, 256)}, "three numbers"),
        (FVLMVisionConfig, {"image_size_dhw": (112, 256, 350)}, "multiple of patch_size_dhw"),
    ],
)
def test_a_config_that_cannot_work_is_refused(kind, values, message):
    with pytest.raises(Exception, match=message):
        kind(**values)
