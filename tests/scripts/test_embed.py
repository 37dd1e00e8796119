"""scripts/embed.py: pictures and scans to shards, by any number of processes, and mistakes told in one sentence."""

import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, SiglipVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, ConceptCLIPProcessor, FVLMConfig, FVLMModel, FVLMProcessor
from medclip_hf.data.phantoms.torso_files import write_ct_rate
from medclip_hf.data.phantoms.torsos import TorsoSettings
from medclip_hf.evaluation.embedding_store import read_shards
from medclip_hf.evaluation.encoders import load_encoder
from medclip_hf.processing.fvlm import FVLMImageProcessor
from medclip_hf.training.tokenizers import train_wordpiece_tokenizer

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[2] / "scripts" / "embed.py"
    spec = importlib.util.spec_from_file_location("embed", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["embed"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of an untrained ConceptCLIP for pictures of 16 × 16."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = train_wordpiece_tokenizer(["a cyst", "a mass"] * 3, vocab_size=60)
    text = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **TOWER)
    vision = SiglipVisionConfig(image_size=16, patch_size=8, **TOWER)
    config = ConceptCLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    ConceptCLIPModel(config).save_pretrained(folder)
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    ConceptCLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(7):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "7.png").write_bytes(b"no picture")
    return folder


def command(model, pictures, output, *more):
    return ["--model", str(model), "--images", str(pictures), "--output", str(output), "--rows-per-shard", "3", *more]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_processes_that_share_the_work_leave_the_files_of_one(script, model, pictures, tmp_path, monkeypatch, capsys):
    assert script.main(command(model, pictures, tmp_path / "one", "--patches", "--store-dtype", "float32")) == 0
    assert "image not recognised" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("1", "this share is done"), ("0", "pictures kept")):
        monkeypatch.setenv("RANK", rank)
        assert script.main(command(model, pictures, tmp_path / "two", "--patches", "--store-dtype", "float32")) == 0
        assert said in capsys.readouterr().out
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    shards = list(read_shards(tmp_path / "one"))
    expected = load_encoder(model, device="cpu").encode_images(
        [pictures / row_id for shard in shards for row_id in shard.row_ids]
    )
    for name in ("image_embeds", "patch_embeds"):
        found = np.concatenate([shard.arrays[name] for shard in shards])
        np.testing.assert_allclose(found, getattr(expected, name), atol=1e-5)


def test_an_actor_of_ray_leaves_the_files_of_a_process(script, model, pictures, tmp_path):
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    assert script.main(command(model, pictures, tmp_path / "one")) == 0
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    cloudpickle.register_pickle_by_value(script)  # started as a script it is __main__, which travels by value too
    try:
        ray_options = ("--engine", "ray", "--num-actors", "1", "--num-workers", "1")
        assert script.main(command(model, pictures, tmp_path / "ray", *ray_options)) == 0
    finally:
        cloudpickle.unregister_pickle_by_value(script)
        ray.shutdown()
    assert files_of(tmp_path / "one") == files_of(tmp_path / "ray")


def run_in_own_session(script, words):
    os.setsid()
    torch.set_num_threads(1)
    script.main(words)


def test_a_run_killed_at_any_moment_goes_on_to_the_same_files(script, model, pictures, tmp_path):
    for number in range(8, 40):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    each = ("--num-workers", "1", "--batch-size", "2")
    assert script.main(command(model, pictures, tmp_path / "whole", *each)) == 0
    wanted, output = files_of(tmp_path / "whole"), tmp_path / "killed"
    words = command(model, pictures, output, *each)
    for shards in (1, 2, 3, 6, 10):  # killed when so many are there, amid whatever the run then does
        run = multiprocessing.get_context("fork").Process(target=run_in_own_session, args=(script, words))
        run.start()
        while run.is_alive() and (os.getpgid(run.pid) != run.pid or len(list(output.glob("embeddings-*"))) < shards):
            time.sleep(0.001)
        if run.is_alive():
            os.killpg(run.pid, signal.SIGKILL)
        run.join()
        found = files_of(output)
        assert all(found[name] == wanted[name] for name in found if not name.startswith("."))
    assert script.main(words) == 0
    assert files_of(output) == wanted


