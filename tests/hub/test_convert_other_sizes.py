"""Official-layout checkpoints of other sizes answer, once converted, as the release's formulas say.

The formulas are written out here over the official keys, without any class of this package or of transformers; the
golden outputs of the release hold them to it.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModel

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, FVLMConfig, FVLMModel
from medclip_hf.hub.convert import convert_checkpoint, export_official
from medclip_hf.hub.convert_conceptclip import to_official_state_dict as conceptclip_to_official
from medclip_hf.hub.convert_fvlm import to_official_state_dict as fvlm_to_official

VOCABULARY = 50


def norm(x, weights, key, eps):
    return F.layer_norm(x, x.shape[-1:], weights[f"{key}.weight"], weights[f"{key}.bias"], eps)


def linear(x, weights, key):
    return F.linear(x, weights[f"{key}.weight"], weights.get(f"{key}.bias"))


def attend(query, key, value, num_heads, bias=0.0):
    query, key, value = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def layers(weights, pattern):
    count = 0
    while pattern.format(count) in weights:
        yield count
        count += 1


def bert(ids, mask, weights, prefix, num_heads, has_types):
    table = f"{prefix}embeddings."
    x = weights[f"{table}word_embeddings.weight"][ids] + weights[f"{table}position_embeddings.weight"][: ids.shape[1]]
    if has_types:
        x = x + weights[f"{table}token_type_embeddings.weight"][0]
    x = norm(x, weights, f"{table}LayerNorm", 1e-12)
    bias = (1 - mask[:, None, None].float()) * -10000.0
    for index in layers(weights, prefix + "encoder.layer.{}.attention.self.query.weight"):
        layer = f"{prefix}encoder.layer.{index}."
        query, key, value = (linear(x, weights, f"{layer}attention.self.{name}") for name in ("query", "key", "value"))
        told = linear(attend(query, key, value, num_heads, bias), weights, f"{layer}attention.output.dense")
        x = norm(x + told, weights, f"{layer}attention.output.LayerNorm", 1e-12)
        inner = F.gelu(linear(x, weights, f"{layer}intermediate.dense"))
        x = norm(x + linear(inner, weights, f"{layer}output.dense"), weights, f"{layer}output.LayerNorm", 1e-12)
    return x


def official_conceptclip(weights, pixels, ids, mask, image_heads, text_heads):
    kernel = weights["visual.trunk.patch_embed.proj.weight"]
    patches = F.conv2d(pixels, kernel, weights["visual.trunk.patch_embed.proj.bias"], stride=kernel.shape[-1])
    x = patches.flatten(2).transpose(1, 2) + weights["visual.trunk.pos_embed"]
    for index in layers(weights, "visual.trunk.blocks.{}.norm1.weight"):
        block = f"visual.trunk.blocks.{index}."
        query, key, value = linear(norm(x, weights, f"{block}norm1", 1e-6), weights, f"{block}attn.qkv").chunk(3, -1)
        x = x + linear(attend(query, key, value, image_heads), weights, f"{block}attn.proj")
        inner = F.gelu(linear(norm(x, weights, f"{block}norm2", 1e-6), weights, f"{block}mlp.fc1"))
        x = x + linear(inner, weights, f"{block}mlp.fc2")
    x, pool = norm(x, weights, "visual.trunk.norm", 1e-6), "visual.trunk.attn_pool."
    query = linear(weights[f"{pool}latent"].expand(len(x), -1, -1), weights, f"{pool}q")
    key, value = linear(x, weights, f"{pool}kv").chunk(2, -1)
    image = linear(attend(query, key, value, image_heads), weights, f"{pool}proj")
    inner = F.gelu(linear(norm(image, weights, f"{pool}norm", 1e-6), weights, f"{pool}mlp.fc1"))
    image = F.normalize((image + linear(inner, weights, f"{pool}mlp.fc2"))[:, 0], dim=-1)
    tokens = bert(ids, mask, weights, "text.transformer.", text_heads, has_types=True)
    pooled = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return image, F.normalize(linear(pooled, weights, "text.proj"), dim=-1)


def official_fvlm(weights, volume, anatomy_mask, ids, mask, image_heads, text_heads, feature_layers, num_anatomies):
    patch = "visual_encoder.patch_embedding."
    kernel = weights[f"{patch}patch_embeddings.weight"]
    x = F.conv3d(volume, kernel, weights[f"{patch}patch_embeddings.bias"], stride=kernel.shape[2:])
    x, levels = x.flatten(2).transpose(1, 2) + weights[f"{patch}position_embeddings"], []
    for index in layers(weights, "visual_encoder.blocks.{}.norm1.weight"):
        block = f"visual_encoder.blocks.{index}."
        query, key, value = linear(norm(x, weights, f"{block}norm1", 1e-5), weights, f"{block}attn.qkv").chunk(3, -1)
        x = x + linear(attend(query, key, value, image_heads), weights, f"{block}attn.out_proj")
        inner = F.gelu(linear(norm(x, weights, f"{block}norm2", 1e-5), weights, f"{block}mlp.linear1"))
        x = x + linear(inner, weights, f"{block}mlp.linear2")
        levels += [x] * (index in feature_layers)
    levels.append(norm(x, weights, "visual_encoder.norm", 1e-5))
    into = list(
        zip(weights["attention.in_proj_weight"].chunk(3), weights["attention.in_proj_bias"].chunk(3), strict=True)
    )
    embeds = []
    for anatomy in range(num_anatomies):
        inside = F.max_pool3d((anatomy_mask == anatomy + 1).float()[:, None], kernel.shape[2:], kernel.shape[2:])
        chosen = inside.flatten() > 0  # of one volume
        tokens = torch.cat([level[0, chosen] for level in levels])[None]
        query = weights["query_tokens"][anatomy].view(1, 1, -1)
        query, key, value = (F.linear(x, *part) for x, part in zip((query, tokens, tokens), into, strict=True))
        pooled = linear(attend(query, key, value, 4), weights, "attention.out_proj")[0, 0]
        embeds.append(F.normalize(linear(pooled, weights, f"vision_projs.{anatomy}"), dim=-1))
    text = bert(ids, mask, weights, "text_encoder.", text_heads, has_types=False)[:, 0]
    return torch.stack(embeds), F.normalize(linear(text, weights, "text_proj"), dim=-1)


def shaken(weights):
    """The weights with noise, so that no bias, norm or position that goes astray stays unseen."""
    generator = torch.Generator().manual_seed(1)
    return {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in weights.items()}


def texts():
    ids = torch.randint(5, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return ids, mask


def text_config(num_layers):
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": num_layers, "num_attention_heads": 2}
    return sizes | {"vocab_size": VOCABULARY, "max_position_embeddings": 16}


def write_shards(folder, weights):
    folder.mkdir()
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, keys in shards.items():
        save_file({key: weights[key] for key in keys}, folder / name)
    places = {key: name for name, keys in shards.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize(
    ("sizes", "text_layers", "form"),
    [
        ({"hidden_size": 32, "num_hidden_layers": 2, "image_size": 28, "patch_size": 7}, 1, "single"),
        ({"hidden_size": 48, "num_hidden_layers": 3, "image_size": 30, "patch_size": 7}, 3, "shards"),
        ({"hidden_size": 16, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4}, 2, "training file"),
        ({"hidden_size": 16, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4}, 0, "single"),
    ],
)
def test_a_conceptclip_of_another_size_answers_as_the_formulas_and_goes_back(tmp_path, sizes, text_layers, form):
    vision = sizes | {"num_attention_heads": 4, "intermediate_size": 3 * sizes["hidden_size"] - 1, "hidden_act": "gelu"}
    torch.manual_seed(0)
    model = ConceptCLIPModel(ConceptCLIPConfig(vision_config=vision, text_config=text_config(text_layers)))
    weights = shaken(conceptclip_to_official(model.state_dict()))
    source = tmp_path / "weights.pt"
    if form == "single":
        save_file(weights, source := tmp_path / "weights.safetensors")
    elif form == "shards":
        write_shards(source := tmp_path / "shards", weights)
    else:
        moments = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
        wrapped = {f"module._orig_mod.{key}": value for key, value in weights.items()}
        torch.save({"epoch": 7, "name": "run", "state_dict": wrapped, "optimizer": moments}, source)
    heads = {"num_attention_heads": 4, "image_size": sizes["image_size"]}
    config = {"vision_config": heads, "text_config": {"num_attention_heads": 2}}
    report = convert_checkpoint(source, tmp_path / "out", config=config, with_processor=False)
    assert len(report["source"]) == (3 if form == "shards" else 1)
    (ids, mask), side = texts(), sizes["image_size"]
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = AutoModel.from_pretrained(tmp_path / "out")(ids, pixels, attention_mask=mask)
    image, text = official_conceptclip(weights, pixels, ids, mask, 4, 2)
    torch.testing.assert_close(found.image_embeds, image, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.text_embeds, text, rtol=0, atol=1e-5)
    export_official(tmp_path / "out", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in back.items())


@pytest.mark.parametrize(
    ("num_layers", "feature_layers", "num_anatomies", "text_layers"), [(2, [0], 2, 1), (4, [0, 2], 5, 2)]
)
def test_an_fvlm_of_another_size_answers_as_the_formulas(
    tmp_path, num_layers, feature_layers, num_anatomies, text_layers
):
    vision = {"hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": num_layers, "num_attention_heads": 4}
    vision |= {"image_size_dhw": [8, 16, 24], "patch_size_dhw": [4, 8, 8]}
    told = {"feature_layers": feature_layers, "anatomies": [f"organ {index}" for index in range(num_anatomies)]}
    torch.manual_seed(0)
    fields = told | {"vision_config": vision, "text_config": text_config(text_layers), "projection_dim": 20}
    weights = shaken(fvlm_to_official(FVLMModel(FVLMConfig(**fields)).state_dict()))
    weights["temp"] = torch.tensor(0.05)
    leftovers = {
        "text_encoder.embeddings.token_type_embeddings.weight": torch.ones(2, 24),
        "text_encoder.encoder.layer.0.crossattention.self.query.weight": torch.ones(24, 24),
        "text_encoder.cls.predictions.bias": torch.ones(VOCABULARY),
        "visual_encoder.blocks.0.norm_cross_attn.weight": torch.ones(24),
    }
    extra = {"optimizer": {}, "config": {"run": {"lr": 1e-4}}, "scaler": {"scale": 1.0}, "epoch": 3}
    torch.save({"model": weights | leftovers, **extra}, tmp_path / "model.pth")
    told["vision_config"] = {"num_attention_heads": 4, "image_size_dhw": vision["image_size_dhw"]}
    told["text_config"] = {"num_attention_heads": 2}
    report = convert_checkpoint(tmp_path / "model.pth", tmp_path / "out", config=told, with_processor=False)
    assert report["dropped"].keys() == leftovers.keys()

    generator = torch.Generator().manual_seed(3)
    volume = torch.rand(1, 1, 8, 16, 24, generator=generator)
    anatomy_mask = torch.zeros(1, 8, 16, 24, dtype=torch.long)
    inner = anatomy_mask[:, 2:-2, 2:-2, 2:-2]  # what touches the border is not complete
    inner.copy_(torch.randint(0, num_anatomies + 1, inner.shape, generator=generator))
    ids, mask = texts()
    model = AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=volume, anatomy_mask=anatomy_mask, attention_mask=mask)
    anatomies, text = official_fvlm(weights, volume, anatomy_mask, ids, mask, 4, 2, feature_layers, num_anatomies)
    torch.testing.assert_close(found.anatomy_embeds[0], anatomies, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.text_embeds, text, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.logit_scale.exp(), torch.tensor([20.0]))
    export_official(tmp_path / "out", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert back.keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in back.items() if key != "temp")


def test_the_formulas_are_those_of_the_release(goldens):
    golden = load_file(goldens / "conceptclip_model_tiny.safetensors")
    weights = {key[3:]: value for key, value in golden.items() if key.startswith("sd.")}
    image, text = official_conceptclip(
        weights, golden["in.pixel_values"], golden["in.input_ids"], golden["in.attention_mask"], 4, 4
    )
    torch.testing.assert_close(image, golden["out.image_features"], rtol=0, atol=1e-5)
    torch.testing.assert_close(text, golden["out.text_features"], rtol=0, atol=1e-5)
