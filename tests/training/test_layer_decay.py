"""Layer-wise learning rates: each block of a tower a step below the one above it."""

import pytest
import torch

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel
from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.optimization import layer_scales, make_optimizer, set_learning_rate

NAMES = (
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.encoder.layers.0.mlp.fc1.weight",
    "vision_model.encoder.layers.1.mlp.fc1.weight",
    "vision_model.post_layernorm.weight",
    "text_model.embeddings.word_embeddings.weight",
    "text_model.encoder.layer.0.output.dense.weight",
    "classifier.weight",
)


def test_each_block_has_its_share_of_the_rate():
    assert list(layer_scales(NAMES, 0.5).values()) == [0.125, 0.25, 0.5, 1.0, 0.25, 0.5, 1.0]


def test_without_decay_all_have_the_whole_rate():
    assert set(layer_scales(NAMES, 1.0).values()) == {1.0}


def test_the_optimiser_steps_each_group_at_its_rate():
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "hidden_size": 8}
    config = ConceptCLIPConfig(
        text_config={**sizes, "vocab_size": 9}, vision_config={**sizes, "image_size": 8, "patch_size": 4}
    )
    model = ConceptCLIPModel(config)
    optimizer = make_optimizer(model, RunArguments(output_dir="unused", max_steps=1, layer_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rate_of) == len(list(model.parameters()))
    named = dict(model.named_parameters())
    assert rate_of[id(named["logit_scale"])] == 0.1
    assert rate_of[id(named["vision_model.encoder.layers.1.mlp.fc1.bias"])] == pytest.approx(0.05)
    assert rate_of[id(named["vision_model.embeddings.patch_embedding.weight"])] == pytest.approx(0.0125)
    assert isinstance(optimizer, torch.optim.AdamW)
