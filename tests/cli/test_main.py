"""The command: files and folders in, tables out; bad files set aside and counted; mistakes told in one sentence."""

import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
from importlib.metadata import version

import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from medclip_hf.cli.main import MISTAKE, NOTHING_USABLE, app
from medclip_hf.hub.convert import export_official


def run(*arguments, given=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=given)


def rows_of(text):
    return list(csv.DictReader(text.splitlines()))


# Images ----------------------------------------------------------------------------------------------------------


def test_embed_gives_a_vector_for_each_picture_and_sets_broken_ones_aside(conceptclip_folder, pictures, tmp_path):
    output = tmp_path / "out" / "vectors.parquet"
    done = run("embed", pictures, "-m", conceptclip_folder, "-o", output, "--batch-size", 2)
    assert done.exit_code == 0, done.stderr
    table = pq.read_table(output).to_pylist()
    assert [row["file"] for row in table] == [str(pictures / "a.png"), str(pictures / "deeper" / "b.jpg")]
    assert torch.tensor([row["embedding"] for row in table]).norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert "2 files used, 1 set aside" in done.stderr
    aside = rows_of((tmp_path / "out" / "vectors.parquet.set_aside.csv").read_text())
    assert [row["file"] for row in aside] == [str(pictures / "broken.png")]
    assert "cannot be opened as an image" in aside[0]["reason"]


def test_classify_scores_every_label_of_every_picture(conceptclip_folder, pictures):
    done = run("classify", pictures, "-m", conceptclip_folder, "-l", "nodule", "-l", "effusion", "--format", "json")
    rows = json.loads(done.stdout)
    assert [row["label"] for row in rows] == ["nodule", "effusion"] * 2
    for first, second in (rows[:2], rows[2:]):
        assert first["score"] + second["score"] == pytest.approx(1)


def test_annotate_ranks_concepts_with_boxes(conceptclip_folder, pictures, tmp_path):
    concepts = tmp_path / "concepts.jsonl"
    names = ("nodule", "effusion", "chest")
    lines = [json.dumps({"concept_id": f"C{place}", "canonical_name": name}) for place, name in enumerate(names)]
    concepts.write_text("\n".join(lines))
    done = run("annotate", pictures / "a.png", "-m", conceptclip_folder, "--concepts", concepts, "--top-k", 2)
    rows = rows_of(done.stdout)
    assert [row["rank"] for row in rows] == ["1", "2"]
    assert float(rows[0]["score"]) >= float(rows[1]["score"])
    assert 0 <= int(rows[0]["left"]) < int(rows[0]["right"]) <= 30


def test_paths_come_from_standard_input(conceptclip_folder, pictures):
    done = run("embed", "-", "-m", conceptclip_folder, "--format", "jsonl", given=f"{pictures / 'a.png'}\n\n")
    assert [json.loads(line)["file"] for line in done.stdout.splitlines()] == [str(pictures / "a.png")]


# Scans -----------------------------------------------------------------------------------------------------------


def test_scans_are_scored_inside_their_masks(fvlm_folder, scans, tmp_path):
    findings = tmp_path / "findings.csv"
    findings.write_text("name,anatomy,absent,present\nnodule,lung,not nodule.,nodule.\n")
    images, labels = scans
    done = run("classify", images, "-m", fvlm_folder, "--masks", labels, "--findings", findings)
    assert done.exit_code == 0, done.stderr
    rows = rows_of(done.stdout)
    assert [(row["anatomy"], row["finding"]) for row in rows] == [("lung", "nodule")]
    assert 0 < float(rows[0]["probability"]) < 1
    assert rows[0]["flags"] == ""
    assert "set aside" in done.stderr  # the windowed copy
    assert "windowed.nii.gz" in done.stderr


def test_scans_become_a_vector_for_each_anatomy(fvlm_folder, scans, tmp_path):
    output = tmp_path / "vectors.json"
    done = run("embed", scans[0] / "one.nii.gz", "-m", fvlm_folder, "--without-mask", "whole-volume", "-o", output)
    assert done.exit_code == 0, done.stderr
    rows = json.loads(output.read_text())
    assert [row["anatomy"] for row in rows] == ["lung", "heart"]
    assert len(rows[0]["embedding"]) == 12
    assert "no anatomy mask" in rows[0]["flags"][0]
    assert not output.with_name("vectors.json.set_aside.csv").exists()


