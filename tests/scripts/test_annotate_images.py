"""Annotating a folder from the command line: what is written, continued, set aside and refused."""

import importlib.util
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import BertConfig, SiglipVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, ConceptCLIPProcessor
from medclip_hf.training.tokenizers import train_wordpiece_tokenizer

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
NAMES = ["mass", "cyst", "pleural effusion"]


@pytest.fixture(scope="module")
def script(repository):
    path = repository / "scripts" / "annotate_images.py"
    specification = importlib.util.spec_from_file_location("annotate_images", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def save_model(folder, seed=0):
    tokenizer = train_wordpiece_tokenizer(NAMES * 3, vocab_size=100, max_length=32)
    torch.manual_seed(seed)
    config = ConceptCLIPConfig(
        text_config=BertConfig(vocab_size=len(tokenizer), max_position_embeddings=80, **TOWER).to_dict(),
        vision_config=SiglipVisionConfig(image_size=32, patch_size=8, **TOWER).to_dict(),
    )
    ConceptCLIPModel(config).save_pretrained(folder)
    ConceptCLIPProcessor(SiglipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)


@pytest.fixture
def place(tmp_path):
    """A model, a vocabulary and a folder with two pictures and a broken file."""
    save_model(tmp_path / "model")
    lines = [{"concept_id": f"C{number}", "canonical_name": name} for number, name in enumerate(NAMES)]
    (tmp_path / "vocabulary.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "images" / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "more/b.png"):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "images" / name)
    (tmp_path / "images" / "broken.png").write_bytes(b"nothing")
    return tmp_path


def run(script, place, *more, output="out.jsonl", model="model"):
    words = ["--model", place / model, "--images", place / "images", "--output", place / output]
    return script.main([str(word) for word in [*words, *more]])


def test_each_image_gets_its_concepts_and_a_broken_one_its_reason(script, place):
    options = ("--vocabulary", place / "vocabulary.jsonl", "--top-k", 2, "--overlays", place / "pictures")
    assert run(script, place, *options, output="out.parquet") == 0
    rows = {row["image"]: row for row in pq.read_table(place / "out.parquet").to_pylist()}
    assert set(rows) == {"a.png", "broken.png", "more/b.png"}
    assert (rows["a.png"]["width"], rows["a.png"]["height"]) == (60, 40)
    assert [concept["name"] in NAMES for concept in rows["more/b.png"]["concepts"]] == [True, True]
    scores = [concept["score"] for concept in rows["a.png"]["concepts"]]
    assert scores == sorted(scores, reverse=True)
    assert all(len(concept["box"]) == 4 for concept in rows["a.png"]["concepts"])
    assert "not recognised" in rows["broken.png"]["set_aside"]
    assert (place / "pictures" / "more" / "b.png.maps.png").is_file()
    assert (place / "pictures" / "a.png.boxes.png").is_file()


def test_a_run_that_was_broken_off_goes_on_and_ends_the_same(script, place):
    options = ("--vocabulary", place / "vocabulary.jsonl")
    assert run(script, place, *options) == 0
    whole = (place / "out.jsonl").read_text()
    first = whole.splitlines()[0]
    (place / "out.jsonl").write_text(first + "\n" + whole.splitlines()[1][:20])  # killed in the middle of a line
    assert run(script, place, *options) == 0
    assert (place / "out.jsonl").read_text() == whole


def test_lines_or_vectors_of_other_settings_are_not_mixed(script, place, capsys):
    options = ("--vocabulary", place / "vocabulary.jsonl")
    assert run(script, place, *options) == 0
    assert run(script, place, *options, "--top-k", 1) == 2
    assert "name another --output" in capsys.readouterr().err
    save_model(place / "other", seed=1)
    assert run(script, place, *options, model="other") == 2
    assert "made with another model" in capsys.readouterr().err
    (place / "vocabulary.jsonl").write_text('{"concept_id": "C9", "canonical_name": "cyst"}')
    assert run(script, place, *options) == 2
    assert "another vocabulary" in capsys.readouterr().err


def test_with_labels_it_measures_one_auc_a_concept(script, place, capsys):
    (place / "images" / "broken.png").unlink()
    (place / "labels.csv").write_text("image,mass,cyst\na.png,1,0\nmore/b.png,0,0\n")
    assert run(script, place, "--labels", place / "labels.csv", output="auc.json") == 0
    figures = json.loads((place / "auc.json").read_text())
    assert figures["mixed"]["per_class"]["mass"]["value"] in (0.0, 1.0)
    assert figures["mixed"]["undefined"] == ["cyst"]
    assert "| cyst | undefined |" in capsys.readouterr().out


def test_a_labelled_image_that_is_absent_or_broken_is_set_aside_and_counted(script, place, capsys):
    rows = ["a.png,p1,1", "absent.png,p1,0", "broken.png,p2,1", "more/b.png,p1,0"]
    (place / "labels.csv").write_text("\n".join(["image,patient,mass", *rows]))
    assert run(script, place, "--labels", place / "labels.csv", output="auc.json") == 0
    record = json.loads((place / "auc.json").read_text())
    assert record["num_images"] == 2
    assert [entry["image"] for entry in record["set_aside"]] == ["absent.png", "broken.png"]
    assert "2 images, 2 set aside" in capsys.readouterr().out
    area = record["mixed"]["per_class"]["mass"]
    assert area["low"] == area["high"] == area["value"]  # one patient: every resample is the sample


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("image,mass\na.png,1\na.png,0\n", "names an image twice"),
        ("image,mass\na.png,yes\n", "must be 0 or 1"),
        ("image,mass\nabsent.png,1\n", "first absent.png"),
        ("image,mass\n../vocabulary.jsonl,1\n", "does not stay below"),
        ("image\na.png\n", "a column for each concept"),
    ],
)
def test_a_wrong_table_of_labels_is_refused(script, place, capsys, table, reason):
    (place / "labels.csv").write_text(table)
    assert run(script, place, "--labels", place / "labels.csv", output="auc.json") == 2
    assert reason in capsys.readouterr().err


def test_mistakes_end_with_code_2_and_one_sentence(script, place, capsys):
    assert run(script, place, output="out.csv") == 2
    assert "must end in .jsonl or .parquet" in capsys.readouterr().err
    assert run(script, place, "--vocabulary", place / "none.jsonl") == 2
    assert "no vocabulary" in capsys.readouterr().err
    assert run(script, place, model="nowhere") == 2
    assert "there is no folder" in capsys.readouterr().err
    for picture in (place / "images").rglob("*.png"):
        picture.unlink()
    assert run(script, place) == 2
    assert "holds no image" in capsys.readouterr().err
