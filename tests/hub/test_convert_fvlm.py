"""Official fVLM weights to ours and back, and starting weights: every key accounted for."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import BertConfig, BertModel, BertTokenizer

from medclip_hf.hub.checkpoints import load_without_gap, read_weights
from medclip_hf.hub.convert_fvlm import (
    from_official_state_dict,
    from_towers,
    initialize_from_mae,
    to_official_state_dict,
)
from medclip_hf.modeling.fvlm import FVLMConfig, FVLMModel, FVLMVisionConfig, FVLMVisionModel

TEXT = {"vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VISION = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "image_size_dhw": (32, 48, 96)}


@pytest.fixture
def config():
    return FVLMConfig(text_config={**TEXT, "max_position_embeddings": 64}, vision_config=VISION)


@pytest.fixture
def official(goldens):
    weights = load_file(goldens / "fvlm_model_tiny.safetensors")
    return {key[3:]: value for key, value in weights.items() if key.startswith("sd.")}


def test_every_official_key_is_converted_or_dropped_with_a_reason(official, config):
    converted, dropped = from_official_state_dict(official)
    model = FVLMModel(config)
    assert converted.keys() == model.state_dict().keys()
    assert all(key.startswith(("text_encoder.cls.", "text_encoder.embeddings.")) for key in dropped)
    assert all(len(reason) > 10 for reason in dropped.values())


def test_the_way_back_gives_the_official_weights(official):
    converted, dropped = from_official_state_dict(official)
    back = to_official_state_dict(converted)
    assert back.keys() == official.keys() - dropped.keys()
    for key, value in back.items():
        if key == "temp":
            torch.testing.assert_close(value, official[key], rtol=1e-6, atol=0)  # through a logarithm
        else:
            assert torch.equal(value, official[key]), key


def test_token_types_are_zero_as_the_release_adds_none(official):
    converted, _ = from_official_state_dict(official)
    assert converted["text_model.embeddings.token_type_embeddings.weight"].abs().max() == 0


def test_trained_token_types_are_folded_into_the_official_positions(official, config):
    converted, _ = from_official_state_dict(official)
    model = FVLMModel(config).eval()
    model.load_state_dict(converted)
    with torch.no_grad():
        model.text_model.embeddings.token_type_embeddings.weight.normal_()
    ids = torch.tensor([[2, 7, 9, 3]])
    expected = model(input_ids=ids).text_embeds
    folded, _ = from_official_state_dict(to_official_state_dict(model.state_dict()))
    model.load_state_dict(folded)
    torch.testing.assert_close(model(input_ids=ids).text_embeds, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_official_file_loads_into_a_model(official, config, tmp_path, prefix):
    path = tmp_path / "model.pth"
    weights = {prefix + key: value for key, value in official.items()}
    torch.save({"model": weights, "optimizer": {"state": {}}, "epoch": 19, "config": {"run": {"seed": 42}}}, path)
    model = FVLMModel(config)
    load_without_gap(model, from_official_state_dict(read_weights(path))[0], str(path))
    assert torch.equal(model.anatomy_heads[3].query, official["query_tokens"][3])


def test_the_released_file_without_leftovers_loads_too(official):
    """Parameters that were frozen during training are missing in the released file."""
    kept = {key: value for key, value in official.items() if "token_type" not in key and ".cls." not in key}
    assert from_official_state_dict(kept)[0].keys() == from_official_state_dict(official)[0].keys()


def test_unknown_and_missing_keys_are_named(official):
    with pytest.raises(ValueError, match=r"unknown keys \['momentum_encoder.weight'\]"):
        from_official_state_dict({**official, "momentum_encoder.weight": torch.zeros(1)})
    del official["temp"]
    with pytest.raises(ValueError, match=r"missing after renaming \['logit_scale'\]"):
        from_official_state_dict(official)


def test_weights_that_do_not_fit_the_config_are_named(official):
    other = FVLMConfig(
        text_config={**TEXT, "max_position_embeddings": 64}, vision_config=VISION, anatomies=("lung", "heart")
    )
    with pytest.raises(ValueError, match=r"anatomy_heads\.3\.query"):
        load_without_gap(FVLMModel(other), from_official_state_dict(official)[0], "model.pth")


class Trap:
    """What a malicious file would hold."""

    def __reduce__(self):
        return (print, ("executed",))


def test_a_file_that_wants_to_run_code_is_refused(tmp_path, capsys):
    path = tmp_path / "model.pth"
    with path.open("wb") as file:
        pickle.dump({"model": Trap()}, file)
    with pytest.raises(ValueError, match="cannot be read"):
        read_weights(path)
    assert "executed" not in capsys.readouterr().out


def test_keys_of_another_model_do_not_go_back():
    state = FVLMModel(FVLMConfig(text_config=TEXT, vision_config=VISION)).state_dict()
    with pytest.raises(ValueError, match=r"none of FVLMModel: \['classifier.weight'\]"):
        to_official_state_dict({**state, "classifier.weight": torch.zeros(1)})


# Starting points -------------------------------------------------------------------------------------------------


def mae_weights(hidden=48, layers=2, side=3, patch=4):
    """A tiny MAE in the names of its release."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    weights = {
        "cls_token": rand(1, 1, hidden),
        "mask_token": rand(1, 1, 8),
        "pos_embed": rand(1, 1 + side * side, hidden),
        "patch_embed.proj.weight": rand(hidden, 3, patch, patch),
        "patch_embed.proj.bias": rand(hidden),
        "norm.weight": rand(hidden),
        "norm.bias": rand(hidden),
        "decoder_embed.weight": rand(8, hidden),
        "decoder_blocks.0.attn.qkv.weight": rand(24, 8),
    }
    for layer in range(layers):
        shapes = {
            "norm1": (hidden,),
            "norm2": (hidden,),
            "attn.qkv": (3 * hidden, hidden),
            "attn.proj": (hidden, hidden),
            "mlp.fc1": (96, hidden),
            "mlp.fc2": (hidden, 96),
        }
        for name, shape in shapes.items():
            weights[f"blocks.{layer}.{name}.weight"] = rand(*shape)
            weights[f"blocks.{layer}.{name}.bias"] = rand(shape[0])
    return weights


