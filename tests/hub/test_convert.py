"""Conversion of files: a folder that loads, an account of every key, a way back, and sentences for what cannot be."""

import json
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, BertConfig, BertModel, BertTokenizer, SiglipVisionConfig
from transformers import SiglipVisionModel as SiglipTower

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, FVLMConfig, FVLMModel
from medclip_hf.hub import convert
from medclip_hf.hub.checkpoints import read_weights
from medclip_hf.hub.convert import (
    CHECK_NAME,
    REPORT_NAME,
    build_processor,
    convert_checkpoint,
    convert_towers,
    export_official,
)
from medclip_hf.hub.convert_check import check_folder, compare_checks
from medclip_hf.hub.convert_conceptclip import to_official_state_dict as conceptclip_to_official
from medclip_hf.hub.convert_fvlm import from_towers
from medclip_hf.hub.convert_fvlm import to_official_state_dict as fvlm_to_official

NUM_WORDS = 30
HEADS = {"vision_config": {"num_attention_heads": 2}, "text_config": {"num_attention_heads": 2}}
FVLM_FIELDS = {
    "vision_config": {"num_attention_heads": 2, "image_size_dhw": [8, 8, 8]},
    "text_config": {"num_attention_heads": 2},
    "anatomies": ["lung", "heart"],
    "feature_layers": [0],
    "pooling_num_attention_heads": 2,
}
FVLM_VISION = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
FVLM_VISION |= {"image_size_dhw": [8, 8, 8], "patch_size_dhw": [4, 4, 4]}
TEXT = {
    "vocab_size": NUM_WORDS,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 20,
}


def conceptclip(**fields) -> ConceptCLIPModel:
    vision = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    vision |= {"image_size": 8, "patch_size": 4, "hidden_act": "gelu"}
    torch.manual_seed(0)
    return ConceptCLIPModel(ConceptCLIPConfig(text_config=TEXT, vision_config=vision, **fields)).eval()


def fvlm() -> FVLMModel:
    fields = FVLM_FIELDS | {"vision_config": FVLM_VISION, "text_config": TEXT}
    torch.manual_seed(0)
    return FVLMModel(FVLMConfig(**fields, projection_dim=12)).eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return write_tokenizer(folder, NUM_WORDS)


def write_tokenizer(folder, num_words):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{index}" for index in range(num_words - 5))]
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)
    return folder


def write_official(path, model, wrapper=""):
    is_conceptclip = isinstance(model, ConceptCLIPModel)
    official = (conceptclip_to_official if is_conceptclip else fvlm_to_official)(model.state_dict())
    official = {wrapper + key: value for key, value in official.items()}
    if path.suffix == ".safetensors":
        save_file(official, path)
    else:
        torch.save({"epoch": 3, "state_dict" if is_conceptclip else "model": official}, path)
    return path


# There -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "epoch_3.pt"])
@pytest.mark.parametrize("is_second_stage", [False, True])
def test_conceptclip_of_either_stage_becomes_a_folder_that_answers_the_same(tmp_path, tokenizer, name, is_second_stage):
    model = conceptclip(use_patch_concept_alignment=is_second_stage)
    source = write_official(tmp_path / name, model, wrapper="module." if name.endswith(".pt") else "")
    report = convert_checkpoint(source, tmp_path / "out", tokenizer=tokenizer, config=HEADS)
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    assert loaded.config.use_patch_concept_alignment == is_second_stage
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(images=torch.zeros(3, 9, 9), text=["w1 w2"])
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)
    assert report == json.loads((tmp_path / "out" / REPORT_NAME).read_text())
    assert report["num_keys"]["came"] == report["num_keys"]["used"]


