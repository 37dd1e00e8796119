"""Fine-tuning, evaluation and merging as a hospital runs them: on images and scans made for the purpose."""

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import (
    ConceptCLIPConfig,
    ConceptCLIPModel,
    ConceptCLIPProcessor,
    FVLMConfig,
    FVLMModel,
    FVLMProcessor,
)
from medclip_hf.data.ct.engine import EngineSettings, prepare_scans
from medclip_hf.data.ct.geometry import GeometryContract
from medclip_hf.data.ct.scan_index import read_scan_rows, write_scan_rows
from medclip_hf.data.ct.sources import ct_rate_sources
from medclip_hf.data.hospital.rows import (
    DatasetFacts,
    HospitalRow,
    PatientGroups,
    write_dataset_facts,
    write_hospital_rows,
)
from medclip_hf.data.phantoms.torso_files import write_ct_rate
from medclip_hf.data.phantoms.torsos import TorsoSettings
from medclip_hf.data.records import FigureRow
from medclip_hf.processing.fvlm import FVLMImageProcessor
from medclip_hf.training.tokenizers import train_wordpiece_tokenizer

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
RECIPES = SCRIPTS / "recipes"
CLASSES = ("bright", "striped")
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "hidden_size": 16}
CONTRACT = GeometryContract(spacing_mm_dhw=(12.0, 12.0, 12.0))
SIZE, PATCH = (28, 24, 24), (7, 8, 8)
QUICK = {
    "training.num_epochs": "null",
    "training.max_steps": 4,
    "training.batch_size_per_process": 8,
    "training.micro_batch_size": "null",
    "training.warmup_steps": 0,
    "training.evaluate_every": 2,
    "training.progress_bar": "false",
}


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """Each run of a script is a process of its own, but for this file, and may ask for another precision."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def scripts():
    return {name: load_script(name) for name in ("finetune_lora", "evaluate_finetuned", "merge_adapter")}


def picture(is_bright, is_striped, rng):
    pixels = rng.normal(170 if is_bright else 80, 20, (12, 12, 1)).repeat(3, axis=2)
    if is_striped:
        pixels[::2] -= 50
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def hospital_rows(split, num, rng, with_text=True):
    for number in range(num):
        is_bright, is_striped = number % 2 == 0, number % 3 == 0
        words = f"a {'bright' if is_bright else 'dark'} {'striped' if is_striped else 'plain'} picture"
        figure = FigureRow(
            f"{split}-{number}", words if with_text else "", image_bytes=picture(is_bright, is_striped, rng)
        )
        groups = PatientGroups(sex="F" if number % 2 else "M", scanner="One" if number < 4 else "Two")
        labels = (("bright", is_bright), ("striped", is_striped))
        yield HospitalRow(figure, f"{split}-patient-{number}", "", labels, groups)


def write_data(folder, with_text=True, task="multi_label", num=24):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        write_hospital_rows(hospital_rows(split, num, rng, with_text), folder, split)
    counts = {split: {"rows": num, "patients": num} for split in ("train", "validation", "test")}
    write_dataset_facts(DatasetFacts("figures", task, CLASSES, counts, {}, {}, {}), folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def conceptclip(tmp_path_factory):
    """Folder of an untrained ConceptCLIP."""
    folder = tmp_path_factory.mktemp("conceptclip")
    torch.manual_seed(0)
    tokenizer = train_wordpiece_tokenizer(["a bright striped picture", "a dark plain picture"] * 4, 60, max_length=16)
    text = SMALL | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = SMALL | {"image_size": 12, "patch_size": 4}
    ConceptCLIPModel(ConceptCLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    image_processor = SiglipImageProcessorPil(size={"height": 12, "width": 12})
    ConceptCLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def command_line(recipe, base, data, output, **changes):
    settings = QUICK | {
        "model.from_pretrained": base,
        "data.folder": data,
        "training.output_dir": output,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return ["--config", str(RECIPES / f"finetune_{recipe}.yaml"), *words]


def finetune(scripts, *arguments, **changes):
    return scripts["finetune_lora"].main(command_line(*arguments, **changes))


@pytest.fixture(scope="module")
def adapter(scripts, conceptclip, data, tmp_path_factory):
    """Folder of a run that trained an adapter for the labels."""
    folder = tmp_path_factory.mktemp("adapter")
    changes = {"training__max_steps": 20, "training__evaluate_every": 10, "training__learning_rate": 0.02}
    assert finetune(scripts, "classification", conceptclip, data, folder, **changes) == 0
    return folder


def last_validation(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation_auroc" in line][-1]


def test_an_adapter_learns_and_its_folder_holds_no_weight_of_the_base(adapter, conceptclip):
    validated = last_validation(adapter)
    assert validated["validation_auroc"] > 0.75
    assert validated["validation_auroc_low"] <= validated["validation_auroc"] <= validated["validation_auroc_high"]
    names = {path.name for path in (adapter / "final").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "base_model.json", "head_config.json"} <= names
    assert {"processor_config.json", "tokenizer.json"} <= names
    weights = load_file(adapter / "final" / "adapter_model.safetensors")
    assert all("lora" in name or "classifier" in name for name in weights)


# Runs in a process of its own.
RELOAD = """
import sys
import torch
from transformers import AutoModelForImageClassification
from peft import PeftModel
import medclip_hf
from medclip_hf import ConceptCLIPConfig
from medclip_hf.modeling.conceptclip.image_classification_conceptclip import ConceptCLIPForImageClassification

