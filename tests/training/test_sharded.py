"""Training in shards (FSDP2 over gloo), and its checkpoints, which any number of processes can continue."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from medclip_hf.training.checkpoints import consolidate

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
COMMON = {"max_steps": 8, "learning_rate": 1e-2, "log_every": 1, "checkpoint_every": 4}
GLOBAL_BATCH = 12


def weights_of(folder):
    return load_file(folder / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def run_sharded(start_tiny):
    """Runs the tiny training to its end in shards, without dropout: (folder, num_processes, *options, **arguments)."""

    def run(folder, num_processes, *options, **changes):
        arguments = {"output_dir": str(folder), "batch_size_per_process": GLOBAL_BATCH // num_processes}
        environment = changes.pop("environment", SHARDED)
        processes = start_tiny(
            COMMON | arguments | changes, "--no_dropout", *options, num_processes=num_processes, environment=environment
        )
        codes, texts = processes.wait()
        assert not any(codes), texts
        return texts

    return run


@pytest.fixture(scope="module")
def one_process(run_sharded, tmp_path_factory):
    """The folder of a run by one process that shards nothing and was never stopped."""
    folder = tmp_path_factory.mktemp("one")
    run_sharded(folder, 1, environment={})
    return folder


def assert_like(folder, expected_folder):
    torch.testing.assert_close(weights_of(folder), weights_of(expected_folder), rtol=1e-4, atol=1e-6)
    losses = [
        {line["step"]: line["loss"] for line in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())}
        for path in (folder, expected_folder)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.fixture(scope="module")
def two_processes(run_sharded, tmp_path_factory):
    """The folder of a run in two shards that was never stopped."""
    folder = tmp_path_factory.mktemp("two")
    run_sharded(folder, 2)
    return folder


def as_after_step_4(folder, copy):
    """A copy of the run as it was when its first checkpoint was written."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "final")
    shutil.rmtree(copy / "checkpoints" / "checkpoint-00000008")
    return copy


def test_two_processes_in_shards_train_what_one_process_trains(two_processes, one_process):
    assert_like(two_processes, one_process)
    shards = sorted(path.name for path in (two_processes / "checkpoints/checkpoint-00000008/shards").iterdir())
    assert [name[:11] for name in shards] == ["shard-00001", "shard-00002"]
    assert json.loads((two_processes / "final" / "config.json").read_text())["architectures"] == ["TwoTowers"]


def test_micro_batches_in_shards_give_the_same(run_sharded, one_process, tmp_path):
    """One process has a row less, and so a micro-batch less, where row 5 could not be read."""
    run_sharded(tmp_path, 2, micro_batch_size=1)
    assert_like(tmp_path, one_process)


def test_shards_continued_by_as_many_processes_give_the_same_bits(run_sharded, two_processes, tmp_path):
    folder = as_after_step_4(two_processes, tmp_path / "run")
    run_sharded(folder, 2, "--resume")
    weights, expected = weights_of(folder), weights_of(two_processes)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("num_processes", [1, 3])
def test_another_number_of_processes_continues_shards_with_the_same_rows(
    run_sharded, one_process, two_processes, tmp_path, num_processes
):
    folder = as_after_step_4(two_processes, tmp_path / "run")
    assert "2 processes" in run_sharded(folder, num_processes, "--resume")
    assert_like(folder, one_process)


def test_two_processes_in_shards_continue_what_one_process_wrote_whole(run_sharded, one_process, tmp_path):
    folder = as_after_step_4(one_process, tmp_path / "run")
    run_sharded(folder, 2, "--resume")
    assert_like(folder, one_process)


def test_one_process_without_shards_continues_them(run_sharded, one_process, two_processes, tmp_path):
    folder = as_after_step_4(two_processes, tmp_path / "run")
    run_sharded(folder, 1, "--resume", environment={})
    assert_like(folder, one_process)


def test_shards_become_a_model_that_loads_as_any_other(tiny, two_processes, tmp_path):
    checkpoint = two_processes / "checkpoints" / "checkpoint-00000008"
    assert consolidate(checkpoint, tmp_path / "model", lambda folder: tiny.new_model(seed=5)) == 8
    weights, expected = load_file(tmp_path / "model" / "model.safetensors"), weights_of(two_processes)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_what_is_no_checkpoint_in_shards_is_not_consolidated(tiny, one_process, two_processes, tmp_path):
    def model(folder):
        return tiny.new_model()

    with pytest.raises(ValueError, match="is not in shards: from_pretrained loads it as it is"):
        consolidate(one_process / "checkpoints" / "checkpoint-00000008", tmp_path / "model", model)
    copy = tmp_path / "copy"
    shutil.copytree(two_processes / "checkpoints" / "checkpoint-00000008", copy)
    shard = next((copy / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"cannot be resumed: shards/.* has \d+ bytes instead of"):
        consolidate(copy, tmp_path / "model", model)


def test_shards_of_another_model_are_refused(tiny, two_processes, tmp_path):
    other = tiny.new_model()
    other.extra = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"missing \['extra.bias', 'extra.weight'\]"):
        consolidate(two_processes / "checkpoints" / "checkpoint-00000008", tmp_path / "model", lambda folder: other)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_disk_that_is_full_in_the_background_ends_the_run_and_leaves_the_last_checkpoint(
    run_sharded, start_tiny, one_process, tmp_path, num_processes
):
    """One process finds no space for its shards of the second checkpoint."""
    arguments = COMMON | {"output_dir": str(tmp_path), "batch_size_per_process": GLOBAL_BATCH // num_processes}
    run = start_tiny(
        arguments, "--no_dropout", "--full_disk_from", "8", num_processes=num_processes, environment=SHARDED
    )
    codes, text = run.wait()
    assert all(codes), text
    assert "checkpoint-00000008 could not be written" in text
    assert "No space left on device" in text
    assert "Earlier checkpoints are untouched" in text
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-00000004"]
    run_sharded(tmp_path, num_processes, "--resume")
    assert_like(tmp_path, one_process)