@pytest.fixture
def tower():
    config = FVLMVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_attention_heads=4,
        num_hidden_layers=2,
        image_size_dhw=(8, 16, 20),
        patch_size_dhw=(4, 4, 10),
    )
    return FVLMVisionModel(config)


def test_an_image_mae_gives_blocks_and_inflated_positions(tower):
    weights = mae_weights()
    before = tower.embeddings.patch_embedding.weight.clone()
    dropped = initialize_from_mae(tower, weights)
    assert torch.equal(tower.layers[1].self_attn.k_proj.weight, weights["blocks.1.attn.qkv.weight"][48:96])
    assert torch.equal(tower.post_layernorm.bias, weights["norm.bias"])
    assert torch.equal(tower.embeddings.patch_embedding.weight, before)
    assert {"cls_token", "mask_token", "patch_embed.proj.weight", "decoder_embed.weight"} <= dropped.keys()
    grid = weights["pos_embed"][0, 1:].view(3, 3, 48).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, size=(4, 2), mode="bilinear", align_corners=False)[0]
    positions = tower.embeddings.position_embedding[0].view(2, 4, 2, 48)
    for depth in range(2):
        torch.testing.assert_close(positions[depth].permute(2, 0, 1), expected)


def test_an_inflated_patch_embedding_answers_a_constant_volume_like_a_constant_image(tower):
    weights = mae_weights()
    initialize_from_mae(tower, weights, patch_embedding="inflated")
    image = F.conv2d(
        torch.ones(1, 3, 4, 4), weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=4
    )
    volume = tower.embeddings.patch_embedding(torch.ones(1, 1, 4, 4, 10))
    torch.testing.assert_close(volume.flatten(), image.flatten(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.ls1.gamma": torch.zeros(48)}, r"no MAE or ViT encoder.*ls1.gamma"),
        ({"blocks.2.norm1.weight": torch.zeros(48)}, "superfluous.*layers.2.layer_norm1.weight"),
        ({"pos_embed": torch.zeros(1, 8, 48)}, "square grid"),
        ({"norm.weight": torch.zeros(47)}, r"post_layernorm.weight: \(47,\) instead of \(48,\)"),
    ],
)
def test_an_image_checkpoint_that_does_not_fit_is_refused(tower, change, message):
    with pytest.raises(ValueError, match=message):
        initialize_from_mae(tower, mae_weights() | change)


def test_an_unknown_way_to_inflate_is_refused(tower):
    with pytest.raises(ValueError, match="'random' or 'inflated', but 'mean' came"):
        initialize_from_mae(tower, mae_weights(), patch_embedding="mean")


def test_both_towers_come_from_folders(tmp_path):
    bert = BertModel(BertConfig(**TEXT, max_position_embeddings=40))
    bert.save_pretrained(tmp_path / "bert")
    BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}).save_pretrained(
        tmp_path / "bert"
    )
    save_file(mae_weights(), tmp_path / "mae.safetensors")
    config = FVLMConfig(vision_config={**VISION, "num_hidden_layers": 2}, feature_layers=(0,))
    model = from_towers(config, mae_path=tmp_path / "mae.safetensors", text_path=tmp_path / "bert")
    assert model.config.text_config.max_position_embeddings == 40
    assert model.config.text_config.hidden_dropout_prob == 0.25  # fVLM's, not the folder's
    expected = bert.state_dict()["encoder.layer.1.output.dense.weight"]
    assert torch.equal(model.text_model.state_dict()["encoder.layer.1.output.dense.weight"], expected)
    assert torch.equal(model.vision_model.post_layernorm.weight, mae_weights()["norm.weight"])
    model.save_pretrained(tmp_path / "fvlm")
    saved = json.loads((tmp_path / "fvlm" / "config.json").read_text())
    assert saved["text_config"]["vocab_size"] == 53
