"""Maps of other methods: equal to what their definition gives, on a tiny model, and no trace left in the model."""

import pytest
import torch
from transformers import BertConfig, SiglipVisionConfig

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel
from medclip_hf.evaluation.comparators import METHODS, WholeImageScore, attention_maps, gradient_maps, pooled_patch_maps

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ConceptCLIPConfig(
        text_config=BertConfig(vocab_size=20, **TOWER).to_dict(),
        vision_config=SiglipVisionConfig(image_size=32, patch_size=8, **TOWER).to_dict(),
    )
    return ConceptCLIPModel(config).eval()


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    return pixels, torch.nn.functional.normalize(torch.randn(3, 16, generator=generator), dim=-1)


def test_the_explained_score_is_the_models_own_cosine(model, inputs):
    pixels, texts = inputs
    with torch.no_grad():
        expected = model(pixel_values=pixels).image_embeds @ texts.T
        torch.testing.assert_close(WholeImageScore(model, texts)(pixels), expected)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_gives_one_map_an_image_and_text_and_leaves_the_model_alone(model, inputs, method):
    pixels, texts = inputs
    maps = gradient_maps(model, pixels, texts, method)
    assert maps.shape == (2, 3, 4, 4)
    assert torch.isfinite(maps).all()
    assert not maps.requires_grad
    assert maps.std() > 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    alone = gradient_maps(model, pixels[1:], texts[2:], method)
    torch.testing.assert_close(alone[0, 0], maps[1, 2], rtol=1e-4, atol=1e-6)


def test_occlusion_is_the_loss_of_cosine_where_a_patch_is_grey(model, inputs):
    pixels, texts = inputs
    maps = gradient_maps(model, pixels, texts, "occlusion")
    hidden = pixels.clone()
    hidden[:, :, 8:16, 24:32] = 0.0
    score = WholeImageScore(model, texts)
    with torch.no_grad():
        loss = score(pixels) - score(hidden)
    # Captum gives the loss to each of the 3 channels and pixels of the window.
    torch.testing.assert_close(maps[:, :, 1, 3], 3 * loss, rtol=1e-4, atol=1e-6)


def test_gradient_times_input_is_what_autograd_gives(model, inputs):
    pixels, texts = inputs
    leaf = pixels.clone().requires_grad_()
    WholeImageScore(model, texts)(leaf)[:, 1].sum().backward()
    expected = torch.nn.functional.avg_pool2d((leaf.grad * pixels).sum(dim=1, keepdim=True), 8)[:, 0]
    model.zero_grad(set_to_none=True)
    torch.testing.assert_close(gradient_maps(model, pixels, texts, "gradient_x_input")[:, 1], expected)


def test_attention_is_shared_out_among_the_patches(model, inputs):
    before = model.vision_model.config._attn_implementation
    maps = attention_maps(model, inputs[0])
    assert maps.shape == (2, 4, 4)
    torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(2))
    assert (maps >= 0).all()
    assert model.vision_model.config._attn_implementation == before


def test_a_patch_pooled_by_itself_is_an_image_of_one_patch(model, inputs):
    pixels, texts = inputs
    maps = pooled_patch_maps(model, pixels, texts)
    with torch.no_grad():
        patch = model.get_image_features(pixels).last_hidden_state[0, 5]  # row 1, column 1
        vector = torch.nn.functional.normalize(model.vision_model.head(patch[None, None])[0], dim=-1)
    torch.testing.assert_close(maps[0, :, 1, 1], texts @ vector)


def test_images_of_another_size_need_their_positions_interpolated(model, inputs):
    wide = torch.nn.functional.interpolate(inputs[0], size=(32, 48))
    assert gradient_maps(model, wide, inputs[1], interpolate_pos_encoding=True).shape == (2, 3, 4, 6)
    assert attention_maps(model, wide, interpolate_pos_encoding=True).shape == (2, 4, 6)
    assert pooled_patch_maps(model, wide, inputs[1], interpolate_pos_encoding=True).shape == (2, 3, 4, 6)


def test_other_methods_and_models_are_refused(model, inputs):
    with pytest.raises(ValueError, match="method must be one of"):
        gradient_maps(model, *inputs, "lime")
    with pytest.raises(ValueError, match="no SigLIP tower"):
        gradient_maps(torch.nn.Linear(1, 1), *inputs)