def test_fvlm_becomes_a_folder_that_answers_the_same(tmp_path, tokenizer):
    model = fvlm()
    with torch.no_grad():  # the release adds no token types, so none come back
        model.text_model.embeddings.token_type_embeddings.weight.zero_()
    source = write_official(tmp_path / "model.pth", model)
    report = convert_checkpoint(source, tmp_path / "out", tokenizer=tokenizer, config=FVLM_FIELDS)
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    for key, value in loaded.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-6, atol=0, msg=key)
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_processor.anatomies == ["lung", "heart"]
    assert report["made"] == {
        "text_model.embeddings.token_type_embeddings.weight": "zeros: the release adds no token types"
    }


def test_the_report_tells_what_became_of_every_key(tmp_path, tokenizer):
    official = conceptclip_to_official(conceptclip().state_dict())
    official["text.transformer.embeddings.position_ids"] = torch.arange(20)[None]
    torch.save({"state_dict": official}, tmp_path / "model.pt")
    report = convert_checkpoint(tmp_path / "model.pt", tmp_path / "out", tokenizer=tokenizer, config=HEADS)
    assert report["used"].keys() | report["dropped"].keys() == official.keys()
    fused = "visual.trunk.blocks.0.attn.qkv.weight"
    assert report["used"][fused] == [f"vision_model.encoder.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    assert report["dropped"] == {"text.transformer.embeddings.position_ids": "a counter, not a weight"}
    used = {name for names in report["used"].values() for name in names}
    assert used == load_file(tmp_path / "out" / "model.safetensors").keys()


def test_the_tokenizer_beside_the_checkpoint_is_found(tmp_path):
    write_official(write_tokenizer(tmp_path / "in", NUM_WORDS) / "model.safetensors", conceptclip())
    convert_checkpoint(tmp_path / "in", tmp_path / "out", config=HEADS)
    assert len(AutoProcessor.from_pretrained(tmp_path / "out").tokenizer) == NUM_WORDS


def test_weights_of_half_precision_stay_so(tmp_path, tokenizer):
    source = write_official(tmp_path / "model.safetensors", conceptclip().to(torch.bfloat16))
    convert_checkpoint(source, tmp_path / "out", tokenizer=tokenizer, config=HEADS)
    assert AutoModel.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_weights_of_several_formats_are_widened_and_the_report_tells_which(tmp_path, tokenizer):
    official = conceptclip_to_official(conceptclip().to(torch.bfloat16).state_dict())
    official |= {key: value.float() for key, value in official.items() if "norm" in key}
    save_file(official, tmp_path / "model.safetensors")
    report = convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", tokenizer=tokenizer, config=HEADS)
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.text_projection.weight, official["text.proj.weight"].float())
    assert "text_projection.weight" in report["widened"]["torch.bfloat16"]
    assert report["widened"].keys() == {"torch.bfloat16"}


def test_one_tensor_under_two_names_becomes_two(tmp_path):
    official = conceptclip_to_official(conceptclip().state_dict())
    official["visual.trunk.blocks.1.norm1.weight"] = official["visual.trunk.blocks.0.norm1.weight"]
    torch.save(official, tmp_path / "model.pt")
    convert_checkpoint(tmp_path / "model.pt", tmp_path / "out", config=HEADS, with_processor=False)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    layers = [weights[f"vision_model.encoder.layers.{layer}.layer_norm1.weight"] for layer in (0, 1)]
    assert torch.equal(layers[0], layers[1])


def test_an_fvlm_in_half_precision_goes_back_in_one_format(tmp_path):
    source = write_official(tmp_path / "model.pth", fvlm().half())
    convert_checkpoint(source, tmp_path / "out", config=FVLM_FIELDS, with_processor=False)
    export_official(tmp_path / "out", tmp_path / "back.pth")
    assert {value.dtype for value in read_weights(tmp_path / "back.pth").values()} == {torch.float16}