AutoModelForImageClassification.register(ConceptCLIPConfig, ConceptCLIPForImageClassification, exist_ok=True)
adapter, base, merged = sys.argv[1:]
pixels = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    by_auto = AutoModelForImageClassification.from_pretrained(adapter).eval()(pixel_values=pixels).logits
    config = AutoModelForImageClassification.from_pretrained(adapter).config
    bare = ConceptCLIPForImageClassification.from_pretrained(base, id2label=config.id2label)
    by_peft = PeftModel.from_pretrained(bare, adapter).eval()(pixel_values=pixels).logits
    by_merged = AutoModelForImageClassification.from_pretrained(merged).eval()(pixel_values=pixels).logits
assert list(config.id2label.values()) == ["bright", "striped"], config.id2label
assert config.problem_type == "multi_label_classification"
assert torch.equal(by_auto, by_peft)
torch.testing.assert_close(by_merged, by_auto, rtol=1e-5, atol=1e-5)
assert by_auto.std() > 0.1
"""


def test_adapter_and_merged_model_are_equal_in_a_new_process(scripts, adapter, conceptclip, tmp_path):
    merged = tmp_path / "merged"
    assert scripts["merge_adapter"].main(["--adapter", str(adapter / "final"), "--output", str(merged)]) == 0
    assert not list(merged.glob("adapter*"))
    child = subprocess.run(
        [sys.executable, "-c", RELOAD, str(adapter / "final"), str(conceptclip), str(merged)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr


def test_merging_refuses_another_base_and_a_folder_in_use(scripts, adapter, conceptclip, fvlm, tmp_path, capsys):
    other = tmp_path / "other"
    torch.manual_seed(9)
    ConceptCLIPModel(ConceptCLIPConfig.from_pretrained(conceptclip)).save_pretrained(other)
    options = ["--adapter", str(adapter / "final"), "--output", str(tmp_path / "merged")]
    assert scripts["merge_adapter"].main([*options, "--base", str(other)]) == 2
    assert "other weights" in capsys.readouterr().err
    assert scripts["merge_adapter"].main([*options, "--base", str(fvlm)]) == 2
    assert "is for a conceptclip model" in capsys.readouterr().err
    assert scripts["merge_adapter"].main([*options[:3], str(other)]) == 2
    assert "--force" in capsys.readouterr().err


def test_the_test_patients_are_measured_with_intervals_calibration_and_subgroups(scripts, adapter, data, tmp_path):
    options = ["--model", str(adapter / "final"), "--data", str(data), "--output", str(tmp_path), "--device", "cpu"]
    assert scripts["evaluate_finetuned"].main([*options, "--num-resamples", "50", "--card", "--name", "Stripes"]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    overall = found["figures"]["overall"]
    for name in ("auroc", "auprc", "sensitivity_at_specificity", "ece"):
        assert overall[name]["low"] <= overall[name]["value"] <= overall[name]["high"]
    assert found["figures"]["num_groups"] == 24
    assert found["temperature"] > 0
    assert len(found["thresholds"]) == 2
    assert found["subgroups"]["sex"]["F"]["num_groups"] == 12
    assert found["subgroups"]["scanner"]["One"] == {"left_out": "fewer than 10 patients"}
    assert {path.name for path in tmp_path.iterdir()} >= {"report.html", "reliability.png", "roc.png"}
    card = (adapter / "final" / "README.md").read_text()
    assert "Stripes" in card
    assert "library_name: peft" in card
    written = [card, *(path.read_text() for path in tmp_path.glob("*.json")), (tmp_path / "report.html").read_text()]
    assert not any("patient-1" in text or str(data) in text for text in written)


@pytest.mark.parametrize("mode", ["full", "linear_probe"])
def test_everything_or_the_head_alone_is_trained(scripts, conceptclip, data, tmp_path, mode):
    changes = {"method__mode": mode, "training__layer_decay": 0.7, "training__learning_rate": 0.01}
    assert finetune(scripts, "classification", conceptclip, data, tmp_path, **changes) == 0
    before = load_file(conceptclip / "model.safetensors")
    after = load_file(tmp_path / "final" / "model.safetensors")
    tower = [name for name in after if name.startswith("vision_model.")]
    assert all(torch.equal(before[name], after[name]) for name in tower) == (mode == "linear_probe")
    assert "classifier.weight" in after
    assert "validation_auroc" in last_validation(tmp_path)


def test_an_interrupted_adapter_run_goes_on_where_it_was(scripts, conceptclip, data, tmp_path):
    changes = {"training__checkpoint_every": 2, "training__keep_checkpoints": 3}
    assert finetune(scripts, "classification", conceptclip, data, tmp_path / "whole", **changes) == 0
    line = command_line("classification", conceptclip, data, tmp_path / "parts", **changes)
    assert scripts["finetune_lora"].main(line) == 0
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "checkpoint-00000004")  # as if it had ended after step 3
    assert scripts["finetune_lora"].main([*line, "--resume"]) == 0
    starts = json.loads((tmp_path / "parts" / "run.json").read_text())["starts"]
    assert [start["from_step"] for start in starts] == [0, 2]
    first, second = (load_file(tmp_path / name / "final/adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_images_with_texts_are_learned_with_mixed_precision_and_checkpointing(scripts, conceptclip, data, tmp_path):
    changes = {"training__mixed_precision": "bf16", "training__gradient_checkpointing": "true"}
    changes |= {"data__max_length": 16, "training__micro_batch_size": 4}
    assert finetune(scripts, "image_text", conceptclip, data, tmp_path, **changes) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    recalls = [line["validation_recall@1"] for line in lines if "validation_recall@1" in line]
    assert len(recalls) == 2
    weights = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert {name.split(".")[2] for name in weights} == {"vision_model", "text_model"}


def test_a_single_label_of_several_is_learned_and_measured(scripts, conceptclip, tmp_path):
    folder = write_data(tmp_path / "data")
    for split in ("train", "validation", "test"):
        rows = [
            replace(row, labels=(("bright", dict(row.labels)["bright"]), ("dark", not dict(row.labels)["bright"])))
            for row in hospital_rows(split, 24, np.random.default_rng(0))
        ]
        write_hospital_rows(rows, folder, split)
    write_dataset_facts(DatasetFacts("figures", "single_label", ("bright", "dark"), {}, {}, {}, {}), folder)
    run = tmp_path / "run"
    assert finetune(scripts, "classification", conceptclip, folder, run, method__use_dora="true") == 0
    options = ["--model", str(run / "final"), "--data", str(folder), "--output", str(tmp_path / "e")]
    assert scripts["evaluate_finetuned"].main([*options, "--device", "cpu", "--num-resamples", "20"]) == 0
    found = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert found["figures"]["kind"] == "single-label"
    assert 0 <= found["figures"]["overall"]["accuracy"]["value"] <= 1


def test_a_model_without_a_head_is_asked_by_prompts(scripts, conceptclip, data, tmp_path):
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("bright: [a dark picture, a bright picture]\nstriped: [a plain picture, a striped picture]\n")
    options = ["--model", str(conceptclip), "--data", str(data), "--output", str(tmp_path), "--device", "cpu"]
    options += ["--num-resamples", "20"]
    assert scripts["evaluate_finetuned"].main([*options, "--prompts", str(prompts)]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["protocol"] == "zero-shot by prompts"
    assert scripts["evaluate_finetuned"].main(options) == 2


# Bad input ---------------------------------------------------------------------------------------------------------


def refused(scripts, capsys, *arguments, **changes):
    assert finetune(scripts, *arguments, **changes) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_patient_in_two_splits_is_refused(scripts, conceptclip, tmp_path, capsys, split):
    folder = write_data(tmp_path / "data")
    write_hospital_rows(hospital_rows("train", 4, np.random.default_rng(0)), folder, split)
    assert f"4 patients are in both train and {split}" in refused(
        scripts, capsys, "classification", conceptclip, folder, tmp_path / "run"
    )


def test_an_empty_text_column_is_refused(scripts, conceptclip, tmp_path, capsys):
    folder = write_data(tmp_path / "data", with_text=False)
    error = refused(scripts, capsys, "image_text", conceptclip, folder, tmp_path / "run", data__max_length=16)
    assert "text column" in error


def test_a_label_with_one_value_is_refused(scripts, conceptclip, tmp_path, capsys):
    folder = write_data(tmp_path / "data")
    rows = list(hospital_rows("train", 24, np.random.default_rng(0)))[1::2]
    write_hospital_rows(rows, folder, "train")
    error = refused(scripts, capsys, "classification", conceptclip, folder, tmp_path / "run")
    assert "'bright': 0 present, 12 absent" in error


def test_an_adapter_is_no_base(scripts, adapter, data, tmp_path, capsys):
    assert "merge_adapter.py" in refused(scripts, capsys, "classification", adapter / "final", data, tmp_path)


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("image_text", {"method__mode": "linear_probe"}, "contrastive task has none"),
        ("classification", {"task__classes": "[fracture]"}, "fracture"),
        ("classification", {"method__quantization": "4bit"}, "bitsandbytes"),
        ("classification", {"method__targets": "[querry]"}, "querry"),
        ("ct_findings", {}, "is for a fvlm model"),
        ("classification", {"model__from_pretrained": "/nowhere/model"}, "cannot be loaded"),
        ("classification", {"data__folder": "/nowhere/data"}, "dataset.json"),
    ],
)
def test_what_does_not_go_together_is_refused(
    scripts, conceptclip, data, tmp_path, capsys, recipe, changes, message, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    line = command_line(recipe, conceptclip, data, tmp_path, **changes)
    assert scripts["finetune_lora"].main(line) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


# CT ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Drawn scans of 14 patients, prepared: training, validation and test."""
    pytest.importorskip("zarr")
    folder = tmp_path_factory.mktemp("scans")
    drawn = TorsoSettings(
        in_plane_size=32,
        slice_spacing_mm=(12.0, 12.0),
        max_studies=1,
        max_reconstructions=1,
        prevalence=0.5,
        findings=("cardiomegaly", "pleural effusion"),
    )
    write_ct_rate(folder / "ct_rate", 14, settings=drawn)
    prepare_scans(
        ct_rate_sources(folder / "ct_rate", "train"),
        folder / "prepared",
        "train",
        EngineSettings(contract=CONTRACT),
        num_workers=0,
        show_progress=False,
    )
    rows = read_scan_rows(folder / "prepared", "train")
    for split, part in (("train", rows[:8]), ("validation", rows[8:11]), ("test", rows[8:])):
        write_scan_rows(part, folder / "prepared", split)
    write_scan_rows(rows[11:], folder / "prepared", "test")
    return folder / "prepared"


