"""A saved ConceptCLIP carries its code: it works where medclip_hf cannot be imported, and can be saved from there."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import BertTokenizer
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, ConceptCLIPProcessor

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "chest",
    "left",
    "effusion",
    "this",
    "is",
    "a",
    "photo",
    "of",
    ".",
]
CAPTION, CHAR_SPANS = "left chest effusion", [[(0, 4), (11, 19)]]

# Runs in a process of its own: load, run, save, load again, run again, use both stock pipelines.
STRANGER = f"""
import sys

first, second, image, result = sys.argv[1:]

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor
from transformers import AutoConfig, AutoTokenizer, pipeline

def run(folder, auto_class):
    model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=image, text=[{CAPTION!r}], concept_char_spans={CHAR_SPANS!r})
    with torch.no_grad():
        outputs = model(**inputs, return_loss=True)
        maps = model.get_concept_maps(**inputs)
    names = ("loss", "logits_per_image", "concept_logits", "patch_embeds")
    return model, processor, {{"maps": maps, **{{name: outputs[name] for name in names}}}}

model, processor, before = run(first, AutoModel)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
model.save_pretrained(second)
processor.save_pretrained(second)
_, _, after = run(second, AutoModelForZeroShotImageClassification)
for name, value in before.items():
    assert torch.equal(value, after[name]), name
AutoConfig.from_pretrained(second, trust_remote_code=True)
AutoTokenizer.from_pretrained(second, trust_remote_code=True)
AutoImageProcessor.from_pretrained(second, trust_remote_code=True)

classify = pipeline("zero-shot-image-classification", model=second, trust_remote_code=True)
scores = classify(image, candidate_labels=["left", "chest effusion"])
assert abs(sum(entry["score"] for entry in scores) - 1) < 1e-5, scores
embed = pipeline("image-feature-extraction", model=second, trust_remote_code=True)
vector = torch.tensor(embed(image))
assert vector.shape == (1, 16) and abs(vector.norm() - 1) < 1e-5, vector
save_file({{"vector": vector, **before}}, result)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, ConceptCLIPModel, ConceptCLIPProcessor]:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    config = ConceptCLIPConfig(
        text_config={**sizes, "vocab_size": len(WORDS), "hidden_size": 8},
        vision_config={**sizes, "hidden_size": 16, "image_size": 12, "patch_size": 4, "hidden_act": "gelu"},
    )
    model = ConceptCLIPModel(config).eval()
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    processor = ConceptCLIPProcessor(SiglipImageProcessorPil(size={"height": 12, "width": 12}), tokenizer)
    folder = tmp_path_factory.mktemp("hub") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


def test_the_folder_holds_the_code_and_names_its_classes(saved):
    folder, _, _ = saved
    assert {path.name for path in folder.glob("*.py")} == {
        "configuration_conceptclip.py",
        "loss_conceptclip.py",
        "modeling_conceptclip.py",
        "patch_search_triton.py",
        "processing_conceptclip.py",
        "spelling_conceptclip.py",
    }
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_conceptclip.ConceptCLIPConfig",
        "AutoModel": "modeling_conceptclip.ConceptCLIPModel",
        "AutoModelForZeroShotImageClassification": "modeling_conceptclip.ConceptCLIPModel",
    }
    processor_config = json.loads((folder / "processor_config.json").read_text())
    assert processor_config["auto_map"]["AutoProcessor"] == "processing_conceptclip.ConceptCLIPProcessor"


def test_it_gives_the_same_bits_where_the_package_is_absent_and_saves_from_there(saved, tmp_path, run_without_package):
    folder, model, processor = saved
    image = tmp_path / "figure.png"
    Image.effect_noise((30, 20), 60).convert("RGB").save(image)
    result = tmp_path / "result.safetensors"
    run_without_package(STRANGER, folder, tmp_path / "second", image, result)
    inputs = processor(images=image, text=[CAPTION], concept_char_spans=CHAR_SPANS)
    with torch.no_grad():
        here = model(**inputs, return_loss=True)
        maps = model.get_concept_maps(**inputs)
    there = load_file(result)
    assert torch.equal(there.pop("maps"), maps)
    torch.testing.assert_close(there.pop("vector"), here.image_embeds)
    for name, value in there.items():
        assert torch.equal(value, here[name]), name
    second = json.loads((tmp_path / "second" / "config.json").read_text())
    assert second["auto_map"] == json.loads((folder / "config.json").read_text())["auto_map"]
