import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.loop import train

ARGUMENTS = {"max_steps": 40, "batch_size_per_process": 4, "checkpoint_every": 1000, "log_every": 1}


def has_steps(folder):
    metrics = folder / "metrics.jsonl"
    return lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2


def finish(tiny, folder, resume=False):
    """Train here what is left to do; gives back the final weights."""
    arguments = RunArguments(output_dir=str(folder), progress_bar=False, **ARGUMENTS)
    train(tiny.new_model(), tiny.Numbers(), tiny.collate_without_row_5, tiny.Matching(), arguments, resume=resume)
    return load_file(folder / "final" / "model.safetensors")


@pytest.mark.parametrize(("number", "num_workers"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_ends_the_run_after_the_step_and_resuming_is_exact(tiny, start_tiny, tmp_path, number, num_workers):
    folder = tmp_path / "broken"
    arguments = ARGUMENTS | {"output_dir": str(folder), "num_workers": num_workers}
    run = start_tiny(arguments, "--step_seconds", "0.1")
    run.wait_until(has_steps(folder))
    run.send_signal(0, number)
    codes, errors = run.wait()
    assert codes == [128 + number], errors
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "interrupted"
    assert 2 <= record["step"] < 40
    assert (folder / "checkpoints" / f"checkpoint-{record['step']:08d}" / "manifest.json").exists()
    assert not (folder / "final").exists()

    weights, expected = finish(tiny, folder, resume=True), finish(tiny, tmp_path / "whole")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_one_signalled_process_stops_all_of_them_after_the_same_step(start_tiny, tmp_path):
    run = start_tiny(ARGUMENTS | {"output_dir": str(tmp_path)}, "--step_seconds", "0.1", num_processes=2)
    run.wait_until(has_steps(tmp_path))
    run.send_signal(1, signal.SIGTERM)
    codes, errors = run.wait()
    assert codes == [143, 143], errors
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "interrupted"
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert len(list(checkpoint.glob("random_state-*"))) == 2
    assert json.loads((checkpoint / "run_state.json").read_text())["step"] == record["step"]


def test_handlers_are_put_back(tiny, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    finish(tiny, tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
