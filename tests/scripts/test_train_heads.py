"""Training question answering and report generation by their tiny recipes, from a ConceptCLIP and from an fVLM."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, ConceptCLIPProcessor, FVLMConfig, FVLMModel, FVLMProcessor
from medclip_hf.data.phantoms.questions import write_question_phantoms, write_report_phantoms
from medclip_hf.modeling.conceptclip.report_generation_conceptclip import ConceptCLIPForReportGeneration
from medclip_hf.modeling.conceptclip.visual_question_answering_conceptclip import ConceptCLIPForVisualQuestionAnswering
from medclip_hf.modeling.fvlm.report_generation_fvlm import FVLMForReportGeneration
from medclip_hf.training.tokenizers import train_wordpiece_tokenizer

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
COUNTS = {"train": 6, "validation": 3, "test": 3}
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
QUICK = {
    "training.num_epochs": "null",
    "training.max_steps": 2,
    "training.evaluate_every": 1,
    "training.checkpoint_every": 1,
    "training.batch_size_per_process": 3,
    "training.micro_batch_size": 2,
    "training.progress_bar": "false",
}


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def start(name, recipe, *options, **values):
    flat = QUICK | {key.replace("__", "."): value for key, value in values.items()}
    settings = [part for key, value in flat.items() for part in ("--set", f"{key}={value}")]
    return load_script(name).main(["--config", str(SCRIPTS / "recipes" / recipe), *settings, *options])


def ask(folder, data, output, *options, **values):
    given = {"model__from_pretrained": folder, "data__folder": data, "training__output_dir": output} | values
    return start("train_vqa", "vqa_tiny.yaml", *options, **given)


def report(folder, data, output, *options, **values):
    given = {"model__from_pretrained": folder, "data__folder": data, "training__output_dir": output} | values
    return start("train_report_generation", "report_generation_tiny.yaml", *options, **given)


@pytest.fixture(scope="module")
def conceptclip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conceptclip")
    torch.manual_seed(0)
    tokenizer = train_wordpiece_tokenizer(["Does it show a nodule or a cyst? What kind of image is this?"] * 2, 200)
    config = ConceptCLIPConfig(
        text_config={**SIZES, "vocab_size": 200, "max_position_embeddings": 40},
        vision_config={**SIZES, "image_size": 32, "patch_size": 8, "hidden_act": "gelu"},
    )
    ConceptCLIPModel(config).save_pretrained(folder)
    ConceptCLIPProcessor(SiglipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    write_question_phantoms(folder, COUNTS, size=32)
    (folder / "images" / "test-00001.png").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    write_report_phantoms(folder, COUNTS, size=32)
    (folder / "images" / "test-00001.png").write_bytes(b"broken")
    return folder


def test_questions_are_answered_measured_and_the_run_resumed(conceptclip, questions, tmp_path):
    output = tmp_path / "run"
    assert ask(conceptclip, questions, output) == 0
    model = ConceptCLIPForVisualQuestionAnswering.from_pretrained(output / "final")
    answers = json.loads((output / "answers.json").read_text())
    assert list(model.config.answers) == answers
    assert {"yes", "no"} <= set(answers)
    given = [json.loads(line) for line in (output / "test_answers.jsonl").read_text().splitlines()]
    assert all(entry["given"] in answers for entry in given if not entry["image_path"].endswith("test-00001.png"))
    figures = json.loads((output / "test_figures.json").read_text())
    assert figures["num_questions"]["closed"] == 4
    assert sum(figures["unanswered"].values()) >= 3
    assert figures["num_images_shared"] == 0
    assert ask(conceptclip, questions, output) == 2  # the folder holds a run
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    (again / "checkpoints" / "checkpoint-00000001").symlink_to(output / "checkpoints" / "checkpoint-00000001")
    assert ask(conceptclip, questions, again, "--resume") == 0
    one, two = (load_file(folder / "checkpoints/checkpoint-00000002/model.safetensors") for folder in (output, again))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"data__test_split": "validation"}, "the splits must differ"),
        ({"data__answers": "nowhere.json"}, "no vocabulary of answers"),
        ({"data__train_split": "training"}, "split must be one of"),
        ({"data__min_answer_count": 1000}, "no answer occurs 1000 times"),
        ({"training__best_metric": "beauty"}, "best_metric=beauty is none"),
    ],
)
def test_mistakes_end_with_a_sentence(conceptclip, questions, tmp_path, capsys, values, told):
    assert ask(conceptclip, questions, tmp_path / "run", **values) == 2
    assert told in capsys.readouterr().err


def test_reports_are_written_and_measured_by_a_language_model_from_nothing(conceptclip, studies, tmp_path):
    output = tmp_path / "run"
    assert report(conceptclip, studies, output, generation__labeller_anatomies="[lung]") == 0
    ConceptCLIPForReportGeneration.from_pretrained(output / "final")
    assert ConceptCLIPProcessor.from_pretrained(output / "final").tokenizer.eos_token == "[SEP]"
    lines = [json.loads(line) for line in (output / "test_reports.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["test-00000", "test-00002"]
    figures = json.loads((output / "test_figures.json").read_text())
    assert figures["num_without_report"] == 1
    assert 0 <= figures["text"]["figures"]["bleu_1"]["value"] <= 1
    assert figures["clinical"]["num_reports"] == 2


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    tokenizer = train_wordpiece_tokenizer(["kind of image: there is no nodule. report"] * 2, 120)
    tokenizer.eos_token = tokenizer.sep_token
    tokenizer.save_pretrained(folder)
    sizes = SIZES | {"num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    config = LlamaConfig(**sizes, bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_frozen_language_model_stays_as_it_was(conceptclip, studies, language_model, tmp_path):
    values = {"model__language_model": language_model, "model__language_config": "null"}
    assert report(conceptclip, studies, tmp_path, model__language_training="frozen", **values) == 0
    before, after = load_file(language_model / "model.safetensors"), load_file(tmp_path / "final/model.safetensors")
    assert all(torch.equal(value, after[f"language_model.{name}"]) for name, value in before.items())
    assert not (tmp_path / "merged").exists()


def test_adapters_are_trained_resumed_and_merged(conceptclip, studies, language_model, tmp_path):
    values = {
        "model__language_model": language_model,
        "model__language_config": "null",
        "model__language_training": "lora",
        "training__learning_rate": 0.05,
    }
    output = tmp_path / "run"
    assert report(conceptclip, studies, output, **values) == 0
    assert (output / "final" / "adapter_model.safetensors").is_file()
    merged = ConceptCLIPForReportGeneration.from_pretrained(output / "merged")
    weight = merged.language_model.model.layers[0].self_attn.q_proj.weight
    base = load_file(language_model / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(weight, base)
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    (again / "checkpoints" / "checkpoint-00000001").symlink_to(output / "checkpoints" / "checkpoint-00000001")
    assert report(conceptclip, studies, again, "--resume", **values) == 0
    one, two = (
        load_file(run / "checkpoints/checkpoint-00000002/trained_weights.safetensors") for run in (output, again)
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_reports_of_ct_scans_are_written(tmp_path):
    pytest.importorskip("zarr")
    from medclip_hf.data.ct.engine import EngineSettings, prepare_scans
    from medclip_hf.data.ct.geometry import GeometryContract
    from medclip_hf.data.ct.sources import ct_rate_sources
    from medclip_hf.data.phantoms.torso_files import write_ct_rate
    from medclip_hf.data.phantoms.torsos import TorsoSettings
    from medclip_hf.processing.fvlm import FVLMImageProcessor

    drawn = TorsoSettings(in_plane_size=32, slice_spacing_mm=(12.0, 12.0), max_studies=1, max_reconstructions=1)
    contract = GeometryContract(spacing_mm_dhw=(12.0, 12.0, 12.0))
    for split, name in (("train", "train"), ("valid", "validation")):
        write_ct_rate(tmp_path / "ct_rate", 3, split=split, settings=drawn)
        sources = ct_rate_sources(tmp_path / "ct_rate", name)
        settings = EngineSettings(contract=contract)
        prepare_scans(sources, tmp_path / "prepared", name, settings, show_progress=False)
    vision = SIZES | {"image_size_dhw": (28, 24, 24), "patch_size_dhw": (7, 8, 8)}
    text = SIZES | {"vocab_size": 300}
    heads = {"feature_layers": (0,), "pooling_num_attention_heads": 2}
    FVLMModel(FVLMConfig(vision_config=vision, text_config=text, **heads)).save_pretrained(tmp_path / "fvlm")
    image_processor = FVLMImageProcessor(
        size_dhw=(28, 24, 24), patch_size_dhw=(7, 8, 8), crop_margin_dhw=(1, 2, 2), spacing_mm_dhw=(12.0, 12.0, 12.0)
    )
    tokenizer = train_wordpiece_tokenizer(["Cardiomegaly."] * 2, 100)
    FVLMProcessor(image_processor, tokenizer).save_pretrained(tmp_path / "fvlm")
    values = {"model__kind": "ct", "data__test_split": "validation", "data__validation_split": "null"}
    values |= {"training__best_metric": "null", "training__batch_size_per_process": 2}
    assert report(tmp_path / "fvlm", tmp_path / "prepared", tmp_path / "run", **values) == 0
    FVLMForReportGeneration.from_pretrained(tmp_path / "run" / "final")
    lines = [json.loads(line) for line in (tmp_path / "run" / "test_reports.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert all(line["written"] for line in lines)
    figures = json.loads((tmp_path / "run" / "test_figures.json").read_text())
    assert set(figures["clinical"]["num_positive"]) == {"lung", "heart", "esophagus", "aorta"}
