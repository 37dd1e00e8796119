import csv
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

pytest.importorskip("zarr")

from medclip_hf import FVLMConfig, FVLMModel, FVLMProcessor
from medclip_hf.data.ct.engine import EngineSettings, prepare_scans
from medclip_hf.data.ct.geometry import GeometryContract
from medclip_hf.data.ct.sources import ct_rate_sources
from medclip_hf.data.phantoms.torso_files import write_ct_rate
from medclip_hf.data.phantoms.torsos import TorsoSettings
from medclip_hf.processing.fvlm import FVLMImageProcessor
from medclip_hf.training.tokenizers import train_wordpiece_tokenizer

CONTRACT = GeometryContract(spacing_mm_dhw=(12.0, 12.0, 12.0))
SIZE, PATCH = (28, 24, 24), (7, 8, 8)
SCANS = ("valid_1_a_1", "valid_2_a_1")


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[2] / "scripts" / "score_ct.py"
    spec = importlib.util.spec_from_file_location("score_ct", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["score_ct"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of an untrained model of four anatomies."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = small | {"image_size_dhw": SIZE, "patch_size_dhw": PATCH, "initializer_range": 0.2}
    text = small | {"vocab_size": 300, "initializer_range": 0.2}
    FVLMModel(
        FVLMConfig(vision_config=vision, text_config=text, feature_layers=(0,), pooling_num_attention_heads=2)
    ).save_pretrained(folder)
    image_processor = FVLMImageProcessor(
        size_dhw=SIZE, patch_size_dhw=PATCH, crop_margin_dhw=(1, 2, 2), spacing_mm_dhw=CONTRACT.spacing_mm_dhw
    )
    tokenizer = train_wordpiece_tokenizer(["Not Cardiomegaly.", "Nodule. Opacity."] * 2, 300)
    FVLMProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two drawn scans: as CT-RATE has them, as two plain folders, and prepared by the engine."""
    folder = tmp_path_factory.mktemp("scans")
    drawn = TorsoSettings(in_plane_size=32, slice_spacing_mm=(12.0, 12.0), max_studies=1, max_reconstructions=1)
    paths = write_ct_rate(folder / "ct_rate", 2, split="valid", settings=drawn)
    for room in ("images", "labels"):
        (folder / room).mkdir()
    for path in paths:
        shutil.copy(path, folder / "images")
        shutil.copy(next((folder / "ct_rate/dataset/ts_seg").rglob(path.name)), folder / "labels")
    prepare_scans(
        ct_rate_sources(folder / "ct_rate", "validation"),
        folder / "prepared",
        "validation",
        EngineSettings(contract=CONTRACT),
        show_progress=False,
    )
    return folder


def score(script, model, output, *options):
    return script.main(["--model", str(model), "--output", str(output), "--device", "cpu", *map(str, options)])


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def of_folders(scans):
    return "--images", scans / "images", "--labels", scans / "labels"


def test_every_scan_gets_a_probability_for_each_published_finding(script, model, scans, tmp_path):
    assert score(script, model, tmp_path / "new" / "scores.csv", *of_folders(scans)) == 0
    rows = read(tmp_path / "new" / "scores.csv")
    assert [row.pop("scan_id") for row in rows] == list(SCANS)
    assert [row.pop("refused") for row in rows] == ["", ""]
    assert all(len(row) == 16 and all(0 < float(value) < 1 for value in row.values()) for row in rows)


def test_the_same_scans_get_the_same_scores_by_every_way_in(script, model, scans, tmp_path):
    table = scans / "scans.csv"
    table.write_text("image,labels,scan_id\n" + "".join(f"images/{s}.nii.gz,labels/{s}.nii.gz,{s}\n" for s in SCANS))
    ways = {
        "images": of_folders(scans),
        "table": ("--table", table),
        "ct_rate": ("--ct-rate", scans / "ct_rate"),
        "prepared": ("--prepared", scans / "prepared"),
    }
    for name, options in ways.items():
        assert score(script, model, tmp_path / f"{name}.csv", *options) == 0
        assert read(tmp_path / f"{name}.csv") == read(tmp_path / "images.csv"), name


def test_a_run_that_was_broken_off_goes_on(script, model, scans, tmp_path, capsys):
    output = tmp_path / "scores.csv"
    score(script, model, output, *of_folders(scans))
    whole = output.read_text()
    output.write_text(whole[: whole.rindex("valid_2") + 20])  # killed in the middle of a row
    assert score(script, model, output, *of_folders(scans)) == 0
    assert output.read_text() == whole
    assert "1 scored, 1 there already" in capsys.readouterr().out


def test_a_scan_that_cannot_be_used_has_its_reason_and_does_not_stop_the_others(script, model, scans, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(scans / "images", folder)
    (folder / "no_labels.nii.gz").write_bytes((folder / f"{SCANS[0]}.nii.gz").read_bytes())
    whole = (folder / f"{SCANS[1]}.nii.gz").read_bytes()
    (folder / f"{SCANS[1]}.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert score(script, model, tmp_path / "s.csv", "--images", folder, "--labels", scans / "labels") == 0
    reasons = {row["scan_id"]: row["refused"] for row in read(tmp_path / "s.csv")}
    assert reasons[SCANS[0]] == ""
    assert "truncated" in reasons[SCANS[1]]
    assert "no_labels.nii.gz does not exist" in reasons["no_labels"]


def test_a_scan_rescaled_twice_is_refused(script, model, scans, tmp_path):
    shutil.copytree(scans / "images", tmp_path / "images")
    for path in (tmp_path / "images").iterdir():
        image = nibabel.load(path)
        values = np.asanyarray(image.dataobj) - np.int16(1024)
        nibabel.save(nibabel.Nifti1Image(values, image.affine), path)
    output = tmp_path / "s.csv"
    assert score(script, model, output, "--images", tmp_path / "images", "--labels", scans / "labels") == 1
    assert all(row["refused"] and not row["Cardiomegaly"] for row in read(output))


def test_own_findings_are_scored_by_their_prompts(script, model, scans, tmp_path):
    table = tmp_path / "findings.csv"
    table.write_text("name,anatomy,absent,present\nLarge heart,heart,The heart is normal.,The heart is enlarged.\n")
    assert score(script, model, tmp_path / "s.csv", *of_folders(scans), "--findings", table) == 0
    assert set(read(tmp_path / "s.csv")[0]) == {"scan_id", "refused", "Large heart"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("name,anatomy,absent\nCyst,heart,No cyst.\n", "columns name, anatomy, absent, present"),
        ("name,anatomy,absent,present\n", "must have rows"),
        ("name,anatomy,absent,present\nCyst,kidney,No cyst.,Cyst.\n", "kidney"),
        ("name,anatomy,absent,present\nA,heart,b,c\nA,lung,d,e\n", "twice"),
    ],
)
def test_findings_that_cannot_be_scored_are_refused(script, model, scans, tmp_path, capsys, table, message):
    (tmp_path / "findings.csv").write_text(table)
    options = (*of_folders(scans), "--findings", tmp_path / "findings.csv")
    assert score(script, model, tmp_path / "s.csv", *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images", "nowhere", "--labels", "nowhere"), "is no folder"),
        (("--images", "."), "needs --labels"),
        (("--prepared", "nowhere"), "prepare_ct.py"),
        (("--table", "nowhere.csv"), "no table at"),
    ],
)
def test_a_source_that_is_not_there_is_named(script, model, tmp_path, capsys, options, message):
    assert score(script, model, tmp_path / "s.csv", *options) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_lacks_weights_is_refused(script, model, scans, tmp_path, capsys):
    """Its scores would be random, and look like any others."""
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    assert score(script, folder, tmp_path / "s.csv", "--images", tmp_path, "--labels", tmp_path) == 2
    assert "its weights are not those of its configuration" in capsys.readouterr().err
    assert not (tmp_path / "s.csv").exists()


def test_an_empty_folder_is_named(script, model, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert score(script, model, tmp_path / "s.csv", "--images", tmp_path / "empty", "--labels", tmp_path) == 2
    assert "no scan to score" in capsys.readouterr().err
