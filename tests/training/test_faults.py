"""Processes that die, hang, fail or do not match: the run ends soon, and its last words name them."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from medclip_hf.training.faults import EXIT_CODE, LostProcessError, Watch, is_collective_error
from medclip_hf.training.processes import join_processes, meet

COMMON = {"max_steps": 8, "batch_size_per_process": 4, "learning_rate": 1e-2, "checkpoint_every": 2, "log_every": 1}
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
SOON_SECONDS = 120  # the start of the processes on a busy machine included; it takes 6 to 9 on an idle one
TINY_TRAINING = Path(__file__).parent / "tiny_training.py"


def end_of(processes):
    """Exit codes, what was written, and after how many seconds the run was over."""
    start = time.monotonic()
    codes, text = processes.wait()
    return codes, text, time.monotonic() - start


def test_a_killed_process_ends_the_others_soon_and_is_named(start_tiny, tmp_path):
    arguments = COMMON | {"output_dir": str(tmp_path)}
    run = start_tiny(arguments, "--fault", "kill", "--beat_seconds", "0.3", num_processes=3)
    codes, text, seconds = end_of(run)
    assert codes[1] == -9
    assert codes[0] not in (0, None)
    assert codes[2] not in (0, None)
    assert "process 1 no longer answers" in text
    assert "computing step 5" in text
    assert seconds < SOON_SECONDS
    assert (tmp_path / "checkpoints" / "checkpoint-00000004" / "manifest.json").exists()
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


def test_a_process_that_hangs_is_named_when_the_others_have_waited_long_enough(start_tiny, tmp_path):
    arguments = COMMON | {"output_dir": str(tmp_path), "timeout_seconds": 3}
    run = start_tiny(arguments, "--fault", "hang", "--beat_seconds", "0.3", num_processes=2)
    codes, text, seconds = end_of(run)
    assert codes[0] not in (0, None), text
    assert codes[1] == EXIT_CODE, text
    assert "process 1 did not come: it has been computing step 5" in text
    assert "in embed (tiny_training.py:" in text
    assert seconds < SOON_SECONDS


def test_a_process_that_fails_tells_the_others_why(start_tiny, tmp_path):
    run = start_tiny(
        COMMON | {"output_dir": str(tmp_path)}, "--fault", "fail", "--beat_seconds", "0.3", num_processes=2
    )
    codes, text = run.wait()
    assert all(codes)
    assert "LostProcessError: process 1 failed while it was computing step 5: RuntimeError: a cosmic ray" in text


def test_torchrun_restarts_the_run_from_its_last_checkpoint_with_the_same_bits(start_tiny, tmp_path):
    """Process 1 is killed at step 5; the launcher starts both again, and they continue after step 4."""
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "1", "--standalone"]
    fault = ["--fault", "kill", "--fault_done", str(tmp_path / "done"), "--beat_seconds", "0.3"]
    arguments = json.dumps(COMMON | {"output_dir": str(broken)})
    done = subprocess.run(
        [sys.executable, *launcher, str(TINY_TRAINING), arguments, "--resume", *fault],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    codes, text = start_tiny(COMMON | {"output_dir": str(whole)}, num_processes=2).wait()
    assert codes == [0, 0], text
    weights, expected = (load_file(folder / "final" / "model.safetensors") for folder in (broken, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    starts = json.loads((broken / "run.json").read_text())["starts"]
    assert [start["from_step"] for start in starts] == [0, 4]


def test_eight_processes_train_what_one_process_trains(start_tiny, tmp_path):
    common = {"max_steps": 6, "learning_rate": 1e-2, "log_every": 1}
    one = {"output_dir": str(tmp_path / "one"), "batch_size_per_process": 24}
    eight = {"output_dir": str(tmp_path / "eight"), "batch_size_per_process": 3}
    for arguments, num_processes in ((one, 1), (eight, 8)):
        codes, text = start_tiny(common | arguments, "--no_dropout", num_processes=num_processes).wait()
        assert not any(codes), text
    weights = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "eight")]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-6)


def test_a_batch_with_a_nan_names_the_row_of_whichever_process_read_it(start_tiny, tmp_path):
    """The main process's log is the one that is read."""
    arguments = COMMON | {"output_dir": str(tmp_path), "batch_size_per_process": 12, "max_steps": 1}
    run = start_tiny(arguments, "--with_nan", num_processes=2)
    codes, _ = run.wait()
    assert all(codes)
    for output in run.outputs:
        assert "Inputs with NaN or infinity: ['row-13']" in output.read_text()


