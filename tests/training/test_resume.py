import json
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.loop import train

LONG = {"max_steps": 30, "batch_size_per_process": 4, "learning_rate": 1e-2, "checkpoint_every": 4, "log_every": 1}


def weights_of(folder):
    return load_file(folder / "final" / "model.safetensors")


def assert_same_run(folder, expected_folder):
    """The same weights, metrics but for times, and rows set aside."""
    weights, expected = weights_of(folder), weights_of(expected_folder)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for name in ("metrics.jsonl", "set_aside/rank-00000.jsonl"):
        lines = [
            [json.loads(line) for line in (path / name).read_text().splitlines()] for path in (folder, expected_folder)
        ]
        for line in lines[0] + lines[1]:
            for timing in ("samples_per_second", "loader_wait_share"):
                line.pop(timing, None)
        assert lines[0] == lines[1]


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    arguments = RunArguments(output_dir=str(folder), progress_bar=False, **LONG)
    train(tiny.new_model(), tiny.Numbers(), tiny.collate_without_row_5, tiny.Matching(), arguments)
    return folder


def test_a_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path, uninterrupted):
    """Stopped by an exception in the middle of an epoch, 2 steps after a checkpoint."""

    class Failing(tiny.Matching):
        def compare(self, embeddings, batch):
            Failing.count += 1
            if Failing.count == 11:
                raise OSError("the node is gone")
            return super().compare(embeddings, batch)

    Failing.count = 0
    arguments = RunArguments(output_dir=str(tmp_path), progress_bar=False, **LONG)
    with pytest.raises(OSError, match="the node is gone"):
        train(tiny.new_model(), tiny.Numbers(), tiny.collate_without_row_5, Failing(), arguments)
    dataset = tiny.Numbers()
    train(tiny.new_model(1), dataset, tiny.collate_without_row_5, tiny.Matching(), arguments, resume=True)
    assert_same_run(tmp_path, uninterrupted)
    assert len(dataset.read) == (30 - 8) * 4, "rows before the checkpoint must not be read again"
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [(start["status"], start["from_step"]) for start in starts] == [("failed", 0), ("complete", 8)]


def test_a_run_killed_at_random_moments_equals_an_uninterrupted_one(start_tiny, tmp_path, uninterrupted):
    """SIGKILL wherever it falls: between steps, within one, while a checkpoint is written."""
    moments = random.Random(0)
    for start in range(3):
        run = start_tiny({"output_dir": str(tmp_path)} | LONG, "--resume", "--step_seconds", "0.1")
        run.wait_until(lambda start=start: num_starts(tmp_path) > start)
        time.sleep(moments.uniform(0.1, 0.8))
        run.kill()
        assert run.wait()[0] == [-signal.SIGKILL]
    codes, errors = start_tiny({"output_dir": str(tmp_path)} | LONG, "--resume").wait()
    assert codes == [0], errors
    assert_same_run(tmp_path, uninterrupted)


def test_two_processes_killed_and_resumed_equal_two_uninterrupted(start_tiny, tmp_path):
    arguments = {"max_steps": 12, "batch_size_per_process": 4, "checkpoint_every": 3, "log_every": 1}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    killed = start_tiny({"output_dir": str(broken)} | arguments, "--step_seconds", "0.3", num_processes=2)
    killed.wait_until((broken / "checkpoints" / "checkpoint-00000003").exists)
    killed.kill()
    assert killed.wait()[0] == [-signal.SIGKILL] * 2
    for folder in (broken, whole):
        codes, errors = start_tiny({"output_dir": str(folder)} | arguments, "--resume", num_processes=2).wait()
        assert codes == [0, 0], errors
    assert_same_run(broken, whole)


def num_starts(folder):
    """How often the run was started and got as far as its record."""
    path = folder / "run.json"
    return len(json.loads(path.read_text())["starts"]) if path.exists() else 0


def resume(tiny, folder, dataset=None, resume_from=True, **changes):
    values = {"max_steps": 4, "batch_size_per_process": 4, "checkpoint_every": 2, "progress_bar": False}
    arguments = RunArguments(output_dir=str(folder), **values | changes)
    return train(
        tiny.new_model(), dataset or tiny.Numbers(), tiny.collate, tiny.Matching(), arguments, resume=resume_from
    )


