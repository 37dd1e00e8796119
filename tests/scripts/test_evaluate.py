"""scripts/evaluate.py end to end on drawn pictures and scans: ours and peers in one run, resumed, and mistakes."""

import csv
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, ConceptCLIPProcessor, FVLMConfig, FVLMModel, FVLMProcessor
from medclip_hf.evaluation.ct_zero_shot import CT_RATE_FINDINGS
from medclip_hf.training.tokenizers import train_wordpiece_tokenizer

SIDE = 16
COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20)}


def load_script(name):
    path = Path(__file__).resolve().parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_of_evaluation", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return load_script("evaluate")


def save_models(folder):
    """Ours, CLIP and SigLIP with random weights."""
    torch.manual_seed(0)
    tokenizer = train_wordpiece_tokenizer(["a red picture", "a green picture"] * 2, vocab_size=80, max_length=16)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, text = {**tower, "image_size": SIDE, "patch_size": 8}, {**tower, "vocab_size": len(tokenizer)}
    squashed = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    cropped = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    ours = ConceptCLIPConfig(
        text_config=BertConfig(**text, max_position_embeddings=32).to_dict(),
        vision_config=SiglipVisionConfig(**vision).to_dict(),
    )
    text["max_position_embeddings"] = 16
    clip = CLIPConfig(text_config={**text, "eos_token_id": 2}, vision_config=vision, projection_dim=8)
    siglip = SiglipConfig(text_config=text, vision_config=vision)
    for name, model, processor in (
        ("ours", ConceptCLIPModel(ours), ConceptCLIPProcessor(squashed, tokenizer)),
        ("clip", CLIPModel(clip), CLIPProcessor(cropped, tokenizer)),
        ("siglip", SiglipModel(siglip), SiglipProcessor(squashed, tokenizer)),
    ):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)