def test_ranks_killed_at_random_moments_leave_a_run_that_continues_with_the_same_bits(start_tiny, tmp_path):
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    moments = random.Random(1)
    for kill in range(2):
        run = start_tiny(
            COMMON | {"output_dir": str(broken)},
            "--resume",
            "--step_seconds",
            "0.2",
            "--beat_seconds",
            "0.2",
            num_processes=2,
            environment=SHARDED,
        )
        run.wait_until(lambda kill=kill: num_starts(broken) > kill)
        time.sleep(moments.uniform(0.1, 1.0))
        run.send_signal(moments.randrange(2), signal.SIGKILL)
        assert all(run.wait()[0])
    for folder in (broken, whole):
        codes, text = start_tiny(
            COMMON | {"output_dir": str(folder)}, "--resume", num_processes=2, environment=SHARDED
        ).wait()
        assert codes == [0, 0], text
    weights, expected = (load_file(folder / "final" / "model.safetensors") for folder in (broken, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def num_starts(folder):
    path = folder / "run.json"
    return len(json.loads(path.read_text())["starts"]) if path.exists() else 0


def test_more_processes_than_rows_are_refused(start_tiny, tmp_path):
    arguments = COMMON | {"output_dir": str(tmp_path), "batch_size_per_process": 20}
    codes, text = start_tiny(arguments, num_processes=2).wait()
    assert all(codes)
    assert "24 rows, but one global batch takes 40 (20 × 2 processes)" in text


def test_a_global_batch_that_another_number_of_processes_cannot_share_is_refused(start_tiny, tmp_path):
    arguments = COMMON | {"output_dir": str(tmp_path), "max_steps": 2}
    codes, text = start_tiny(arguments, num_processes=2).wait()
    assert codes == [0, 0], text
    codes, text = start_tiny(arguments | {"batch_size_per_process": 3}, "--resume", num_processes=3).wait()
    assert all(codes)
    assert "was written by 2 processes and cannot be continued by 3" in text
    assert "Launch a number of processes that divides 8" in text


def test_a_mixed_fleet_is_refused_before_anything_waits():
    store, errors = dist.HashStore(), {}

    def arrive(rank, device):
        try:
            meet(store, rank, 3, device, timeout_seconds=20)
        except ValueError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=arrive, args=(r, d)) for r, d in enumerate(["a GPU", "a CPU", "a GPU"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(errors) == {0, 1, 2}
    assert "process 1 computes on a CPU; process 0, 2 computes on a GPU" in errors[0]


def test_processes_that_do_not_arrive_are_named():
    with pytest.raises(ValueError, match=r"2 of 3 processes did not arrive within 0\.2 s: process 0, 2"):
        meet(dist.HashStore(), 1, 3, "a CPU", timeout_seconds=0.2)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE=2 announces several processes, but LOCAL_RANK, MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "5", "LOCAL_RANK": "0"}, "RANK=5 is no place among WORLD_SIZE=2 processes"),
        ({"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0"}, "RANK=0 is no place among WORLD_SIZE=two processes"),
    ],
)
def test_half_a_place_among_the_processes_is_refused_at_once(monkeypatch, places, message):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"} if "LOCAL_RANK" in places else {}
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (places | address).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        join_processes(use_cpu=True, timeout_seconds=1)


def test_an_error_of_a_process_itself_is_no_one_elses_fault():
    with Watch(dist.HashStore(), 0, 1, beat_seconds=0.05) as watch:
        assert watch.explain(torch.OutOfMemoryError("CUDA out of memory")) is None
        assert watch.explain(RuntimeError("the size of tensor a must match")) is None
    assert is_collective_error(RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]"))


def test_the_first_verdict_counts():
    store = dist.HashStore()
    first, second = (Watch(store, rank, 2, beat_seconds=0.05) for rank in (0, 1))
    with first, second:
        first.report(OSError("no space left"))
        second.report(ValueError("a consequence"))
        lost = second.explain(RuntimeError("Connection closed by peer"))
    assert isinstance(lost, LostProcessError)
    assert "process 0 failed while it was starting: OSError: no space left" in str(lost)


def test_processes_that_were_given_different_things_refuse_to_train(start_tiny, tmp_path):
    environment = {"MEDCLIP_TEST_FEWER_ROWS": "1"}  # to process 1
    run = start_tiny(COMMON | {"output_dir": str(tmp_path)}, num_processes=2, environment=environment)
    codes, text = run.wait()
    assert all(codes)
    assert "process 0 and process 1 were given different things: rows of the training split was 24, is 23" in text
    assert not (tmp_path / "run.json").exists()


def test_a_process_that_ended_before_the_training_is_named():
    with Watch(dist.HashStore(), 0, 2, beat_seconds=0.05) as watch:
        lost = watch.explain(RuntimeError("Connection closed by peer"))
    assert "process 1 ended before the training began: its own output says why." in str(lost)


def test_the_last_words_of_the_process_that_kept_the_store_are_remembered():
    store = dist.HashStore()
    first, second = (Watch(store, rank, 2, beat_seconds=0.05) for rank in (0, 1))
    with first, second:
        first.report(OSError("no space left"))
        assert "OSError: no space left" in second._store_is_gone()
