"""ConceptCLIP's official weights: same outputs, losses and gradients as the release, and back without a changed bit."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel
from medclip_hf.hub.checkpoints import load_without_gap, read_weights
from medclip_hf.hub.convert_conceptclip import (
    from_official_state_dict,
    to_official_state_dict,
)

SECOND_STAGE_KEYS = ("image_proj.", "text_proj.", "concept_logit_")


def tiny_config(**kwargs) -> ConceptCLIPConfig:
    text = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 12,
    }
    vision = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    return ConceptCLIPConfig(
        text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4, "hidden_act": "gelu"}, **kwargs
    )


@pytest.fixture
def official() -> dict[str, torch.Tensor]:
    """A small random checkpoint under official names."""
    torch.manual_seed(0)
    return to_official_state_dict(ConceptCLIPModel(tiny_config()).state_dict())


# Parity with the release -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(goldens) -> dict[str, torch.Tensor]:
    return load_file(goldens / "conceptclip_model_tiny.safetensors")


@pytest.fixture(scope="module")
def golden_config(goldens) -> ConceptCLIPConfig:
    values = json.loads((goldens / "conceptclip_model_tiny.config.json").read_text())
    trunk = values["timm_vision_tower"]
    vision_config = {
        "hidden_size": trunk["embed_dim"],
        "intermediate_size": int(trunk["embed_dim"] * trunk["mlp_ratio"]),
        "num_hidden_layers": trunk["depth"],
        "num_attention_heads": trunk["num_heads"],
        "image_size": trunk["img_size"],
        "patch_size": trunk["patch_size"],
        "hidden_act": "gelu",
    }
    return ConceptCLIPConfig(text_config=values["bert_config"], vision_config=vision_config)


def golden_weights(golden, prefix: str = "sd.", leave_out: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    names = {name: name.removeprefix(prefix) for name in golden if name.startswith(prefix)}
    return {key: golden[name] for name, key in names.items() if not key.startswith(leave_out or ("-",))}


@pytest.fixture(scope="module")
def golden_run(golden, golden_config):
    """The converted model and its outputs on the golden batch, with gradients."""
    model = ConceptCLIPModel(golden_config).eval()
    weights, dropped = from_official_state_dict(golden_weights(golden))
    assert dropped == {}
    model.load_state_dict(weights)
    spans = golden["in.meta_infos"]  # [start, end) without [CLS], padded by -1
    mask = spans[..., 0] >= 0
    outputs = model(
        golden["in.input_ids"],
        golden["in.pixel_values"],
        concept_token_spans=torch.where(mask.unsqueeze(-1), spans + 1, 0),
        concept_mask=mask,
        return_loss=True,
    )
    outputs.loss.backward()
    return model, outputs


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("image_embeds", "image_features"),
        ("text_embeds", "text_features"),
        ("patch_embeds", "image_token_features"),
        ("logit_scale", "logit_scale"),
        ("logit_bias", "logit_bias"),
        ("concept_logit_scale", "concept_logit_scale"),
        ("concept_logit_bias", "concept_logit_bias"),
    ],
)
def test_outputs_equal_the_release(golden, golden_run, ours, theirs):
    expected = golden[f"out.{theirs}"]
    if ours == "patch_embeds":
        expected = F.normalize(expected, dim=-1)
    actual = golden_run[1][ours].reshape(expected.shape)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_projected_tokens_equal_the_release(golden, golden_run):
    model, outputs = golden_run
    tokens = model.token_projection(outputs.text_model_output.last_hidden_state)
    torch.testing.assert_close(tokens, golden["out.text_token_features"], rtol=0, atol=1e-5)


def test_losses_equal_the_release(golden, golden_run):
    model, outputs = golden_run
    weighted = model.config.patch_concept_loss_weight * outputs.patch_concept_loss
    torch.testing.assert_close(outputs.image_text_loss, golden["out.contrastive_loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(weighted, golden["out.concept_loss_weighted"], rtol=1e-5, atol=0)
    torch.testing.assert_close(outputs.loss, golden["out.total_loss"], rtol=1e-5, atol=0)


def test_gradients_of_every_parameter_equal_the_release(golden, golden_run):
    expected, _ = from_official_state_dict(golden_weights(golden, "grad."))
    actual = {name: p.grad for name, p in golden_run[0].named_parameters()}
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_first_stage_equals_the_release(golden, golden_config):
    config = ConceptCLIPConfig.from_dict({**golden_config.to_dict(), "use_patch_concept_alignment": False})
    model = ConceptCLIPModel(config).eval()
    weights, _ = from_official_state_dict(golden_weights(golden, leave_out=SECOND_STAGE_KEYS))
    model.load_state_dict(weights)
    with torch.no_grad():
        outputs = model(golden["in.input_ids"], golden["in.pixel_values"], return_loss=True)
    vision, text = outputs.vision_model_output, outputs.text_model_output
    pairs = {
        "image_features": outputs.image_embeds,
        "text_features": outputs.text_embeds,
        "image_token_features": vision.last_hidden_state,
        "text_token_features": text.last_hidden_state,
    }
    for name, actual in pairs.items():
        torch.testing.assert_close(actual, golden[f"stage1.out.{name}"], rtol=0, atol=1e-5, msg=name)
    torch.testing.assert_close(outputs.loss, golden["stage1.out.siglip_loss"], rtol=1e-5, atol=0)
    assert outputs.patch_concept_loss is None


def test_official_weights_survive_the_round_trip_bit_by_bit(golden, golden_run):
    before = golden_weights(golden)
    after = to_official_state_dict(golden_run[0].state_dict())
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value), key


# Every key accounted for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_second_stage", [False, True])
def test_our_weights_survive_the_round_trip_bit_by_bit(is_second_stage):
    before = ConceptCLIPModel(tiny_config(use_patch_concept_alignment=is_second_stage)).state_dict()
    after, dropped = from_official_state_dict(to_official_state_dict(before))
    assert after.keys() == before.keys()
    assert dropped == {}
    for key, value in before.items():
        assert torch.equal(after[key], value), key


def test_a_wrapper_prefix_goes_and_what_has_no_use_is_dropped_with_its_reason(official):
    wrapped = {f"module.{key}": value for key, value in official.items()}
    wrapped["module.text.transformer.embeddings.position_ids"] = torch.arange(5)[None]
    wrapped["module.text.transformer.pooler.dense.bias"] = torch.zeros(8)
    weights, dropped = from_official_state_dict(wrapped)
    assert weights.keys() == from_official_state_dict(official)[0].keys()
    assert dropped == {
        "text.transformer.embeddings.position_ids": "a counter, not a weight",
        "text.transformer.pooler.dense.bias": "texts are pooled by the mean of their tokens",
    }


def test_unknown_keys_are_refused_by_name(official):
    official["visual.trunk.cls_token"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"unknown keys \['visual\.trunk\.cls_token'\]"):
        from_official_state_dict(official)
    with pytest.raises(ValueError, match="no checkpoint of ConceptCLIP"):
        from_official_state_dict({"fc.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="none of ConceptCLIPModel"):
        to_official_state_dict({"head.weight": torch.zeros(1)})


def test_half_of_a_fused_pair_is_refused_by_name(official):
    del official["visual.trunk.attn_pool.kv.bias"]
    with pytest.raises(ValueError, match=r"attn_pool\.kv\.bias is missing"):
        from_official_state_dict(official)


# Files -----------------------------------------------------------------------------------------------------------


def test_missing_superfluous_and_misshapen_weights_are_refused_by_name(official):
    del official["text.proj.weight"]
    official["logit_scale"] = torch.zeros(())
    official["visual.trunk.norm.bias"] = torch.zeros(5)
    weights, _ = from_official_state_dict(official)
    with pytest.raises(ValueError, match="does not fit") as error:
        load_without_gap(ConceptCLIPModel(tiny_config(use_patch_concept_alignment=False)), weights, "model.safetensors")
    message = str(error.value)
    assert "missing: ['text_projection.weight']" in message
    assert "superfluous: ['concept_logit_bias', 'concept_logit_scale', 'patch_projection.fc1.weight'" in message
    assert "vision_model.post_layernorm.bias: (5,) instead of (12,)" in message


def test_files_that_are_no_checkpoint_are_refused_by_name(tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x00" * 20)
    code = tmp_path / "code.pt"
    torch.save({"state_dict": {"weight": print}}, code)
    numbers = tmp_path / "numbers.pt"
    torch.save({"epoch": 1}, numbers)
    for path in (tmp_path / "absent.pt", broken, code, numbers):
        with pytest.raises(ValueError, match=path.name):
            read_weights(path)
