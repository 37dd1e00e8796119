"""Adapters: all of them learn, the base does not, and they go on no other base than their own."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, FVLMConfig, FVLMModel
from medclip_hf.modeling.conceptclip.image_classification_conceptclip import ConceptCLIPForImageClassification
from medclip_hf.modeling.fvlm.anatomy_classification_fvlm import FVLMForAnatomyClassification
from medclip_hf.training import lora
from medclip_hf.training.lora import (
    TARGETS,
    AdapterSettings,
    BaseFacts,
    add_adapter,
    fingerprint,
    load_adapters,
    merge_adapter,
    target_pattern,
)

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
DROPLESS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXT = {"input_ids": torch.tensor([[2, 5, 6, 3], [2, 7, 8, 3]])}
IMAGES = {"pixel_values": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))}
MASK = torch.zeros(2, 8, 8, 8, dtype=torch.uint8)
MASK[:, 1:3], MASK[:, 5:7] = 1, 2
SCANS = {"pixel_values": torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)), "anatomy_mask": MASK}
FINDINGS = {"nodule": "lung", "cardiomegaly": "heart"}


def conceptclip(seed=0):
    torch.manual_seed(seed)
    vision = {**SIZES, "hidden_size": 16, "image_size": 12, "patch_size": 4}
    return ConceptCLIPModel(
        ConceptCLIPConfig(text_config={**SIZES, **DROPLESS, "vocab_size": 20, "hidden_size": 8}, vision_config=vision)
    )


def fvlm(seed=0, anatomies=("lung", "heart")):
    torch.manual_seed(seed)
    size = {"image_size_dhw": (8, 8, 8), "patch_size_dhw": (4, 4, 4), "hidden_dropout": 0.0, "attention_dropout": 0.0}
    return FVLMModel(
        FVLMConfig(
            text_config={**SIZES, **DROPLESS, "vocab_size": 20, "hidden_size": 8},
            vision_config={**SIZES, **size, "hidden_size": 16},
            feature_layers=(0,),
            projection_dim=8,
            anatomies=anatomies,
            pooling_num_attention_heads=2,
            pooling_dropout=0.0,
        )
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of pre-trained models."""
    folder = tmp_path_factory.mktemp("bases")
    conceptclip().save_pretrained(folder / "conceptclip")
    conceptclip(seed=7).save_pretrained(folder / "other_conceptclip")
    fvlm().save_pretrained(folder / "fvlm")
    fvlm(anatomies=("lung", "liver")).save_pretrained(folder / "other_anatomies")
    return folder


def load(bases, kind):
    if kind == "ConceptCLIPModel":
        return ConceptCLIPModel.from_pretrained(bases / "conceptclip"), IMAGES | TEXT
    if kind == "ConceptCLIPForImageClassification":
        labels = {0: "a", 1: "b", 2: "c"}
        return ConceptCLIPForImageClassification.from_pretrained(bases / "conceptclip", id2label=labels), IMAGES
    if kind == "FVLMModel":
        return FVLMModel.from_pretrained(bases / "fvlm"), SCANS | TEXT
    return FVLMForAnatomyClassification.from_pretrained(bases / "fvlm", findings=FINDINGS), SCANS


def what_it_says(model, inputs):
    """Everything that a model gives back to compare by, as one vector."""
    outputs = model(**inputs)
    names = ("logits", "image_embeds", "text_embeds", "anatomy_embeds")
    return torch.cat([outputs[name].flatten() for name in names if outputs.get(name) is not None])


def base_folder(bases, kind):
    return str(bases / ("conceptclip" if kind.startswith("Concept") else "fvlm"))


def make_adapter(bases, kind, folder, *, seed=0, **settings):
    """A saved adapter that changes the model, and the model with it."""
    model, inputs = load(bases, kind)
    facts = BaseFacts.of(model)
    adapted = add_adapter(
        model, AdapterSettings(**{"rank": 2, "targets": TARGETS} | settings), base_folder(bases, kind)
    )
    torch.manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.eval().save_pretrained(str(folder))
    facts.save_pretrained(folder)
    return adapted, inputs


