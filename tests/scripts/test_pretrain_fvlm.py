import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

pytest.importorskip("zarr")

from medclip_hf.data.ct.engine import EngineSettings, prepare_scans
from medclip_hf.data.ct.geometry import GeometryContract
from medclip_hf.data.ct.scan_index import read_scan_rows
from medclip_hf.data.ct.sources import ScanSource, ct_rate_sources
from medclip_hf.data.phantoms.torso_files import write_ct_rate
from medclip_hf.data.phantoms.torsos import TorsoSettings
from medclip_hf.evaluation.ct_zero_shot import Finding, embed_findings, score_scan
from medclip_hf.training.arguments import build_sections, read_recipe
from medclip_hf.training.scan_datasets import read_stored_scan

SPACING_MM = (12.0, 12.0, 12.0)
NUM_PATIENTS = {"train": 8, "valid": 6}
SHRUNK = {
    "model.vocab_size": 400,
    "model.config.vision_config.image_size_dhw": [28, 24, 24],
    "model.config.vision_config.patch_size_dhw": [7, 8, 8],
    "training.batch_size_per_process": 4,
    "training.max_steps": 2,
    "training.evaluate_every": "null",
    "training.checkpoint_every": "null",
    "training.progress_bar": "false",
    "training.log_every": 1,
}
RECIPES = Path(__file__).resolve().parents[2] / "scripts" / "recipes"


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[2] / "scripts" / "pretrain_fvlm.py"
    spec = importlib.util.spec_from_file_location("pretrain_fvlm", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["pretrain_fvlm"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Drawn torsos, through the CT engine: one study of either split is damaged."""
    folder = tmp_path_factory.mktemp("prepared")
    drawn = TorsoSettings(in_plane_size=32, slice_spacing_mm=(12.0, 12.0), max_studies=1, prevalence=0.4)
    settings = EngineSettings(contract=GeometryContract(spacing_mm_dhw=SPACING_MM))
    for split, ours in (("train", "train"), ("valid", "validation")):
        write_ct_rate(folder / "ct_rate", NUM_PATIENTS[split], split=split, settings=drawn)
        sources = ct_rate_sources(folder / "ct_rate", ours)
        prepare_scans(sources, folder / "prepared", ours, settings, show_progress=False)
    for shard in (folder / "prepared/volumes").glob("*/*_3_a_*.zarr/image/c/0/0/0"):
        shard.write_bytes(shard.read_bytes()[:50])
    return folder / "prepared"


def settings(prepared, output, **values):
    flat = SHRUNK | {"data.folder": prepared, "training.output_dir": output}
    flat |= {name.replace("__", "."): value for name, value in values.items()}
    return [part for name, value in flat.items() for part in ("--set", f"{name}={value}")]


def pretrain(script, prepared, output, *options, **values):
    recipe = str(RECIPES / "fvlm_tiny.yaml")
    return script.main(["--config", recipe, *settings(prepared, output, **values), *options])


def logged(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output):
    return load_file(output / "final" / "model.safetensors")


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=0, msg=name)


@pytest.fixture(scope="module")
def first_run(script, prepared, tmp_path_factory):
    """Output folder of the tiny recipe, four steps with a validation and a checkpoint after two."""
    output = tmp_path_factory.mktemp("runs") / "first"
    values = {"training__max_steps": 4, "training__evaluate_every": 2, "training__checkpoint_every": 2}
    assert pretrain(script, prepared, output, **values) == 0
    return output


def test_it_leaves_a_model_and_processor_that_the_auto_classes_load(first_run):
    model, processor = (kind.from_pretrained(first_run / "final") for kind in (AutoModel, AutoProcessor))
    assert "ct-feature-extraction" in json.loads((first_run / "final" / "config.json").read_text())["custom_pipelines"]
    assert (first_run / "final" / "pipeline_ct.py").is_file()
    assert model.config.anatomies == ("lung", "heart", "esophagus", "aorta")
    assert processor.image_processor.spacing_mm_dhw == list(SPACING_MM)
    assert processor.image_processor.size_dhw == [28, 24, 24]
    assert tuple(processor.image_processor.crop_margin_dhw) == (1, 2, 2)  # 15, 20 and 20 mm
    tokens = processor.tokenizer(["Cardiomegaly."], return_tensors="pt", return_token_type_ids=False)
    assert model(**tokens).text_embeds.shape == (1, 32)


def test_validation_reports_the_zero_shot_auc_of_each_finding_and_their_mean(first_run):
    validations = [line for line in logged(first_run) if "validation_mean_auc" in line]
    assert [line["step"] for line in validations] == [2, 4]
    areas = [value for name, value in validations[0].items() if name.startswith("validation_auc_")]
    assert len(areas) >= 3
    assert validations[0]["validation_mean_auc"] == pytest.approx(sum(areas) / len(areas))
    assert validations[0]["validation_num_scans"] == NUM_PATIENTS["valid"]
    assert validations[0]["validation_num_scans_set_aside"] == 1


def test_a_damaged_scan_is_set_aside_and_named(first_run):
    lines = (first_run / "set_aside" / "rank-00000.jsonl").read_text().splitlines()
    assert {json.loads(line)["row_id"].rpartition("_")[0] for line in lines} == {"train_3_a"}
    assert {json.loads(line)["reason"] for line in lines} == {"store damaged"}


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(script, prepared, first_run, tmp_path):
    (tmp_path / "checkpoints").symlink_to(first_run / "checkpoints")
    values = {"training__max_steps": 4, "training__evaluate_every": 2, "training__checkpoint_every": 2}
    checkpoint = first_run / "checkpoints" / "checkpoint-00000002"
    assert pretrain(script, prepared, tmp_path / "again", "--resume", str(checkpoint), **values) == 0
    assert_same(weights(first_run), weights(tmp_path / "again"))


@pytest.mark.parametrize("abnormal", ["text_teacher", "peer"])
def test_corrected_targets_train_and_resume_bit_for_bit(script, prepared, first_run, tmp_path, abnormal):
    values = {
        "loss__abnormal": abnormal,
        "loss__teacher_momentum": 0.5,
        "loss__peer_model": first_run / "final" if abnormal == "peer" else "null",
        "loss__peer_ramp_steps": 3,
        "training__max_steps": 4,
        "training__checkpoint_every": 2,
        "data__validation_split": "null",
    }
    if abnormal == "peer":
        values["model__tokenizer"] = first_run / "final"
    assert pretrain(script, prepared, tmp_path / "whole", **values) == 0
    checkpoint = tmp_path / "whole" / "checkpoints" / "checkpoint-00000002"
    assert pretrain(script, prepared, tmp_path / "resumed", "--resume", str(checkpoint), **values) == 0
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))
    plain = values | {"loss__abnormal": "none", "loss__peer_model": "null"}
    assert pretrain(script, prepared, tmp_path / "plain", **plain) == 0
    assert logged(tmp_path / "plain")[-1]["loss"] != logged(tmp_path / "whole")[-1]["loss"]


def test_whole_volumes_can_be_trained_on_whole_reports(script, prepared, tmp_path):
    values = {
        "data__whole_volume": "true",
        "model__config__anatomies": "[body]",
        "loss__reduce_false_negatives": "false",
        "training__evaluate_every": 2,
    }
    assert pretrain(script, prepared, tmp_path / "clip", **values) == 0
    assert AutoModel.from_pretrained(tmp_path / "clip" / "final").config.anatomies == ("body",)
    lines = logged(tmp_path / "clip")
    assert "validation_auc_cardiomegaly" in lines[-1]
    assert all(line["body_loss"] > 0 for line in lines if "loss" in line)


def test_a_trained_model_can_be_trained_on(script, prepared, first_run, tmp_path):
    recipe = read_recipe(RECIPES / "fvlm_tiny.yaml")
    section = script.ModelSection(from_pretrained=str(first_run / "final"))
    config = script.read_config(section)
    sections = build_sections(recipe | {"model": {}, "data": {"folder": str(prepared)}}, script.SECTIONS)
    dataset = script.open_split(sections["data"], "train", config)
    model, _ = script.build_model_and_processor(section, config, dataset, 128)
    assert_same(weights(first_run), dict(model.state_dict()))


def test_scans_of_another_geometry_are_refused(script, prepared, first_run):
    section = script.ModelSection(from_pretrained=str(first_run / "final"))
    config = script.read_config(section)
    dataset = script.open_split(script.DataSection(str(prepared)), "train", config)
    dataset.contract = GeometryContract(spacing_mm_dhw=(3.0, 1.0, 1.0), hu_min=-300.0)
    with pytest.raises(ValueError, match=r"spacing_mm_dhw is \[3.0, 1.0, 1.0\], the model wants \[12.0.*hu_min"):
        script.build_model_and_processor(section, config, dataset, 128)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data__folder": "nowhere"}, "prepare_ct.py"),
        ({"data__train_split": "test"}, "splits"),
        ({"data__max_length": 500}, "128 positions"),
        ({"loss__abnormal": "peer"}, "loss.peer_model"),
        ({"loss__reduce_false_negatives": "false", "loss__abnormal": "text_teacher"}, "reduce_false_negatives"),
        ({"loss__abnormal": "teacher"}, "must be one of"),
        ({"model__config__anatomies": "[lung, liver]"}, "liver"),
        ({"model__from_pretrained": "folder"}, "comes alone"),
        ({"data__whole_volume": "true"}, "one vector a scan"),
        ({"model__vision_weights": "nowhere.pth"}, "nowhere.pth"),
        ({"model__text_tower": "/nowhere/bert"}, "section 'model'"),
        ({"loss__abnormal": "peer", "loss__peer_model": "/nowhere/peer"}, "section 'loss'"),
    ],
)
def test_mistakes_end_with_one_line_that_names_them(script, prepared, tmp_path, capsys, values, message):
    assert pretrain(script, prepared, tmp_path / "run", **values) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["fvlm_tiny", "fvlm_demo", "fvlm_ct_rate"])
def test_every_recipe_is_complete(script, name):
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    sections = build_sections(recipe, script.SECTIONS)
    script.read_config(sections["model"])


def test_the_published_recipe_holds_the_published_values(script):
    sections = build_sections(read_recipe(RECIPES / "fvlm_ct_rate.yaml"), script.SECTIONS)
    arguments = sections["training"]
    assert arguments.batch_size_per_process * arguments.num_processes == 56
    assert (arguments.learning_rate, arguments.warmup_steps, arguments.weight_decay) == (1e-4, 377, 0.01)
    assert script.read_config(sections["model"]).vision_config.image_size_dhw == (112, 256, 352)


def test_two_processes_by_accelerate_launch_train_as_one_does(script, prepared, repository, tmp_path):
    """Dropout off, the same global batch: the same weights up to rounding."""
    values = {
        "model__config__vision_config__hidden_dropout": 0.0,
        "model__config__vision_config__attention_dropout": 0.0,
        "model__config__pooling_dropout": 0.0,
        "model__config__text_config__hidden_dropout_prob": 0.0,
        "model__config__text_config__attention_probs_dropout_prob": 0.0,
        "data__validation_split": "null",
    }
    assert pretrain(script, prepared, tmp_path / "one", **values) == 0
    halved = settings(prepared, tmp_path / "two", **values, training__batch_size_per_process=2)
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "scripts/launch/cpu_processes.yaml", "--num_cpu_threads_per_process", "1"]
    command += ["scripts/pretrain_fvlm.py", "--config", str(RECIPES / "fvlm_tiny.yaml"), *halved]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_real_scans_are_prepared_trained_on_and_scored(script, real_data, tmp_path):
    """A torso NIfTI and a DICOM series in JPEG 2000: masks lie on the organs, a few steps run, scores come out."""
    ct = real_data / "ct"
    anatomies = ("liver", "spleen", "aorta")
    told = {
        "nifti": (
            "Hypodense lesion in the liver.",
            ct / "example_ct.nii.gz",
            ct / "example_seg_fast_force_split.nii.gz",
        ),
        "dicom": ("Splenomegaly.", ct / "example_ct_dicom", ct / "example_seg_dicom.nii.gz"),
    }
    sources = [
        ScanSource(name, name, name, image, labels, findings="The aorta is normal.", impression=impression)
        for name, (impression, image, labels) in told.items()
    ]
    contract = GeometryContract(spacing_mm_dhw=(6.0, 4.0, 4.0))
    report = prepare_scans(
        sources, tmp_path / "real", "train", EngineSettings(contract, anatomies), show_progress=False
    )
    assert report.num_prepared == 2
    values = {
        "model__config__anatomies": f"[{', '.join(anatomies)}]",
        "model__config__vision_config__image_size_dhw": [56, 64, 96],
        "model__config__vision_config__patch_size_dhw": [8, 16, 16],
        "data__validation_split": "null",
        "training__batch_size_per_process": 2,
        "training__max_steps": 3,
    }
    assert pretrain(script, tmp_path / "real", tmp_path / "run", **values) == 0
    model, processor = (kind.from_pretrained(tmp_path / "run" / "final") for kind in (AutoModel, AutoProcessor))
    findings = embed_findings(
        model.eval(), processor.tokenizer, [Finding("Splenomegaly", "spleen", "Normal.", "Large.")]
    )
    for row in read_scan_rows(tmp_path / "real", "train"):
        scan, image, mask = read_stored_scan(tmp_path / "real" / row.store_path, anatomies)
        assert 20 < np.median(image[mask == 1]) < 130, "a liver, with or without contrast"
        inputs = processor(images=image, anatomy_mask=mask, spacing_mm_dhw=scan.spacing_mm_dhw, do_crop=False)
        scores = score_scan(model, inputs["pixel_values"][0, 0], inputs["anatomy_mask"][0], findings)
        assert 0 < scores["Splenomegaly"] < 1
