"""A bottleneck from the command line, on drawn figures whose classes are made of concepts."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, SiglipVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, ConceptCLIPProcessor
from medclip_hf.evaluation.bottleneck import ConceptBottleneck
from medclip_hf.training.tokenizers import train_wordpiece_tokenizer

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
NAMES = ["bright", "dark", "red", "blue"]


@pytest.fixture(scope="module")
def script(repository):
    path = repository / "scripts" / "train_bottleneck.py"
    specification = importlib.util.spec_from_file_location("train_bottleneck", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A random model, a vocabulary, and bright and dark pictures in three splits."""
    folder = tmp_path_factory.mktemp("bottleneck")
    tokenizer = train_wordpiece_tokenizer(NAMES * 3, vocab_size=100, max_length=16)
    torch.manual_seed(0)
    config = ConceptCLIPConfig(
        text_config=BertConfig(vocab_size=len(tokenizer), max_position_embeddings=80, **TOWER).to_dict(),
        vision_config=SiglipVisionConfig(image_size=16, patch_size=8, **TOWER).to_dict(),
    )
    ConceptCLIPModel(config).save_pretrained(folder / "model")
    processor = ConceptCLIPProcessor(SiglipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer)
    processor.save_pretrained(folder / "model")
    lines = [{"concept_id": f"C{number}", "canonical_name": name} for number, name in enumerate(NAMES)]
    (folder / "vocabulary.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rng = np.random.default_rng(0)
    rows = ["image,label,split"]
    for split in ("train", "validation", "test"):
        for number in range(20):
            level = 200 if number % 2 else 30
            pixels = np.clip(level + rng.normal(0, 10, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{split}{number}.png")
            rows.append(f"{split}{number}.png,{'bright' if number % 2 else 'dark'},{split}")
    (folder / "table.csv").write_text("\n".join([*rows, "absent.png,dark,test"]))
    return folder


def run(script, place, *more, table="table.csv"):
    words = ["--model", place / "model", "--images", place, "--table", place / table]
    words += ["--vocabulary", place / "vocabulary.jsonl", "--output", place / "output", *more]
    return script.main([str(word) for word in words])


@pytest.mark.parametrize("score", ["local", "global"])
def test_it_writes_weights_as_text_and_figures_beside_the_probes(script, place, capsys, score):
    assert run(script, place, "--score", score) == 0
    printed = capsys.readouterr().out
    assert "| balanced_accuracy |" in printed
    assert (place / "output" / "weights.txt").read_text().strip() in printed
    results = json.loads((place / "output" / "results.json").read_text())
    assert results["figures"]["balanced_accuracy"]["bottleneck"] == 1.0  # bright and dark differ in every direction
    assert results["switches"][0]["num_cases"] == results["data"]["test"]["images"] == 20
    assert [entry["image"] for entry in results["data"]["test"]["set_aside"]] == ["absent.png"]
    assert ConceptBottleneck.load(place / "output").class_names == ("bright", "dark")


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("image,label,split\na.png,x,train\n", "rows of each split"),
        ("image,label,split\na.png,x,devel\nb.png,x,test\nc.png,x,train\n", "devel"),
        ("image,label\na.png,x\n", "columns image, label and split"),
        ("image,label,split\na.png,x,train\na.png,x,test\nb.png,x,validation\n", "an image twice"),
        ("image,label,split,patient\na.png,x,train,1\nb.png,x,test,1\nc.png,x,validation,2\n", "in two splits"),
    ],
)
def test_a_wrong_table_is_refused(script, place, capsys, table, reason):
    (place / "wrong.csv").write_text(table)
    assert run(script, place, table="wrong.csv") == 2
    assert reason in capsys.readouterr().err
