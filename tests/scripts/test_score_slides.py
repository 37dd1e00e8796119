"""Slides from a table to scores, figures and maps; started again it does only what is missing."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, ConceptCLIPProcessor
from medclip_hf.training.tokenizers import train_wordpiece_tokenizer

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PAPER, PINK, PURPLE = (246, 245, 247), (225, 160, 195), (110, 60, 140)
TILE, GRID = 32, 5
OPTIONS = ("--tile-px", "32", "--epochs", "8", "--learning-rate", "0.005", "--device", "cpu", "--num-workers", "1")


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[2] / "scripts" / "score_slides.py"
    spec = importlib.util.spec_from_file_location("score_slides", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["score_slides"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained ConceptCLIP: enough to tell pink from purple."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    vision = {**SIZES, "image_size": 16, "patch_size": 8, "hidden_act": "gelu"}
    config = ConceptCLIPConfig(text_config={**SIZES, "vocab_size": 50}, vision_config=vision)
    ConceptCLIPModel(config).save_pretrained(folder)
    tokenizer = train_wordpiece_tokenizer(["a tumour"] * 2, 50)
    ConceptCLIPProcessor(SiglipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)
    return folder


def write_slide(path, tumour_at):
    """Tissue in the middle three by three tiles, one of them tumour, if any."""
    rng = np.random.default_rng(len(path.name) + sum(map(ord, path.name)))
    picture = np.empty((GRID * TILE, GRID * TILE, 3), dtype=np.int16)
    picture[:] = PAPER
    picture[TILE:-TILE, TILE:-TILE] = PINK
    if tumour_at is not None:
        row, column = tumour_at
        picture[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE] = PURPLE
    picture = np.clip(picture + rng.integers(-6, 7, picture.shape), 0, 255).astype(np.uint8)
    options = {"photometric": "rgb", "tile": (64, 64), "metadata": None, "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, picture, resolution=(2e4, 2e4), **options)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    rows = []
    for split, count in (("train", 16), ("val", 6), ("test", 8)):
        for number in range(count):
            name, is_tumour = f"{split}{number}", number % 2 == 1
            write_slide(folder / f"{name}.tif", (1 + number % 3, 1 + number // 2 % 3) if is_tumour else None)
            rows.append((name, f"{name}.tif", "tumour" if is_tumour else "normal", split))
    (folder / "broken.tif").write_bytes(b"no slide")
    rows += [("broken", "broken.tif", "tumour", "test"), ("gone", "gone.tif", "normal", "train")]
    write_table(folder / "slides.csv", rows)
    return folder


def write_table(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("slide_id", "path", "label", "split"), *rows])


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def first_run(script, model, slides, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    command = ["--slides", str(slides / "slides.csv"), "--model", str(model), "--output", str(output), *OPTIONS]
    assert script.main(command) == 0
    return output, command


def test_tumours_are_told_from_tissue_and_the_attention_lies_on_them(first_run):
    output, _ = first_run
    figures = json.loads((output / "figures.json").read_text())
    assert figures["overall"]["auroc"]["value"] == 1.0
    rows = {row["slide_id"]: row for row in read(output / "scores.csv")}
    assert len(rows) == 30
    assert all(row["num_tiles"] == "9" for row in rows.values())
    picture = np.asarray(Image.open(output / "maps" / "test1.png")).astype(int)
    assert picture.shape == (GRID * 16, GRID * 16, 3)
    brightness = picture[..., :2].sum(axis=-1).reshape(GRID, 16, GRID, 16).mean(axis=(1, 3))
    assert (brightness[0] > 450).all()  # glass stays glass


def test_what_cannot_be_used_is_named_and_the_others_are_scored(first_run):
    output, _ = first_run
    assert {(row["slide_id"], row["reason"]) for row in read(output / "set_aside.csv")} == {
        ("broken", "slide unreadable"),
        ("gone", "slide missing"),
    }


def test_started_again_it_encodes_nothing_and_gives_the_same(script, first_run, monkeypatch):
    output, command = first_run
    before = (output / "scores.csv").read_text()
    monkeypatch.setattr(script, "embed_slide", None)  # the broken slide is opened again, so leave it out
    table = output / "again.csv"
    slides = Path(command[1]).parent
    rows = [tuple(row.values()) for row in read(slides / "slides.csv") if row["slide_id"] not in ("broken", "gone")]
    write_table(table, [(name, str(slides / path), label, split) for name, path, label, split in rows])
    assert script.main(["--slides", str(table), *command[2:]]) == 0
    assert (output / "scores.csv").read_text() == before


def test_new_slides_are_scored_by_a_trained_classifier(script, first_run, tmp_path):
    output, command = first_run
    classifier = ["--classifier", str(output / "mil.safetensors")]
    again = [*command[:4], "--output", str(tmp_path), *OPTIONS, *classifier, "--maps", "3"]
    assert script.main(again) == 0
    assert read(tmp_path / "scores.csv") == read(output / "scores.csv")
    for folder in ("maps", "maps/labelled"):
        assert len(list((tmp_path / folder).glob("*.png"))) == 3


def test_new_slides_need_neither_labels_nor_splits(script, first_run, tmp_path):
    output, command = first_run
    slides = Path(command[1]).parent
    (tmp_path / "new.csv").write_text(f"slide_id,path\nnew,{slides / 'test1.tif'}\n")
    options = [*command[2:4], "--output", str(tmp_path), *OPTIONS, "--classifier", str(output / "mil.safetensors")]
    assert script.main(["--slides", str(tmp_path / "new.csv"), *options]) == 0
    (row,) = read(tmp_path / "scores.csv")
    (known,) = [row for row in read(output / "scores.csv") if row["slide_id"] == "test1"]
    assert (row["label"], row["p_tumour"]) == ("", known["p_tumour"])
    assert not (tmp_path / "figures.json").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--tile-px", "64"), "another model or of other tiles"),
        (("--tile-px", "2"), "expected tile_px"),
        (("--epochs", "0"), "at least 1"),
        (("--slides", "nowhere.csv"), "cannot be read"),
        (("--model", "/nowhere/at/all"), "nowhere"),
        (("--classifier", "nowhere.safetensors"), "no file of an attention classifier"),
    ],
)
def test_mistakes_end_with_a_sentence(script, first_run, tmp_path, capsys, options, told):
    output, command = first_run
    classifier = ["--classifier", str(output / "mil.safetensors")]
    assert script.main([*command, "--output", str(tmp_path), *classifier, *options]) == 2
    assert told in capsys.readouterr().err


def test_a_label_that_no_training_slide_has_is_refused(script, first_run, tmp_path, capsys):
    _, command = first_run
    slides = Path(command[1]).parent
    rows = [(r["slide_id"], str(slides / r["path"]), r["label"], r["split"]) for r in read(slides / "slides.csv")]
    write_table(tmp_path / "t.csv", [row if row[0] != "test1" else (*row[:2], "new kind", "test") for row in rows])
    assert script.main(["--slides", str(tmp_path / "t.csv"), *command[2:4], "--output", str(tmp_path), *OPTIONS]) == 2
    assert "has the label 'new kind'" in capsys.readouterr().err