def test_resuming_what_never_began_begins(tiny, tmp_path, caplog):
    assert resume(tiny, tmp_path).step == 4
    assert "no complete checkpoint" in caplog.text


def test_resuming_a_complete_run_changes_nothing(tiny, tmp_path):
    resume(tiny, tmp_path)
    before = weights_of(tmp_path)
    dataset = tiny.Numbers()
    assert resume(tiny, tmp_path, dataset).status == "complete"
    assert dataset.read == []
    assert all(torch.equal(value, before[name]) for name, value in weights_of(tmp_path).items())


def test_an_older_checkpoint_can_be_named(tiny, tmp_path):
    resume(tiny, tmp_path)
    dataset = tiny.Numbers()
    resume(tiny, tmp_path, dataset, resume_from=tmp_path / "checkpoints" / "checkpoint-00000002")
    assert len(dataset.read) == 8


def test_other_arguments_cannot_be_resumed(tiny, tmp_path):
    resume(tiny, tmp_path)
    with pytest.raises(ValueError, match=r"other arguments: learning_rate was 0.0005, is 0.1"):
        resume(tiny, tmp_path, learning_rate=0.1)


def test_another_recipe_cannot_be_resumed_but_data_may_move(tiny, tmp_path):
    def run(loss_weight, folder, **validation):
        arguments = RunArguments(output_dir=str(tmp_path), max_steps=2, batch_size_per_process=4, progress_bar=False)
        recipe = {"loss": {"weight": loss_weight}, "data": {"folder": folder, "crop": (0.5, 1.0)}, **validation}
        return train(
            tiny.new_model(), tiny.Numbers(), tiny.collate, tiny.Matching(), arguments, resume=True, recipe=recipe
        )

    run(0.5, "here")
    assert run(0.5, "there", validation={"max_scans": 3}).status == "complete"
    with pytest.raises(ValueError, match=r"written with another recipe: loss\.weight was 0\.5, is 0\.7\. Set"):
        run(0.7, "here")


def test_arguments_that_change_no_number_may_differ(tiny, tmp_path):
    resume(tiny, tmp_path)
    assert resume(tiny, tmp_path, log_every=1, keep_checkpoints=7, num_workers=1).status == "complete"


def test_other_rows_cannot_be_resumed(tiny, tmp_path):
    resume(tiny, tmp_path)
    with pytest.raises(ValueError, match="trained on 24 rows, but the training split now has 25"):
        resume(tiny, tmp_path, tiny.Numbers(25))


def test_another_number_of_processes_cannot_resume(tiny, tmp_path):
    resume(tiny, tmp_path)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-00000004"
    state, manifest = checkpoint / "run_state.json", checkpoint / "manifest.json"
    state.write_text(state.read_text().replace('"num_processes": 1', '"num_processes": 2'))
    manifest.write_text(json.dumps({"files": json.loads(manifest.read_text())["files"]}))  # as before it had checksums
    with pytest.raises(ValueError, match="was written by 2 processes and cannot be continued by 1"):
        resume(tiny, tmp_path)


def test_an_objective_with_a_memory_continues_with_it(tiny, tmp_path):
    class Averaging(tiny.Matching):
        """Keeps a running mean of the logit scale."""

        def __init__(self):
            self.mean = torch.zeros(1)
            self.steps = 0

        def after_step(self, model):
            self.steps += 1
            self.mean = 0.5 * self.mean + 0.5 * model.logit_scale.detach()

        def state_dict(self):
            return {"mean": self.mean}

        def load_state_dict(self, state):
            self.mean = state["mean"]

    def run(folder, resume_from=False):
        objective = Averaging()
        values = {"max_steps": 4, "batch_size_per_process": 4, "checkpoint_every": 2, "progress_bar": False}
        arguments = RunArguments(output_dir=str(folder), **values)
        train(tiny.new_model(), tiny.Numbers(), tiny.collate, objective, arguments, resume=resume_from)
        return objective

    whole = run(tmp_path)
    resumed = run(tmp_path, resume_from=tmp_path / "checkpoints" / "checkpoint-00000002")
    assert (whole.steps, resumed.steps) == (4, 2)
    assert torch.equal(whole.mean, resumed.mean)