@pytest.mark.parametrize("name", ["conceptclip", "fvlm"])
def test_the_releases_golden_weights_convert_and_come_back(goldens, tmp_path, name):
    golden = load_file(goldens / f"{name}_model_tiny.safetensors")
    official = {key[3:]: value.clone() for key, value in golden.items() if key.startswith("sd.")}
    save_file(official, tmp_path / "official.safetensors")
    heads = {"vision_config": {"num_attention_heads": 4}, "text_config": {"num_attention_heads": 4}}
    size = {"image_size": 44} if name == "conceptclip" else {"image_size_dhw": [32, 48, 96]}
    config = heads | {"vision_config": heads["vision_config"] | size}
    convert_checkpoint(tmp_path / "official.safetensors", tmp_path / "out", config=config, with_processor=False)
    if name == "conceptclip":
        with torch.no_grad():
            outputs = AutoModel.from_pretrained(tmp_path / "out")(golden["in.input_ids"], golden["in.pixel_values"])
        torch.testing.assert_close(outputs.image_embeds, golden["out.image_features"], rtol=0, atol=1e-5)
        torch.testing.assert_close(outputs.text_embeds, golden["out.text_features"], rtol=0, atol=1e-5)
    export_official(tmp_path / "out", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    report = json.loads((tmp_path / "out" / REPORT_NAME).read_text())
    assert back.keys() == official.keys() - report["dropped"].keys()
    for key, value in back.items():
        if key == "temp":
            torch.testing.assert_close(value, official[key], rtol=1e-6, atol=0)  # through a logarithm
        else:
            assert torch.equal(value, official[key]), key


# Back ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "key"), [("back.safetensors", None), ("back.pt", "state_dict")])
def test_a_folder_goes_back_to_the_official_layout(tmp_path, name, key):
    model = conceptclip()
    model.save_pretrained(tmp_path / "saved")
    export_official(tmp_path / "saved", tmp_path / name)
    expected = conceptclip_to_official(model.state_dict())
    found = read_weights(tmp_path / name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    if key:
        assert torch.load(tmp_path / name, weights_only=True).keys() == {key}


def test_what_has_no_way_back_is_refused(tmp_path):
    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="model of type 'bert'"):
        export_official(tmp_path / "bert", tmp_path / "back.pt")
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        export_official(tmp_path / "bert", tmp_path / "back.pkl")
    with pytest.raises(ValueError, match=r"no config\.json"):
        export_official(tmp_path, tmp_path / "back.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "config.json is no JSON"),
        ("[" * 100_000, "config.json is no JSON"),
        ("[]", "must hold an object, but a list came"),
        ({"hidden_size": "wide"}, "expected int, got str"),
        ({"hidden_act": "none"}, "no model can be built"),
        ({"num_hidden_layers": 1}, "superfluous"),
    ],
)
def test_a_folder_that_is_damaged_has_no_way_back(tmp_path, change, message):
    conceptclip().save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    if isinstance(change, dict):
        config = json.loads(file.read_text())
        config["vision_config"] |= change
        change = json.dumps(config)
    file.write_text(change)
    with pytest.raises(ValueError, match=message):
        export_official(tmp_path / "saved", tmp_path / "back.pt")


# Towers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bert(tmp_path):
    folder = tmp_path / "bert"
    BertModel(BertConfig(**TEXT)).save_pretrained(folder)
    return write_tokenizer(folder, NUM_WORDS)


def test_conceptclip_starts_from_a_siglip_and_a_bert_with_the_exact_gelu(tmp_path, bert):
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    tower = SiglipTower(SiglipVisionConfig(**sizes, image_size=8, patch_size=4))
    tower.save_pretrained(tmp_path / "siglip")
    report = convert_towers(tmp_path / "out", architecture="conceptclip", vision=tmp_path / "siglip", text=bert)
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    assert loaded.config.vision_config.hidden_act == "gelu"
    weights = loaded.vision_model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in tower.state_dict().items())
    assert "text_projection.weight" in report["made"]
    assert "text_model.embeddings.word_embeddings.weight" in report["used"]["text_model"]


