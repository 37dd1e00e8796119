"""Saved heads (question answering, reports of images and of CT) carry their code and work without the package."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer, GPT2Config
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, ConceptCLIPProcessor, FVLMConfig
from medclip_hf.modeling.conceptclip.report_generation_conceptclip import (
    ConceptCLIPForReportGeneration,
    ConceptCLIPReportGenerationConfig,
)
from medclip_hf.modeling.conceptclip.visual_question_answering_conceptclip import (
    ConceptCLIPForVisualQuestionAnswering,
    ConceptCLIPVisualQuestionAnsweringConfig,
)
from medclip_hf.modeling.fvlm.report_generation_fvlm import FVLMForReportGeneration, FVLMReportGenerationConfig

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
VISION = {**SIZES, "hidden_size": 16, "image_size": 12, "patch_size": 4, "hidden_act": "gelu"}
TEXT = {**SIZES, "vocab_size": 20, "hidden_size": 8, "max_position_embeddings": 10}
LANGUAGE = GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)

# Runs in a process of its own, for every head one after the other: load, run, save, load again, run again.
STRANGER = """
import sys

import torch, transformers
from safetensors.torch import load_file, save_file

for folder in sys.argv[1:]:
    inputs = load_file(folder + "/inputs.safetensors")
    def run(folder, auto_class):
        model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
        with torch.no_grad():
            return model, model(**inputs).logits
    auto_class = getattr(transformers, open(folder + "/auto_class.txt").read())
    model, logits = run(folder, auto_class)
    model.save_pretrained(folder + "/second")
    _, again = run(folder + "/second", auto_class)
    assert torch.equal(logits, again)
    result = {"logits": logits}
    if hasattr(model, "language_model"):
        picture = {name: value for name, value in inputs.items() if name != "attention_mask"}
        result["tokens"] = model.generate(**picture, max_new_tokens=4, do_sample=False, pad_token_id=0)
    save_file(result, folder + "/result.safetensors")
"""


def make_vqa():
    base = ConceptCLIPModel(ConceptCLIPConfig(text_config=TEXT, vision_config=VISION))
    cross = {**SIZES, "hidden_size": 12}
    return ConceptCLIPForVisualQuestionAnswering.from_conceptclip(base, ["no", "yes"], cross_modal_config=cross)


def make_image_reports():
    config = ConceptCLIPReportGenerationConfig(vision_config=VISION, text_config=LANGUAGE.to_dict())
    return ConceptCLIPForReportGeneration(config)


def make_ct_reports():
    vision = {**SIZES, "hidden_size": 12, "image_size_dhw": (4, 4, 4), "patch_size_dhw": (2, 2, 2)}
    fvlm = FVLMConfig(
        text_config=TEXT, vision_config=vision, projection_dim=6, feature_layers=(0,), pooling_num_attention_heads=2
    )
    return FVLMForReportGeneration(FVLMReportGenerationConfig(fvlm_config=fvlm, text_config=LANGUAGE.to_dict()))


HEADS = {
    "vqa": (
        make_vqa,
        ConceptCLIPVisualQuestionAnsweringConfig,
        "AutoModelForVisualQuestionAnswering",
        {"pixel_values": torch.ones(1, 3, 12, 12)},
    ),
    "image_reports": (
        make_image_reports,
        ConceptCLIPReportGenerationConfig,
        "AutoModelForImageTextToText",
        {"pixel_values": torch.ones(1, 2, 3, 12, 12)},
    ),
    "ct_reports": (
        make_ct_reports,
        FVLMReportGenerationConfig,
        "AutoModelForImageTextToText",
        {"pixel_values": torch.ones(1, 1, 4, 4, 4), "anatomy_mask": torch.ones(1, 4, 4, 4, dtype=torch.uint8)},
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, tuple[Path, torch.nn.Module, dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    folders = {}
    for name, (make, config_class, auto_class, picture) in HEADS.items():
        model = make().eval()
        config_class.register_for_auto_class()
        type(model).register_for_auto_class(auto_class)
        folder = tmp_path_factory.mktemp("hub") / name
        model.save_pretrained(folder)
        inputs = {"input_ids": torch.tensor([[2, 7, 8, 3]]), "attention_mask": torch.ones(1, 4).long(), **picture}
        save_file(inputs, folder / "inputs.safetensors")
        (folder / "auto_class.txt").write_text(auto_class)
        folders[name] = (folder, model, inputs)
    return folders


@pytest.mark.parametrize("name", list(HEADS))
def test_the_folder_holds_the_code_and_names_its_classes(saved, name):
    folder, model, _ = saved[name]
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"].endswith(type(model.config).__name__)
    assert auto_map[HEADS[name][2]].endswith(type(model).__name__)
    for value in auto_map.values():
        assert (folder / f"{value.split('.')[0]}.py").is_file()


def test_the_heads_give_the_same_bits_where_the_package_is_absent(saved, run_without_package):
    run_without_package(STRANGER, *(folder for folder, _, _ in saved.values()))
    for folder, model, inputs in saved.values():
        there = load_file(folder / "result.safetensors")
        with torch.no_grad():
            assert torch.equal(there["logits"], model(**inputs).logits)
        if "tokens" in there:
            picture = {name: value for name, value in inputs.items() if name != "attention_mask"}
            here = model.generate(**picture, max_new_tokens=4, do_sample=False, pad_token_id=0)
            assert torch.equal(there["tokens"], here)


def test_a_processor_with_the_language_model_s_tokenizer_travels_beside_it(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "normal"]
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(words)})
    processor = ConceptCLIPProcessor(SiglipImageProcessorPil(size={"height": 12, "width": 12}), tokenizer)
    make_image_reports().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = ConceptCLIPProcessor.from_pretrained(tmp_path)
    assert loaded.tokenizer("normal")["input_ids"] == [2, 5, 3]