KINDS = ("ConceptCLIPModel", "ConceptCLIPForImageClassification", "FVLMModel", "FVLMForAnatomyClassification")


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_parameter_gets_a_gradient_and_the_base_none(bases, tmp_path, kind, use_dora):
    adapted, inputs = make_adapter(bases, kind, tmp_path, use_dora=use_dora)
    said = what_it_says(adapted.train(), inputs)
    (said * torch.arange(1.0, 1 + len(said))).sum().backward()  # embeddings have length 1: their squares tell nothing
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()] == []
    assert all("lora" in name or "classifier" in name for name in trained)
    assert all(parameter.grad is None for name, parameter in adapted.named_parameters() if name not in trained)
    towers = 2 if kind in ("ConceptCLIPModel", "FVLMModel") else 1
    assert sum("lora_A" in name for name in trained) == towers * 2 * (len(TARGETS) - 1)  # two blocks a tower
    assert sum("lora_embedding_A" in name for name in trained) == towers - 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing(bases, kind):
    model, inputs = load(bases, kind)
    before = what_it_says(model.eval(), inputs)
    after = what_it_says(add_adapter(model, AdapterSettings(), "base").eval(), inputs)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_loads_and_merges_with_equal_outputs(bases, tmp_path, kind, use_dora):
    adapted, inputs = make_adapter(bases, kind, tmp_path / "adapter", use_dora=use_dora)
    expected = what_it_says(adapted, inputs).detach()
    loaded = load_adapters({"default": tmp_path / "adapter"})
    torch.testing.assert_close(what_it_says(loaded, inputs), expected, rtol=0, atol=0)
    by_class = type(adapted.get_base_model()).from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(what_it_says(by_class, inputs), expected, rtol=0, atol=0)
    merged = merge_adapter(tmp_path / "adapter")
    assert not isinstance(merged, PeftModel)
    merged.save_pretrained(tmp_path / "merged")
    plain = type(merged).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(what_it_says(plain, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
def test_auto_model_loads_an_adapter_folder(bases, tmp_path, use_dora):
    adapted, inputs = make_adapter(bases, "ConceptCLIPModel", tmp_path, use_dora=use_dora)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(what_it_says(loaded, inputs), what_it_says(adapted, inputs), rtol=0, atol=0)


def test_several_adapters_are_switched_on_one_base(bases, tmp_path):
    made = {
        name: make_adapter(bases, "ConceptCLIPForImageClassification", tmp_path / name, seed=seed)
        for seed, name in enumerate(("chest", "skin"))
    }
    model = load_adapters({name: tmp_path / name for name in made})
    for name in ("chest", "skin", "chest"):
        model.set_adapter(name)
        expected = what_it_says(*made[name])
        torch.testing.assert_close(what_it_says(model, IMAGES), expected, rtol=0, atol=0)


def test_adapters_of_other_labels_do_not_go_on_one_base(bases, tmp_path):
    make_adapter(bases, "ConceptCLIPForImageClassification", tmp_path / "one")
    make_adapter(bases, "ConceptCLIPForImageClassification", tmp_path / "two")
    head = json.loads((tmp_path / "two" / "head_config.json").read_text())
    (tmp_path / "two" / "head_config.json").write_text(json.dumps(head | {"id2label": {"0": "x", "1": "y"}}))
    with pytest.raises(ValueError, match="differ in head"):
        load_adapters({"one": tmp_path / "one", "two": tmp_path / "two"})


def test_an_adapter_for_another_base_is_refused(bases, tmp_path):
    make_adapter(bases, "ConceptCLIPModel", tmp_path)
    with pytest.raises(ValueError, match="other weights"):
        load_adapters({"default": tmp_path}, base=str(bases / "other_conceptclip"))


def test_a_base_with_other_anatomies_is_refused(bases, tmp_path):
    make_adapter(bases, "FVLMModel", tmp_path)
    with pytest.raises(ValueError, match=r"\['lung', 'heart'\].*\['lung', 'liver'\]"):
        merge_adapter(tmp_path, base=str(bases / "other_anatomies"))


def test_a_base_that_lacks_weights_is_refused_and_a_fresh_head_is_not(bases, tmp_path):
    labels = conceptclip().config
    labels.id2label = {0: "a", 1: "b"}
    lora.load_pretrained(ConceptCLIPForImageClassification, str(bases / "conceptclip"), labels)
    shutil.copytree(bases / "conceptclip", tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    del weights["vision_model.head.probe"]
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing, such as vision_model\.head\.probe"):
        lora.load_pretrained(ConceptCLIPForImageClassification, str(tmp_path / "broken"), labels)


def test_a_folder_that_is_no_adapter_of_ours_is_refused(bases, tmp_path):
    with pytest.raises(ValueError, match="adapter_config"):
        load_adapters({"default": bases / "conceptclip"})
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="which base"):
        load_adapters({"default": tmp_path})
    with pytest.raises(ValueError, match="no adapter"):
        load_adapters({})


def test_damaged_weights_are_told_in_a_sentence(bases, tmp_path):
    make_adapter(bases, "ConceptCLIPModel", tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged or missing"):
        load_adapters({"default": tmp_path})


def test_the_fingerprint_tells_weights_apart_but_not_their_precision_nor_a_fresh_head(bases):
    model = ConceptCLIPModel.from_pretrained(bases / "conceptclip")
    half = ConceptCLIPModel.from_pretrained(bases / "conceptclip", dtype=torch.bfloat16)
    assert fingerprint(model) == fingerprint(half)
    heads = [load(bases, "ConceptCLIPForImageClassification")[0] for _ in range(2)]
    assert fingerprint(heads[0]) == fingerprint(heads[1])
    with torch.no_grad():
        model.vision_model.encoder.layers[0].mlp.fc1.weight.mul_(1.1)
    assert fingerprint(model) != fingerprint(half)


def test_targets_and_towers_are_named(bases):
    model, _ = load(bases, "ConceptCLIPModel")
    pattern = target_pattern(model, AdapterSettings(targets=("query",), towers=("text",)))
    assert pattern == r"text_model\.encoder\.layer\.\d+\.(attention\.self\.query)"
    with pytest.raises(ValueError, match="no text tower"):
        target_pattern(load(bases, "FVLMForAnatomyClassification")[0], AdapterSettings(towers=("text",)))
    with pytest.raises(ValueError, match=r"none of method\.targets"):
        target_pattern(model, AdapterSettings(targets=("word_embeddings",), towers=("vision",)))
    with pytest.raises(ValueError, match="querry"):
        AdapterSettings(targets=("querry",))
    with pytest.raises(ValueError, match="rank"):
        AdapterSettings(rank=0)


def test_4_bits_without_their_library_or_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"medclip-hf\[qlora\]"):
        lora.require_4bit()
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="CUDA"):
        lora.require_4bit()
