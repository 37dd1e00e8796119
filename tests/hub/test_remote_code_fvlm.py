"""A saved fVLM carries its code: it works where medclip_hf cannot be imported, and can be saved from there."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, BertTokenizer

from medclip_hf import (
    FVLMConfig,
    FVLMImageProcessor,
    FVLMModel,
    FVLMProcessor,
    FVLMVisionConfig,
    FVLMVisionModel,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cardiomegaly", "not", ".", "nodule"]
TEXTS = [{"lung": "nodule.", "heart": "not cardiomegaly."}, {"lung": "not nodule.", "heart": "cardiomegaly."}]

# Runs in a process of its own: load, run, save, load again, run again, and load each part alone.
STRANGER = f"""
import sys

first, second, tower, data, result = sys.argv[1:]

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

scans = load_file(data)

def run(folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(
        images=list(scans["volume"]), anatomy_mask=list(scans["mask"]), text={TEXTS!r}, orientation="LPS"
    )
    is_abnormal = torch.tensor([[True, False], [False, True]])
    with torch.no_grad():
        outputs = model(**inputs, is_abnormal=is_abnormal, return_loss=True)
    names = ("loss", "logits_per_anatomy", "anatomy_embeds", "anatomy_present")
    return model, processor, {{name: outputs[name] for name in names}}

model, processor, before = run(first)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
model.save_pretrained(second)
processor.save_pretrained(second)
_, _, after = run(second)
for name, value in before.items():
    assert torch.equal(value, after[name]), name
AutoConfig.from_pretrained(second, trust_remote_code=True)
AutoTokenizer.from_pretrained(second, trust_remote_code=True)
AutoImageProcessor.from_pretrained(second, trust_remote_code=True)
vision_model = AutoModel.from_pretrained(tower, trust_remote_code=True).eval()
with torch.no_grad():
    before["tokens"] = vision_model(pixel_values=torch.ones(1, 1, 8, 8, 8)).last_hidden_state
save_file(before, result)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder of model and processor, folder of the vision tower, model, processor)."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    config = FVLMConfig(
        text_config={**sizes, "vocab_size": len(WORDS), "hidden_size": 8},
        vision_config={**sizes, "hidden_size": 16, "image_size_dhw": (8, 8, 8), "patch_size_dhw": (4, 4, 4)},
        anatomies=("lung", "heart"),
        feature_layers=(0,),
        projection_dim=12,
    )
    model = FVLMModel(config).eval()
    image_processor = FVLMImageProcessor(
        anatomies=config.anatomies, size_dhw=(8, 8, 8), patch_size_dhw=(4, 4, 4), crop_margin_dhw=(1, 1, 1)
    )
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    processor = FVLMProcessor(image_processor, tokenizer)
    folder = tmp_path_factory.mktemp("hub")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    model.vision_model.save_pretrained(folder / "tower")
    return folder / "model", folder / "tower", model, processor


def scans():
    """Two small volumes in Hounsfield units with masks of lung and heart."""
    generator = np.random.default_rng(0)
    volume = np.where(np.arange(10) < 4, -900, 40) + generator.integers(-20, 20, (2, 9, 12, 10))
    mask = np.zeros((2, 9, 12, 10), np.uint8)
    mask[:, 2:5, 3:9, 1:3] = 1
    mask[:, 3:6, 4:8, 5:8] = 2
    return {"volume": torch.from_numpy(volume.astype(np.int16)), "mask": torch.from_numpy(mask)}


def test_the_folder_holds_the_code_and_names_its_classes(saved):
    folder, tower, _, _ = saved
    assert {path.name for path in folder.glob("*.py")} == {
        "anatomy_masks_fvlm.py",
        "anatomy_pooling_fvlm.py",
        "configuration_fvlm.py",
        "image_processing_fvlm.py",
        "loss_fvlm.py",
        "modeling_fvlm.py",
        "processing_fvlm.py",
        "spelling_fvlm.py",
        "vision_fvlm.py",
    }
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_fvlm.FVLMConfig",
        "AutoModel": "modeling_fvlm.FVLMModel",
    }
    assert json.loads((tower / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_fvlm.FVLMVisionConfig",
        "AutoModel": "vision_fvlm.FVLMVisionModel",
    }
    processor_config = json.loads((folder / "processor_config.json").read_text())
    assert processor_config["auto_map"]["AutoProcessor"] == "processing_fvlm.FVLMProcessor"


@pytest.mark.parametrize(
    ("auto_class", "expected"),
    [
        (AutoConfig, FVLMConfig),
        (AutoModel, FVLMModel),
        (AutoProcessor, FVLMProcessor),
        (AutoImageProcessor, FVLMImageProcessor),
        (AutoTokenizer, BertTokenizer),
    ],
)
def test_auto_classes_find_the_installed_classes(saved, auto_class, expected):
    assert type(auto_class.from_pretrained(saved[0])) is expected


def test_auto_classes_find_the_vision_tower(saved):
    assert type(AutoConfig.from_pretrained(saved[1])) is FVLMVisionConfig
    assert type(AutoModel.from_pretrained(saved[1])) is FVLMVisionModel


def test_it_gives_the_same_bits_where_the_package_is_absent_and_saves_from_there(saved, tmp_path, run_without_package):
    folder, tower, model, processor = saved
    data, result = tmp_path / "scans.safetensors", tmp_path / "result.safetensors"
    save_file(scans(), data)
    run_without_package(STRANGER, folder, tmp_path / "second", tower, data, result)
    inputs = processor(images=list(scans()["volume"]), anatomy_mask=list(scans()["mask"]), text=TEXTS)
    with torch.no_grad():
        here = model(**inputs, is_abnormal=torch.tensor([[True, False], [False, True]]), return_loss=True)
        tokens = model.vision_model(pixel_values=torch.ones(1, 1, 8, 8, 8)).last_hidden_state
    assert here.loss > 0
    there = load_file(result)
    assert torch.equal(there.pop("tokens"), tokens)
    for name, value in there.items():
        assert torch.equal(value, here[name]), name