# Mistakes --------------------------------------------------------------------------------------------------------


def refused(*arguments, given=None):
    done = run(*arguments, given=given)
    assert done.exit_code == MISTAKE, (done.exit_code, done.stderr, done.exception)
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_wrong_model_is_told(conceptclip_folder, pictures, tmp_path):
    image = pictures / "a.png"
    assert "there is no folder" in refused("embed", image, "-m", tmp_path / "absent")
    assert "holds no config.json" in refused("embed", image, "-m", pictures)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({}))
    assert "pickles are never read" in refused("embed", image, "-m", tmp_path / "model.pkl")
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)).save_pretrained(
        tmp_path / "bert"
    )
    assert "is of type 'bert'" in refused("embed", image, "-m", tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text("{")
    assert "its configuration cannot be read" in refused("embed", image, "-m", tmp_path / "bert")


def test_weights_that_are_no_safetensors_are_not_read(conceptclip_folder, pictures, tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    folder = shutil.copytree(conceptclip_folder, tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    said = refused("embed", pictures / "a.png", "-m", folder)
    assert "pytorch_model.bin is not read: only safetensors are" in said
    assert "use_safetensors" not in said
    assert not (tmp_path / "trapped").exists()


def test_weights_of_another_configuration_are_told(conceptclip_folder, pictures, tmp_path):
    folder = shutil.copytree(conceptclip_folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    assert "not those of its configuration" in refused("embed", pictures / "a.png", "-m", folder)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", "[]", "its configuration cannot be read: it is a list"),
        ("config.json", "[" * 100_000, "its configuration cannot be read: maximum recursion depth"),
        ("config.json", {"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ("config.json", {"hidden_act": "none"}, "KeyError 'none'"),
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1", "header"),
        ("tokenizer.json", "{}", "cannot be used"),
        ("processor_config.json", "{}", "cannot be used"),
    ],
)
def test_a_damaged_folder_is_told(conceptclip_folder, pictures, tmp_path, name, content, said):
    folder = shutil.copytree(conceptclip_folder, tmp_path / "copy")
    if isinstance(content, dict):
        config = json.loads((folder / name).read_text())
        config["vision_config"] |= content
        content = json.dumps(config)
    (folder / name).write_text(content)
    assert said in refused("embed", pictures / "a.png", "-m", folder)


def test_weights_of_the_release_are_told_to_be_converted(conceptclip_folder, pictures, tmp_path):
    folder = shutil.copytree(conceptclip_folder, tmp_path / "copy")
    export_official(conceptclip_folder, folder / "model.safetensors")
    said = refused("embed", pictures / "a.png", "-m", folder)
    assert "scripts/convert_checkpoint.py converts them" in said


def test_a_model_that_asks_for_code_of_its_own_is_refused_and_the_code_not_run(pictures, tmp_path):
    folder = tmp_path / "strange"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "strange", "auto_map": {"AutoModel": "code.Model"}, "trust_remote_code": True})
    )
    (folder / "code.py").write_text(f"import os; os.mkdir({str(tmp_path / 'trapped')!r})")
    assert "asks for code of its own" in refused("embed", pictures / "a.png", "-m", folder)
    assert not (tmp_path / "trapped").exists()


def test_code_in_the_folder_of_our_models_is_not_run_either(conceptclip_folder, pictures, tmp_path):
    folder = shutil.copytree(conceptclip_folder, tmp_path / "copy")
    for file in folder.glob("*.py"):
        file.write_text(f"import os; os.mkdir({str(tmp_path / 'trapped')!r})")
    assert run("embed", pictures / "a.png", "-m", folder).exit_code == 0
    assert not (tmp_path / "trapped").exists()


def test_wrong_arguments_are_told(conceptclip_folder, fvlm_folder, pictures, scans, tmp_path):
    image = pictures / "a.png"
    model = ("-m", conceptclip_folder)
    assert "each with --label" in refused("classify", image, *model)
    assert "a single class" in refused("classify", image, *model, "-l", "nodule")
    assert "--activation is" in refused("classify", image, *model, "-l", "nodule", "--activation", "relu")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe")
    assert "latin.txt is no text in UTF-8" in refused("annotate", image, *model, "--concepts", tmp_path / "latin.txt")
    assert "end the name in .csv" in refused("embed", image, *model, "-o", tmp_path / "out.txt")
    assert "Parquet is a file" in refused("embed", image, *model, "--format", "parquet")
    assert "--dtype is" in refused("embed", image, *model, "--dtype", "int8")
    assert "cannot be used" in refused("embed", image, *model, "--device", "nonsense")
    assert "holds no picture" in refused("embed", scans[0], *model)
    assert "there is no file to work on" in refused("embed", "-", *model, given="\n")
    assert "takes a ConceptCLIP" in refused("annotate", image, "-m", fvlm_folder)
    ct = ("classify", scans[0], "-m", fvlm_folder)
    assert "--without-mask whole-volume" in refused(*ct)
    assert "--without-mask is whole-volume" in refused(*ct, "--without-mask", "none")
    assert "expected 'totalsegmentator'" in refused(*ct, "--segmenter", "none")
    latin = ("--masks", scans[1], "--findings", tmp_path / "latin.txt")
    assert "latin.txt is no CSV table in UTF-8" in refused(*ct, *latin)
    assert "use --findings" in refused(*ct, "--masks", scans[1], "-l", "nodule")
    assert "is v1 or v2" in refused(*ct, "--masks", scans[1], "--label-version", "v3")
    assert "no label file" in refused(*ct, "--masks", tmp_path / "absent")
    (tmp_path / "findings.csv").write_text("name,anatomy\nnodule,lung\n")
    assert "no cell empty" in refused(*ct, "--masks", scans[1], "--findings", tmp_path / "findings.csv")


def test_where_no_file_can_be_used_the_exit_code_says_so(conceptclip_folder, pictures, tmp_path):
    for command in (("embed",), ("classify", "-l", "nodule", "-l", "chest"), ("annotate",)):
        paths = (pictures / "broken.png", tmp_path / "absent.png")
        done = run(*command, *paths, "-m", conceptclip_folder, "-o", tmp_path / "out.csv")
        assert done.exit_code == NOTHING_USABLE, done.stderr
        assert "0 files used, 2 set aside" in done.stderr


def test_an_error_leaves_an_older_table_as_it_was(conceptclip_folder, pictures, tmp_path):
    output = tmp_path / "out.csv"
    output.write_text("older")
    refused("classify", pictures / "a.png", "-m", conceptclip_folder, "-l", "nodule", "-l", "nodule", "-o", output)
    assert output.read_text() == "older"
    assert {path.name for path in tmp_path.iterdir()} == {"out.csv", "pictures"}


# The program -----------------------------------------------------------------------------------------------------


def test_doctor_tells_versions_devices_decoders_and_caches_but_no_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    done = run("doctor", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["packages"]["torch"] == torch.__version__
    assert found["devices"]["cpu"]
    assert "pydicom" in found["dicom_decoders"]["RLELossless"]
    assert set(found["caches"]) >= {"HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE"}
    assert "hf_secret" not in done.stdout
    assert "versions" in run("doctor").stdout


def test_help_version_and_mistakes_do_not_wait_for_torch(repository):
    code = (
        "import sys; sys.argv[0] = '/usr/bin/medclip-hf'; from medclip_hf.cli.main import app\n"
        "for line in sys.stdin:\n"
        "    print(app(line.split(), standalone_mode=False))\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    lines = "--version\nclassify --help\nembed a.png -m /absent/folder\n"
    child = subprocess.run(
        [sys.executable, "-c", code], input=lines, capture_output=True, text=True, timeout=60, check=True
    )
    assert child.stdout.startswith(f"{version('medclip-hf')}\n")
    assert "--label" in child.stdout
    assert child.stderr == "error: there is no folder /absent/folder.\n"


def test_the_program_registers_the_models_that_it_loads(conceptclip_folder, pictures):
    code = "import sys; sys.argv[0] = 'medclip-hf'; from medclip_hf.cli.main import app; app()"
    command = [sys.executable, "-c", code, "embed", str(pictures / "a.png"), "-m", str(conceptclip_folder)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith("file,embedding_0,")