def test_fvlm_starts_from_an_image_encoder_and_a_bert(tmp_path, bert):
    shapes = {"norm1": (16,), "norm2": (16,), "attn.qkv": (48, 16), "attn.proj": (16, 16)}
    shapes |= {"mlp.fc1": (20, 16), "mlp.fc2": (16, 20)}
    mae = {"cls_token": torch.zeros(1, 1, 16), "pos_embed": torch.randn(1, 10, 16)}
    mae |= {"patch_embed.proj.weight": torch.randn(16, 3, 4, 4), "patch_embed.proj.bias": torch.randn(16)}
    mae |= {"norm.weight": torch.randn(16), "norm.bias": torch.randn(16)}
    for name, shape in shapes.items():
        mae |= {f"blocks.0.{name}.weight": torch.randn(shape), f"blocks.0.{name}.bias": torch.randn(shape[0])}
    torch.save({"model": mae}, tmp_path / "mae.pth")
    vision = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields = FVLM_FIELDS | {"vision_config": vision | {"image_size_dhw": [8, 8, 8], "patch_size_dhw": [4, 4, 4]}}
    del fields["text_config"]
    report = convert_towers(
        tmp_path / "out", architecture="fvlm", vision=tmp_path / "mae.pth", text=bert, config=fields
    )
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.vision_model.post_layernorm.weight, mae["norm.weight"])
    assert "vision_model.embeddings.patch_embedding.weight" in report["made"]
    assert "vision_model.post_layernorm.weight" in report["used"]["vision_model"]


def test_fields_of_a_tower_are_merged_with_what_is_published(tmp_path, bert):
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    SiglipTower(SiglipVisionConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "siglip")
    config = {"vision_config": {"attention_dropout": 0.1}, "use_patch_concept_alignment": False}
    convert_towers(tmp_path / "out", architecture="conceptclip", vision=tmp_path / "siglip", text=bert, config=config)
    loaded = AutoModel.from_pretrained(tmp_path / "out").config
    assert (loaded.vision_config.hidden_act, loaded.vision_config.attention_dropout) == ("gelu", 0.1)
    assert not loaded.use_patch_concept_alignment


def test_a_text_tower_that_brings_code_is_read_without_it_and_leaves_no_trace(tmp_path, bert):
    """As CXR-BERT's repository is made: a type of its own, and code for model and tokenizer."""
    code = {"auto_map": {"AutoConfig": "cxr.Config", "AutoModel": "cxr.Model", "AutoTokenizer": ["cxr.Words", None]}}
    for name, changes in (("config.json", {"model_type": "cxr-bert"}), ("tokenizer_config.json", {})):
        values = json.loads((bert / name).read_text()) | code | changes
        (bert / name).write_text(json.dumps(values))
    (bert / "cxr.py").write_text(f"open({str(tmp_path / 'trapped')!r}, 'w')")
    model = from_towers(FVLMConfig(**FVLM_FIELDS | {"vision_config": FVLM_VISION}), text_path=bert)
    build_processor(model.config, bert).save_pretrained(tmp_path / "fvlm")
    model.save_pretrained(tmp_path / "fvlm")
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    SiglipTower(SiglipVisionConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "siglip")
    convert_towers(tmp_path / "clip", architecture="conceptclip", vision=tmp_path / "siglip", text=bert)
    assert not (tmp_path / "trapped").exists()
    for path in (*(tmp_path / "fvlm").glob("*.json"), *(tmp_path / "clip").glob("*.json")):
        assert "cxr." not in path.read_text(), path
        assert str(tmp_path) not in path.read_text(), path  # paths of this disk stay here


