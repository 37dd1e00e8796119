"""A saved classifier carries its code: it works where medclip_hf cannot be imported, also in the stock pipeline."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import ConceptCLIPConfig, FVLMConfig
from medclip_hf.modeling.conceptclip.image_classification_conceptclip import ConceptCLIPForImageClassification
from medclip_hf.modeling.fvlm.anatomy_classification_fvlm import FVLMForAnatomyClassification

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
STRANGER = """
import sys

images, scans, picture, inputs, result = sys.argv[1:]

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, pipeline

given = load_file(inputs)
found = {}
for name, folder, names in (("images", images, ["pixel_values"]), ("scans", scans, ["volume", "anatomy_mask"])):
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    call = {key.replace("volume", "pixel_values"): given[key] for key in names}
    with torch.no_grad():
        found[name] = model(**call).logits
    model.save_pretrained(folder + "_again")
    AutoModelForImageClassification.from_pretrained(folder + "_again", trust_remote_code=True)
scores = pipeline("image-classification", model=images, trust_remote_code=True)(picture)
assert {entry["label"] for entry in scores} == {"normal", "effusion"}, scores
save_file(found, result)
"""


@pytest.fixture
def saved(tmp_path):
    """Folders of a classifier of images and one of scans, with the models."""
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": 20, "hidden_size": 8}
    vision = {**SIZES, "hidden_size": 16}
    of_images = ConceptCLIPConfig(
        text_config=text,
        vision_config={**vision, "image_size": 12, "patch_size": 4},
        id2label={0: "normal", 1: "effusion"},
    )
    of_scans = FVLMConfig(
        text_config=text,
        vision_config={**vision, "image_size_dhw": (8, 8, 8), "patch_size_dhw": (4, 4, 4)},
        feature_layers=(0,),
        projection_dim=8,
        anatomies=("lung", "heart"),
        pooling_num_attention_heads=2,
        id2label={0: "nodule", 1: "cardiomegaly"},
        findings={"nodule": "lung", "cardiomegaly": "heart"},
    )
    models = {}
    for name, model_class, config in (
        ("images", ConceptCLIPForImageClassification, of_images),
        ("scans", FVLMForAnatomyClassification, of_scans),
    ):
        AutoModelForImageClassification.register(type(config), model_class, exist_ok=True)
        model_class.register_for_auto_class("AutoModelForImageClassification")
        models[name] = model_class(config).eval()
        models[name].save_pretrained(tmp_path / name)
    SiglipImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(tmp_path / "images")
    return tmp_path, models


def test_they_give_the_same_bits_where_the_package_is_absent(saved, run_without_package):
    folder, models = saved
    auto_map = json.loads((folder / "images" / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_conceptclip.ConceptCLIPConfig",
        "AutoModelForImageClassification": "image_classification_conceptclip.ConceptCLIPForImageClassification",
    }
    mask = torch.zeros(1, 8, 8, 8, dtype=torch.uint8)
    mask[:, 1:3] = 1
    given = {"pixel_values": torch.randn(2, 3, 12, 12), "volume": torch.rand(1, 1, 8, 8, 8), "anatomy_mask": mask}
    save_file(given, folder / "inputs.safetensors")
    Image.effect_noise((30, 20), 60).convert("RGB").save(folder / "figure.png")
    names = ("images", "scans", "figure.png", "inputs.safetensors", "result.safetensors")
    run_without_package(STRANGER, *(folder / name for name in names))
    there = load_file(folder / "result.safetensors")
    with torch.no_grad():
        here = models["images"](pixel_values=given["pixel_values"]).logits
        findings = models["scans"](pixel_values=given["volume"], anatomy_mask=mask).logits
    assert torch.equal(there["images"], here)
    assert torch.equal(there["scans"].nan_to_num(7.0), findings.nan_to_num(7.0))
    assert findings.isnan().tolist() == [[False, True]]
