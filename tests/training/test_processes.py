import json

import pytest
import torch
from safetensors.torch import load_file


def test_bf16_keeps_weights_and_moments_in_float32(start_tiny, tmp_path):
    arguments = {"output_dir": str(tmp_path), "max_steps": 3, "batch_size_per_process": 8, "mixed_precision": "bf16"}
    codes, errors = start_tiny(arguments | {"micro_batch_size": 4}).wait()
    assert codes == [0], errors
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert {value.dtype for value in load_file(checkpoint / name).values()} == {torch.float32}


def test_two_processes_in_micro_batches_train_the_weights_that_one_process_trains(start_tiny, tmp_path):
    """The global batches hold the same rows; without dropout, which differs between processes."""
    common = {"max_steps": 9, "learning_rate": 1e-2, "log_every": 1}
    one = start_tiny({"output_dir": str(tmp_path / "one"), "batch_size_per_process": 8} | common, "--no_dropout")
    halves = {"output_dir": str(tmp_path / "two"), "batch_size_per_process": 4, "micro_batch_size": 2}
    two = start_tiny(halves | common, "--no_dropout", num_processes=2)
    for processes in (one, two):
        codes, errors = processes.wait()
        assert not any(codes), errors
    weights = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two")]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-6)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
