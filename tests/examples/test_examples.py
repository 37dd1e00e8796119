"""Examples and guides run from end to end, on small models that have learned nothing."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BertTokenizer
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import (
    ConceptCLIPConfig,
    ConceptCLIPModel,
    ConceptCLIPProcessor,
    FVLMConfig,
    FVLMImageProcessor,
    FVLMModel,
    FVLMProcessor,
)
from medclip_hf.evaluation.task_data import read_task_data
from medclip_hf.evaluation.tasks import read_task

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.,-"]
WORDS += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}


def tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})


@pytest.fixture(scope="module")
def conceptclip(tmp_path_factory):
    torch.manual_seed(0)
    config = ConceptCLIPConfig(
        text_config={**SIZES, "vocab_size": len(WORDS), "hidden_size": 8, "max_position_embeddings": 128},
        vision_config={**SIZES, "hidden_size": 16, "image_size": 16, "patch_size": 4, "hidden_act": "gelu"},
    )
    folder = tmp_path_factory.mktemp("conceptclip")
    ConceptCLIPModel(config).save_pretrained(folder)
    processor = ConceptCLIPProcessor(SiglipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer())
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def fvlm(tmp_path_factory):
    torch.manual_seed(0)
    config = FVLMConfig(
        text_config={**SIZES, "vocab_size": len(WORDS), "hidden_size": 8},
        vision_config={**SIZES, "hidden_size": 16, "image_size_dhw": (16, 16, 16), "patch_size_dhw": (8, 8, 8)},
        feature_layers=(),
        projection_dim=12,
    )
    folder = tmp_path_factory.mktemp("fvlm")
    FVLMModel(config).save_pretrained(folder)
    image_processor = FVLMImageProcessor(
        anatomies=config.anatomies,
        size_dhw=(16, 16, 16),
        patch_size_dhw=(8, 8, 8),
        crop_margin_dhw=(1, 1, 1),
        spacing_mm_dhw=(8, 8, 8),
    )
    FVLMProcessor(image_processor, tokenizer()).save_pretrained(folder)
    return str(folder)


def run(repository, name, *words):
    """Exit code of an example's main, in this process."""
    return runpy.run_path(str(repository / "examples" / name))["main"]([str(word) for word in words])


def test_zero_shot_heatmaps_of_a_drawn_figure_and_of_a_file(repository, conceptclip, tmp_path, capsys):
    output = tmp_path / "heatmaps.png"
    assert run(repository, "zero_shot_heatmaps.py", "--model", conceptclip, "--output", output) == 0
    assert "(drawn here)" in capsys.readouterr().out
    assert Image.open(output).width > 400
    Image.effect_noise((30, 20), 60).save(tmp_path / "figure.png")
    words = ("--image", tmp_path / "figure.png", "--findings", "edema", "fracture", "--output", output)
    assert run(repository, "zero_shot_heatmaps.py", "--model", conceptclip, *words) == 0
    assert "edema" in capsys.readouterr().out


def test_ct_scoring_of_a_drawn_patient(repository, fvlm, tmp_path, capsys):
    output = tmp_path / "finding.png"
    assert run(repository, "ct_scoring.py", "--model", fvlm, "--output", output) == 0
    assert "Cardiomegaly (heart)" in capsys.readouterr().out
    assert Image.open(output).width > 400


@pytest.mark.parametrize(
    ("name", "words", "sentence"),
    [
        ("zero_shot_heatmaps.py", ("--image", "absent.png"), "absent.png"),
        ("ct_scoring.py", ("--scan", "absent.nii.gz"), "run TotalSegmentator"),
    ],
)
def test_a_mistake_of_the_caller_is_one_sentence(repository, conceptclip, fvlm, capsys, name, words, sentence):
    model = fvlm if name == "ct_scoring.py" else conceptclip
    assert run(repository, name, "--model", model, *words) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/journeys.md"])
def test_python_of_the_guides_runs_on_what_the_examples_draw(
    repository, conceptclip, fvlm, page, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run(repository, "draw_inputs.py", "--num-films", 2, "--num-figures", 2) == 0
    for folder, model in (("conceptclip/stage2", conceptclip), ("fvlm/per_anatomy_calibrated", fvlm)):
        Path("demo_output", folder).mkdir(parents=True)
        Path("demo_output", folder, "final").symlink_to(model)
    known: dict = {}
    blocks = re.findall(
        r"^```python\n(.*?)^```", (repository / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert blocks
    for block in blocks:
        exec(block, known)
    assert capsys.readouterr().out.count("\n") > 2


def test_the_drawn_benchmark_and_hospital_are_whole(repository, tmp_path):
    assert run(repository, "draw_inputs.py", "--output", tmp_path, "--num-films", 4, "--num-figures", 3) == 0
    films = (tmp_path / "hospital" / "films.csv").read_text(encoding="utf-8").splitlines()
    assert films[0] == "path,patient_id,report,nodule,cyst"
    assert len(films) == 5
    assert all((tmp_path / "hospital" / line.split(",")[0]).is_file() for line in films[1:])
    benchmark = read_task(tmp_path / "benchmark" / "task.json")
    assert read_task_data(benchmark, tmp_path / "benchmark").counts["in use"] == 3


def run_python_here(monkeypatch):
    """Scripts that an example starts as a process of their own run in this one: it has everything imported."""
    start = subprocess.run

    def run_here(command, **options):
        if command[0] != sys.executable:
            return start(command, **options)
        return subprocess.CompletedProcess(command, runpy.run_path(command[1])["main"](command[2:]))

    monkeypatch.setattr(subprocess, "run", run_here)


def test_lora_trains_an_adapter_and_loads_it_by_its_folder(repository, conceptclip, tmp_path, capsys, monkeypatch):
    run_python_here(monkeypatch)
    words = ("--output", tmp_path / "out", "--num-train", 64, "--num-test", 40, "--steps", 1)
    assert run(repository, "lora.py", "--model", conceptclip, *words) == 0
    printed = capsys.readouterr().out
    assert "as it was: 0." in printed
    assert "with adapter: 0." in printed