def save_data(folder):
    """A task of its own with pictures in two colours, and captions in the place of a task of the table."""
    rng = np.random.default_rng(0)
    rows, lines = [], []
    for k in range(12):
        name = list(COLOURS)[k % 2]
        pixels = np.clip(np.full((SIDE, SIDE, 3), COLOURS[name]) + rng.integers(-20, 20, (SIDE, SIDE, 3)), 0, 255)
        for task in ("colours", "pmc_sample"):
            (folder / task / "images").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / task / "images" / f"{k}.png")
        rows.append([f"{k}.png", name, "test", f"patient {k // 2}"])
        lines.append(json.dumps({"image": f"{k}.png", "caption": f"a {name} picture {k}"}))
    with (folder / "colours" / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split", "patient"], *rows, ["absent.png", "red", "test", "x"]])
    task = {"task_type": "zero_shot_classification", "class_names": list(COLOURS), "templates": ["a {} picture"]}
    (folder / "colours" / "task.json").write_text(json.dumps(task))
    (folder / "pmc_sample" / "metadata.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    save_models(folder / "models")
    save_data(folder / "data")
    return folder


def run(script, place, output, *options, models=("ours",), task="all"):
    named = [part for name in models for part in ("--model", str(place / "models" / name))]
    common = ["--task", str(task), "--data", str(place / "data"), "--output", str(output)]
    return script.main([*named, *common, "--num-resamples", "20", "--device", "cpu", *options])


def test_ours_and_peers_are_evaluated_side_by_side_and_a_second_run_finds_it_all(
    script, place, tmp_path, capsys, monkeypatch
):
    models = ("ours", "clip", "siglip")
    assert run(script, place, tmp_path, models=models) == 0
    printed = capsys.readouterr()
    assert "not there below" in printed.err
    assert "siim_acr" in printed.err
    for task in ("colours", "pmc_sample"):
        assert {path.stem for path in (tmp_path / task).glob("*.json")} == set(models)
        page = (tmp_path / task / "report.html").read_text()
        assert "siglip" in page
        assert "patient 3" not in page
    record = json.loads((tmp_path / "colours" / "ours.json").read_text())
    assert record["data"]["counts"] == {"in use": 12, "image listed but absent": 1}
    assert record["figures"]["num_groups"] == 6
    assert set(record["other_scores"]) == {"global", "local"}
    comparisons = json.loads((tmp_path / "comparisons.json").read_text())
    assert "colours: clip against ours, auroc" in comparisons
    assert all(entry["p_holm"] >= entry["p_value"] for entry in comparisons.values() if entry["p_value"] is not None)
    for picture in ("colours/roc.png", "colours/reliability.png", "pmc_sample/recall.png", "by_modality.png"):
        assert (tmp_path / picture).read_bytes()[1:4] == b"PNG"
    before = (tmp_path / "summary.md").read_text()
    assert before.count("\n") == 4

    def refuse(*args, **kwargs):
        raise AssertionError("nothing should be encoded again")

    monkeypatch.setattr(script, "evaluate_task", refuse)
    assert run(script, place, tmp_path, models=models) == 0
    assert (tmp_path / "summary.md").read_text() == before


def test_results_of_other_settings_use_the_same_embeddings(script, place, tmp_path):
    task = place / "data" / "colours" / "task.json"
    assert run(script, place, tmp_path, task=task) == 0
    assert run(script, place, tmp_path, "--seed", "1", task=task) == 0
    assert json.loads((tmp_path / "colours" / "ours.json").read_text())["facts"]["num_encoded"] == 0


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ([], {"task": "absent"}, "there is no task"),
        ([], {"models": ("absent",)}, "there is no folder"),
        ([], {"models": ()}, "name --model"),
        ([], {"models": ("ours", "ours")}, "name of its own"),
        ([], {"task": "siim_acr"}, "holds 0 files"),
        ([], {"task": "slake"}, "it is run by scripts/train_vqa.py"),
        ([], {"task": "ct_rate"}, "2-D images"),
        (["--dtype", "int8"], {}, "dtype"),
        (["--top-patches", "0"], {}, "top_patches"),
        (["--batch-size", "0"], {}, "batch_size"),
        (["--columns", "image"], {"task": "COLOURS"}, "takes pairs"),
        (["--columns", "image=absent"], {"task": "COLOURS"}, "absent"),
        (["--split", "train"], {"task": "COLOURS"}, "no row of the split 'train'"),
    ],
)
def test_mistakes_end_with_2_and_a_sentence(script, place, tmp_path, capsys, options, changes, message):
    if changes.get("task") == "COLOURS":
        changes = {"task": place / "data" / "colours" / "task.json"}
    assert run(script, place, tmp_path, *options, **changes) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_model_of_the_hub_that_cannot_be_reached_is_one_sentence_and_no_minute_of_attempts(
    script, place, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = ["--task", "pmc_sample", "--data", str(place / "data"), "--output", str(tmp_path)]
    assert script.main(["--model", "no-such-owner/no-such-model", *options]) == 2
    assert "the Hub could not give it" in capsys.readouterr().err


def test_a_probe_of_a_task_takes_the_embeddings_of_its_evaluation(script, place, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "shades"
    (folder / "images").mkdir(parents=True)
    rows = []
    for k in range(48):
        name, split = list(COLOURS)[k % 2], ("train", "val", "test")[k // 2 % 3]
        Image.new("RGB", (SIDE, SIDE), tuple(value + k for value in COLOURS[name])).save(folder / "images" / f"{k}.png")
        rows.append([f"{k}.png", name, split, f"patient {k}"])
    with (folder / "labels.csv").open("w", newline="") as file:
        absent = ["absent.png", "red", "train", "patient 99"]
        csv.writer(file).writerows([["path", "label", "split", "patient"], *rows, absent])
    (folder / "task.json").write_text(json.dumps({"task_type": "zero_shot_classification"}))
    named = ["--model", str(place / "models" / "ours"), "--task", str(folder / "task.json"), "--data", str(folder)]
    cache = tmp_path / "results" / "embeddings"
    common = ["--output", str(tmp_path / "results"), "--score", "global", "--num-resamples", "20", "--device", "cpu"]
    assert script.main([*named, *common]) == 0
    (of_test,) = cache.glob("*/images-00000.safetensors")
    before = of_test.stat().st_mtime_ns
    probe, output = load_script("linear_probe"), tmp_path / "probe.json"
    options = ["--cache", str(cache), "--output", str(output), "--resamples", "20", "--fractions", "1"]
    assert probe.main([*named, *options]) == 0
    assert of_test.stat().st_mtime_ns == before
    assert len(list(cache.glob("*/images-00000.safetensors"))) == 3
    record = json.loads(output.read_text())
    assert record["data"]["splits"]["test"] == {"samples": 16, "patients": 16}
    assert record["data"]["set_aside"]["train"] == {"image listed but absent": 1}
    assert record["figures"]["1.0"]["auroc"]["mean"]["value"] == 1.0
    assert probe.main([*named, *options, "--label", "class"]) == 2
    assert probe.main(["--model", "x", *options]) == 2
    assert "a task has its own labels" in capsys.readouterr().err


def test_the_benchmark_table_is_printed(script, capsys):
    assert script.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert "scripts/train_vqa.py" in printed
    assert "medvl_ct69k" in printed


# CT.


def save_fvlm(folder):
    from medclip_hf.processing.fvlm import FVLMImageProcessor

    size, patch, spacing = (28, 24, 24), (7, 8, 8), (12.0, 12.0, 12.0)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = small | {"image_size_dhw": size, "patch_size_dhw": patch, "initializer_range": 0.2}
    config = FVLMConfig(
        vision_config=vision,
        text_config=small | {"vocab_size": 300},
        feature_layers=(0,),
        pooling_num_attention_heads=2,
    )
    FVLMModel(config).save_pretrained(folder)
    images = FVLMImageProcessor(size_dhw=size, patch_size_dhw=patch, crop_margin_dhw=(1, 2, 2), spacing_mm_dhw=spacing)
    FVLMProcessor(images, train_wordpiece_tokenizer(["Not Cardiomegaly."] * 2, 300)).save_pretrained(folder)


@pytest.fixture(scope="module")
def ct(tmp_path_factory):
    pytest.importorskip("zarr")
    from medclip_hf.data.phantoms.torso_files import write_ct_rate
    from medclip_hf.data.phantoms.torsos import TorsoSettings

    folder = tmp_path_factory.mktemp("ct")
    save_fvlm(folder / "models" / "fvlm")
    drawn = TorsoSettings(in_plane_size=32, slice_spacing_mm=(12.0, 12.0), max_studies=1, max_reconstructions=1)
    write_ct_rate(folder / "data" / "ct_rate", 4, split="valid", settings=drawn)
    return folder


def test_scans_are_scored_and_figured_by_volume_study_and_patient(script, ct, tmp_path, monkeypatch):
    score_ct = load_script("score_ct")

    def run_here(command, **options):  # a process of its own would spend its time on imports
        return types.SimpleNamespace(returncode=score_ct.main(command[2:]))

    monkeypatch.setattr(script.subprocess, "run", run_here)
    assert run(script, ct, tmp_path, models=("fvlm",), task="ct_rate") == 0
    record = json.loads((tmp_path / "ct_rate" / "fvlm.json").read_text())
    assert record["data"]["counts"]["scored"] == 4
    assert set(record["by_unit"]) == {"volume", "study", "patient"}
    assert "test labels" in record["figures"]["published"]["threshold"]
    assert (tmp_path / "ct_rate" / "report.html").is_file()


def test_a_table_of_perfect_scores_reaches_1(script, ct, tmp_path):
    names = [finding.name for finding in CT_RATE_FINDINGS]
    (labels,) = (ct / "data").rglob("valid_predicted_labels.csv")
    with labels.open(newline="") as file:
        rows = list(csv.DictReader(file))
    scores = [
        [row["VolumeName"].removesuffix(".nii.gz"), "", *(0.2 + 0.6 * int(row[n]) for n in names)] for row in rows
    ]
    with (tmp_path / "scores.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["scan_id", "refused", *names], *scores])
    options = ("--scores", str(tmp_path / "scores.csv"))
    assert run(script, ct, tmp_path / "out", *options, models=("fvlm",), task="ct_rate") == 0
    figures = json.loads((tmp_path / "out" / "ct_rate" / "fvlm.json").read_text())["figures"]
    assert figures["overall"]["auroc"]["value"] == 1.0