@pytest.fixture(scope="module")
def fvlm(tmp_path_factory):
    """Folder of an untrained fVLM."""
    folder = tmp_path_factory.mktemp("fvlm")
    torch.manual_seed(0)
    vision = SMALL | {"image_size_dhw": SIZE, "patch_size_dhw": PATCH, "initializer_range": 0.2}
    tokenizer = train_wordpiece_tokenizer(["Not Cardiomegaly.", "Pleural effusion."] * 2, 300)
    text = SMALL | {"vocab_size": len(tokenizer)}
    config = FVLMConfig(vision_config=vision, text_config=text, feature_layers=(0,), pooling_num_attention_heads=2)
    FVLMModel(config).save_pretrained(folder)
    image_processor = FVLMImageProcessor(
        size_dhw=SIZE, patch_size_dhw=PATCH, crop_margin_dhw=(1, 2, 2), spacing_mm_dhw=CONTRACT.spacing_mm_dhw
    )
    FVLMProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


TWO = "{Cardiomegaly: heart, Pleural effusion: lung}"


def test_findings_of_scans_are_learned_and_measured(scripts, fvlm, scans, tmp_path):
    run = tmp_path / "run"
    changes = {"task__classes": "[Cardiomegaly, Pleural effusion]", "training__batch_size_per_process": 4}
    assert finetune(scripts, "ct_findings", fvlm, scans, run, **changes) == 0
    head = json.loads((run / "final" / "head_config.json").read_text())
    assert head["findings"] == {"Cardiomegaly": "heart", "Pleural effusion": "lung"}
    options = ["--model", str(run / "final"), "--data", str(scans), "--output", str(tmp_path / "e"), "--device", "cpu"]
    assert scripts["evaluate_finetuned"].main([*options, "--num-resamples", "20"]) == 0
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["figures"]["num_samples"] == 3


def test_scans_with_reports_are_learned(scripts, fvlm, scans, tmp_path):
    changes = {"training__batch_size_per_process": 4, "method__targets": "[query, value, word_embeddings]"}
    assert finetune(scripts, "ct_reports", fvlm, scans, tmp_path, **changes) == 0
    validated = last_validation(tmp_path)
    assert validated["validation_loss"] > 0
    weights = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert any("lora_embedding" in name for name in weights)


def test_findings_of_anatomies_that_the_base_lacks_are_refused(scripts, fvlm, scans, tmp_path, capsys):
    changes = {"task__classes": "[Cardiomegaly]", "task__findings": "{Cardiomegaly: liver}"}
    error = refused(scripts, capsys, "ct_findings", fvlm, scans, tmp_path, **changes)
    assert "'Cardiomegaly': 'liver'" in error
    assert "heart" in error
