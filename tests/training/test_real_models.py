"""Both models, tiny but real, in shards: what one process trains, whatever cuts the model and who continues it."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from medclip_hf.training import zero
from medclip_hf.training.checkpoints import consolidate

REAL_TRAINING = Path(__file__).parent / "real_training.py"
GLOBAL_BATCH = 6
COMMON = {"max_steps": 2, "learning_rate": 1e-2, "adam_epsilon": 1e-2, "log_every": 1, "checkpoint_every": 1}
WHOLE = {}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def deepspeed(stage):
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}


@pytest.fixture(scope="module")
def run(start_tiny):
    """Trains one of the models: (folder, kind, num_processes, environment, *options, **arguments)."""

    def run(folder, kind, num_processes, environment, *options, **changes):
        arguments = {"output_dir": str(folder), "batch_size_per_process": GLOBAL_BATCH // num_processes}
        processes = start_tiny(
            COMMON | arguments | changes,
            kind,
            *options,
            num_processes=num_processes,
            environment=environment | {"DS_ACCELERATOR": "cpu"},
            script=REAL_TRAINING,
        )
        codes, texts = processes.wait()
        assert not any(codes), texts
        return folder

    return run


@pytest.fixture(scope="module")
def one_process(run, tmp_path_factory):
    """Folder by kind of model: trained by one process, in one pass, the texts of fVLM in groups by length."""
    folders = {}

    def folder_of(kind):
        if kind not in folders:
            folders[kind] = run(tmp_path_factory.mktemp(kind), kind, 1, WHOLE, checkpoint_every=None)
        return folders[kind]

    return folder_of


@pytest.fixture(scope="module")
def two_shards(run, tmp_path_factory):
    """Folder by kind of model: trained by two processes in shards, in micro-batches of two rows and one."""
    folders = {}

    def folder_of(kind):
        if kind not in folders:
            folders[kind] = run(tmp_path_factory.mktemp(kind), kind, 2, FSDP, micro_batch_size=2)
        return folders[kind]

    return folder_of


def weights_of(folder):
    return load_file(folder / "final" / "model.safetensors")


def assert_like(folder, expected_folder):
    torch.testing.assert_close(weights_of(folder), weights_of(expected_folder), rtol=1e-4, atol=1e-6)
    losses = [
        [line["loss"] for line in map(json.loads, (path / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
        for path in (folder, expected_folder)
    ]
    assert losses[0][-1] == pytest.approx(losses[1][-1], rel=1e-5)


def as_after_step_1(folder):
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-00000002")


def a_model(kind):
    spec = importlib.util.spec_from_file_location("real_training", REAL_TRAINING)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.new_model(kind)


@pytest.mark.parametrize("kind", ["conceptclip", "conceptclip-1", "fvlm-teacher"])
def test_two_shards_in_micro_batches_train_what_one_process_trains_in_one_pass(two_shards, one_process, kind):
    assert_like(two_shards(kind), one_process(kind))


def test_processes_may_call_a_model_in_shards_unequally_often_where_it_is_gathered(run, one_process, tmp_path):
    """Scans and their windows differ in number; the training goes on as without a validation."""
    run(tmp_path, "fvlm", 2, FSDP, "--validate", evaluate_every=1)
    assert_like(tmp_path, one_process("fvlm"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["validation_spread"] for line in lines if "validation_spread" in line] == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["conceptclip", "fvlm-teacher"])
def test_what_two_shards_saved_three_continue_and_from_pretrained_loads(run, two_shards, one_process, tmp_path, kind):
    folder = shutil.copytree(two_shards(kind), tmp_path / "run")
    consolidate(folder / "checkpoints" / "checkpoint-00000002", tmp_path / "model", lambda folder: a_model(kind))
    loaded, expected = AutoModel.from_pretrained(tmp_path / "model").state_dict(), weights_of(folder)
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    as_after_step_1(folder)
    assert_like(run(folder, kind, 3, FSDP, "--resume"), one_process(kind))


@pytest.mark.parametrize(("kind", "stage"), [("conceptclip", 3), ("fvlm-teacher", 3), ("fvlm", 2)])
def test_deepspeed_trains_and_continues_what_one_process_trains(run, one_process, tmp_path, kind, stage):
    """Its checkpoints are whole: `from_pretrained` loads them, and any number of processes continues them."""
    pytest.importorskip("deepspeed")
    run(tmp_path, kind, 2, deepspeed(stage), micro_batch_size=2)
    assert_like(tmp_path, one_process(kind))
    expected = weights_of(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path / "checkpoints" / "checkpoint-00000002").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    as_after_step_1(tmp_path)
    run(tmp_path, kind, 2, deepspeed(stage), "--resume", micro_batch_size=2)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(tmp_path).items())
    as_after_step_1(tmp_path)
    assert_like(run(tmp_path, kind, 3, deepspeed(stage), "--resume"), one_process(kind))


@pytest.mark.parametrize(
    ("asked_for", "told"),
    [
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"}, "a DeepSpeed configuration file is not read"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero_stage 1, 2 or 3"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "offloading to none or cpu"),
    ],
)
def test_what_is_not_supported_of_deepspeed_is_refused(monkeypatch, asked_for, told):
    for name, value in (deepspeed(2) | asked_for).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=told):
        zero.launched_plan()


def test_a_launch_with_deepspeed_where_it_is_not_installed_says_what_to_install(monkeypatch):
    for name, value in deepspeed(2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'medclip-hf\[deepspeed\]'"):
        zero.launched_plan()