def test_processes_beyond_the_last_shard_say_that_they_have_nothing_to_do(
    script, model, pictures, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("WORLD_SIZE", "12")  # of 8 pictures in 3 shards
    for rank in range(11, -1, -1):
        monkeypatch.setenv("RANK", str(rank))
        assert script.main(command(model, pictures, tmp_path / "out")) == 0
    assert caplog.text.count("has nothing to do: 3 shards") == 9
    assert (tmp_path / "out" / "manifest.json").exists()
    (aside,) = [json.loads(line) for path in (tmp_path / "out").glob("set_aside/*") for line in path.open()]
    assert (aside["row_id"], aside["reason"]) == ("7.png", "image not recognised")


def test_int8_embeddings_point_nearly_the_same_way_and_are_of_another_model(script, model, pictures, tmp_path):
    assert script.main(command(model, pictures, tmp_path / "full")) == 0
    assert script.main(command(model, pictures, tmp_path / "int8", "--dtype", "int8")) == 0
    full, rounded = (
        np.concatenate([shard.arrays["image_embeds"] for shard in read_shards(tmp_path / name)])
        for name in ("full", "int8")
    )
    assert ((full * rounded).sum(-1) > 0.99).all()
    assert script.main(command(model, pictures, tmp_path / "full", "--dtype", "int8")) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--rows-per-shard", "4"], "rows_per_shard was 3 and is 4"),
        (["--model", "no/such/model/here"], "cannot be used"),
        (["--dtype", "int8", "--device", "cuda"], "int8 runs on the CPU alone"),
        (["--device", "gpu"], "is no device"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(script, model, pictures, tmp_path, capsys, more, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "rows_per_shard" in said:
        assert script.main(command(model, pictures, tmp_path / "out")) == 0
    assert script.main(command(model, pictures, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_ranks_that_make_no_sense_are_refused(script, model, pictures, tmp_path, monkeypatch, capsys):
    for rank, world_size in (("2", "2"), ("one", "2")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world_size)
        assert script.main(command(model, pictures, tmp_path / "out")) == 2
        assert "RANK" in capsys.readouterr().err


def test_prepared_scans_become_one_vector_for_each_anatomy(script, model, tmp_path, capsys):
    pytest.importorskip("zarr")
    from medclip_hf.data.ct.engine import EngineSettings, prepare_scans
    from medclip_hf.data.ct.geometry import GeometryContract
    from medclip_hf.data.ct.sources import ct_rate_sources

    contract = GeometryContract(spacing_mm_dhw=(12.0, 12.0, 12.0))
    drawn = TorsoSettings(in_plane_size=32, slice_spacing_mm=(12.0, 12.0), max_studies=1, max_reconstructions=1)
    write_ct_rate(tmp_path / "ct_rate", 2, split="valid", settings=drawn)
    sources = ct_rate_sources(tmp_path / "ct_rate", "validation")
    prepare_scans(sources, tmp_path / "prepared", "validation", EngineSettings(contract=contract))
    vision = TOWER | {"image_size_dhw": (28, 24, 24), "patch_size_dhw": (7, 8, 8)}
    config = FVLMConfig(
        vision_config=vision, text_config=TOWER | {"vocab_size": 60}, feature_layers=(0,), pooling_num_attention_heads=2
    )
    FVLMModel(config).save_pretrained(tmp_path / "fvlm")
    images = FVLMImageProcessor(size_dhw=(28, 24, 24), patch_size_dhw=(7, 8, 8), spacing_mm_dhw=(12.0, 12.0, 12.0))
    tokenizer = train_wordpiece_tokenizer(["a cyst", "a mass"] * 3, vocab_size=60)
    FVLMProcessor(images, tokenizer).save_pretrained(tmp_path / "fvlm")

    words = ["--prepared", str(tmp_path / "prepared"), "--split", "validation", "--format", "safetensors"]
    assert script.main(["--model", str(tmp_path / "fvlm"), *words, "--output", str(tmp_path / "out")]) == 0
    (shard,) = read_shards(tmp_path / "out")
    assert shard.row_ids == ("valid_1_a_1", "valid_2_a_1")
    assert shard.arrays["anatomy_embeds"].shape == (2, 4, config.projection_dim)
    assert shard.arrays["anatomy_present"].any()
    assert script.main(["--model", str(model), *words, "--output", str(tmp_path / "other")]) == 2
    assert "no fVLM" in capsys.readouterr().err