def test_towers_of_another_kind_are_refused(tmp_path, bert):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"model_type": "roberta"}))
    for architecture in ("conceptclip", "fvlm"):
        with pytest.raises(ValueError, match="is of type 'roberta'; expected bert or cxr-bert"):
            convert_towers(tmp_path / "out", architecture=architecture, vision=tmp_path / "siglip", text=bert)
    (bert / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is of type 'bert'; expected siglip or siglip_vision_model"):
        convert_towers(tmp_path / "out", architecture="conceptclip", vision=bert, text=bert)


def test_a_text_tower_that_lacks_weights_is_refused(tmp_path, bert):
    weights = load_file(bert / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no complete BERT: 1 weights are missing"):
        from_towers(FVLMConfig(**FVLM_FIELDS | {"vision_config": FVLM_VISION}), text_path=bert)


def test_the_same_towers_give_the_same_start(tmp_path, bert):
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    SiglipTower(SiglipVisionConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "siglip")
    for name in ("one", "two"):
        convert_towers(tmp_path / name, architecture="conceptclip", vision=tmp_path / "siglip", text=bert)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


# The self-check --------------------------------------------------------------------------------------------------


def test_the_self_check_finds_a_changed_weight(tmp_path, tokenizer):
    source = write_official(tmp_path / "model.safetensors", conceptclip())
    convert_checkpoint(source, tmp_path / "out", tokenizer=tokenizer, config=HEADS)
    recorded = json.loads((tmp_path / "out" / CHECK_NAME).read_text())
    assert recorded["outputs"].keys() >= {"image_embeds", "concept_logits"}
    assert compare_checks(check_folder(tmp_path / "out"), recorded) == []
    weights = {key: value.clone() for key, value in load_file(tmp_path / "out" / "model.safetensors").items()}
    weights["text_projection.weight"] *= -1
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    problems = compare_checks(check_folder(tmp_path / "out"), recorded)
    assert any("text_embeds" in problem for problem in problems)
    for record in ({}, {"outputs": {"image_embeds": 3}}, {"outputs": {"image_embeds": {"shape": [2, 12]}}}):
        with pytest.raises(ValueError, match="holds no outputs"):
            compare_checks(recorded, record)


def test_weights_that_are_not_finite_are_refused_and_leave_nothing(tmp_path, tokenizer):
    model = conceptclip()
    with torch.no_grad():
        model.text_projection.weight[0, 0] = torch.nan
    source = write_official(tmp_path / "model.safetensors", model)
    with pytest.raises(ValueError, match="not finite: the weights are damaged"):
        convert_checkpoint(source, tmp_path / "out", tokenizer=tokenizer, config=HEADS)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


# Bad input -------------------------------------------------------------------------------------------------------


def test_a_pickle_is_refused_by_its_name_and_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    for name in ("weights.pkl", "weights.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="a pickle runs code when it is read"):
        convert_checkpoint(tmp_path / "weights.pkl", tmp_path / "out")
    torch.save({"state_dict": {}, "more": Trap()}, tmp_path / "zipped.pt")
    for name in ("weights.pt", "zipped.pt"):
        with pytest.raises(ValueError, match="cannot be read as a checkpoint of plain tensors") as told:
            convert_checkpoint(tmp_path / name, tmp_path / "out")
        assert "weights_only" not in str(told.value)  # PyTorch's own message tells how to run it all the same
    assert "an object of posix.mkdir" in str(told.value)
    assert not (tmp_path / "trapped").exists()


def test_a_compressed_file_is_not_unpacked(tmp_path):
    """A few bytes of it may become more than there is memory; PyTorch writes none."""
    write_official(tmp_path / "model.pt", conceptclip())
    with (
        zipfile.ZipFile(tmp_path / "model.pt") as source,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in source.infolist():
            bomb.writestr(entry.filename, source.read(entry))
    with pytest.raises(ValueError, match="its parts are compressed, which PyTorch never does"):
        convert_checkpoint(tmp_path / "bomb.pt", tmp_path / "out", config=HEADS)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_a_truncated_file_is_told(tmp_path, name):
    source = write_official(tmp_path / name, conceptclip())
    source.write_bytes(source.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="truncated"):
        convert_checkpoint(source, tmp_path / "out", config=HEADS)


def test_weights_of_another_architecture_are_told(tmp_path):
    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="weights of another architecture"):
        convert_checkpoint(tmp_path / "bert", tmp_path / "out")
    conceptclip().save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="this package's names already"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "out")


def test_what_the_shapes_do_not_tell_is_asked_for(tmp_path, tokenizer):
    source = write_official(tmp_path / "model.safetensors", conceptclip())
    with pytest.raises(ValueError, match=r'"num_attention_heads"'):
        convert_checkpoint(source, tmp_path / "out", tokenizer=tokenizer)
    other = write_official(tmp_path / "model.pth", fvlm())
    fields = {key: value for key, value in FVLM_FIELDS.items() if key != "anatomies"}
    with pytest.raises(ValueError, match="2 anatomies; name them"):
        convert_checkpoint(other, tmp_path / "out", tokenizer=tokenizer, config=fields)


def test_a_field_that_no_configuration_has_is_named(tmp_path, tokenizer):
    source = write_official(tmp_path / "model.safetensors", conceptclip())
    for fields, message in (
        (HEADS | {"open_clip_config": {}}, r"the configuration of conceptclip has no \['open_clip_config'\]"),
        ({"vision_config": {"num_heads": 2}}, r"vision_config of conceptclip has no \['num_heads'\]"),
        ({"text_config": 3}, "must be an object with fields"),
        (HEADS | {"text_config": {"num_attention_heads": 2, "intermediate_size": "two"}}, "expected int, got str"),
        (HEADS | {"text_config": {"num_attention_heads": 0}}, "must be a whole number above 0"),
        (HEADS | {"vision_config": {"num_attention_heads": 2, "hidden_act": "none"}}, "no model can be built"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(source, tmp_path / "out", tokenizer=tokenizer, config=fields)


def test_weights_of_wrong_shapes_are_named(tmp_path, tokenizer):
    official = conceptclip_to_official(conceptclip().state_dict())
    official["visual.trunk.blocks.1.mlp.fc1.weight"] = torch.zeros(20, 11)
    save_file(official, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.fc1\.weight: \(20, 11\) instead of \(20, 12\)"):
        convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", tokenizer=tokenizer, config=HEADS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.trunk.blocks.0.attn.qkv.weight": torch.zeros(2, 12)}, "no fused query, key and value"),
        ({"logit_scale": torch.zeros(2)}, "expected one number"),
        ({"module.logit_scale": torch.zeros(())}, r"come twice, with and without 'module\.': \['logit_scale'\]"),
        ({"visual.trunk.pos_embed": torch.zeros(1, 3, 12)}, "position_embedding"),
        ({"logit_scale": torch.tensor(3)}, r"weights of \['torch.int64'\]: \['logit_scale'\]"),
        ({"visual.trunk.attn_pool.q.weight": torch.zeros(12, 7)}, "do not belong together"),
        (
            {"visual.trunk.patch_embed.proj.weight": torch.zeros(12)},
            r"4 axes, none empty, but a weight of shape \(12,\)",
        ),
        ({"text.transformer.embeddings.word_embeddings.weight": torch.zeros(0, 8)}, r"shape \(0, 8\) came"),
    ],
)
def test_a_damaged_weight_is_named(tmp_path, change, message):
    official = conceptclip_to_official(conceptclip().state_dict()) | change
    save_file(official, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", config=HEADS, with_processor=False)


def test_shards_that_lie_elsewhere_are_not_followed(tmp_path):
    (tmp_path / "in").mkdir()
    index = {"weight_map": {"logit_scale": "../secret.safetensors"}}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="are no safetensors beside it"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out")


def test_an_index_that_does_not_tell_what_its_shards_hold_is_refused(tmp_path):
    save_file({"one": torch.ones(1)}, tmp_path / "a.safetensors")
    for weight_map, message in (
        ({"one": "a.safetensors", "two": "a.safetensors"}, r"do not name the same weights: \['two'\]"),
        ({}, "0 keys"),
        ([], "has a weight_map"),
        ({"one": 3}, "has a weight_map"),
        ({"one": "b.safetensors"}, "No such file"),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(tmp_path, tmp_path / "out")


def test_tensors_without_values_and_sparse_ones_are_named(tmp_path):
    for odd in (torch.zeros(2, 2, device="meta"), torch.zeros(2, 2).to_sparse()):
        torch.save({"text.proj.weight": odd}, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=r"\['text.proj.weight'\]. Save them as dense tensors"):
            read_weights(tmp_path / "model.pt")


def test_a_temperature_that_is_not_above_zero_is_told(tmp_path):
    official = fvlm_to_official(fvlm().state_dict()) | {"temp": torch.tensor(0.0)}
    torch.save({"model": official}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"temp is 0\.0"):
        convert_checkpoint(tmp_path / "model.pth", tmp_path / "out", config=FVLM_FIELDS, with_processor=False)


def test_a_tokenizer_that_is_missing_or_anothers_is_told(tmp_path):
    source = write_official(tmp_path / "model.safetensors", conceptclip())
    with pytest.raises(ValueError, match="no tokenizer beside the checkpoint"):
        convert_checkpoint(source, tmp_path / "out", config=HEADS)
    damaged = write_tokenizer(tmp_path / "damaged", NUM_WORDS)
    for text in ("{}", '{"model": {"type": "WordPiece"}, "added_tokens": []}'):
        (damaged / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match="no tokenizer of BERT that can be read"):
            convert_checkpoint(source, tmp_path / "out", tokenizer=damaged, config=HEADS)
    other = write_tokenizer(tmp_path / "other", 12)
    with pytest.raises(ValueError, match="knows 12 pieces, but the text tower has 30"):
        convert_checkpoint(source, tmp_path / "out", tokenizer=other, config=HEADS)


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path, tokenizer):
    source = write_official(tmp_path / "model.safetensors", conceptclip())
    with pytest.raises(ValueError, match="is not empty"):
        convert_checkpoint(source, tmp_path, tokenizer=tokenizer, config=HEADS)


def test_what_was_written_is_compared_with_what_was_meant(tmp_path):
    weights = {"one": torch.arange(6.0), "two": torch.ones(2, dtype=torch.bfloat16)}
    save_file(weights, tmp_path / "model.safetensors")
    convert._check_written(tmp_path, weights)
    with pytest.raises(ValueError, match=r"\['one', 'three'\]"):
        convert._check_written(tmp_path, {**weights, "one": torch.zeros(6), "three": torch.ones(1)})


# The command -----------------------------------------------------------------------------------------------------


def test_the_command_converts_checks_goes_back_and_tells_a_mistake_in_one_sentence(repository, tmp_path, tokenizer):
    write_official(tmp_path / "model.safetensors", conceptclip())
    (tmp_path / "heads.json").write_text(json.dumps(HEADS))
    script = str(repository / "scripts" / "convert_checkpoint.py")
    code = "import runpy, sys; main = runpy.run_path(sys.argv[1])['main']; "
    code += "print([main(command.split()) for command in sys.argv[2:]])"
    commands = [
        f"official --checkpoint {tmp_path}/model.safetensors --tokenizer {tokenizer} --config {tmp_path}/heads.json "
        f"--output {tmp_path}/out",
        f"check --model {tmp_path}/out",
        f"back --model {tmp_path}/out --output {tmp_path}/back.safetensors",
        f"official --checkpoint {tmp_path}/absent.pt --output {tmp_path}/none",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    child = subprocess.run(
        [sys.executable, "-c", code, script, *commands], capture_output=True, text=True, env=environment, timeout=300
    )
    assert child.stdout.endswith("[0, 0, 0, 2]\n"), child.stderr
    assert "answers as recorded" in child.stdout
    assert f"error: {tmp_path}/absent.pt is not a file" in child.stderr
    assert "Traceback" not in child.stderr
    before, after = (load_file(tmp_path / name) for name in ("model.safetensors", "back.safetensors"))
    assert all(torch.equal(value, after[key]) for key, value in before.items())
