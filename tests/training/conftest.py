"""The tiny training that tests of the loop share, in this process and in others."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

TINY_TRAINING = Path(__file__).parent / "tiny_training.py"


@pytest.fixture(scope="session")
def tiny():
    """The module `tiny_training`: model, data and objective of a few numbers."""
    spec = importlib.util.spec_from_file_location("tiny_training", TINY_TRAINING)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_training"] = module
    spec.loader.exec_module(module)
    return module


class Processes:
    """The processes of one run, started together."""

    def __init__(self, arguments, options, num_processes):
        common = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if num_processes > 1:
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(num_processes)}
        command = [sys.executable, str(TINY_TRAINING), json.dumps(arguments), *options]
        self.processes = []
        for rank in range(num_processes):
            places = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_processes > 1 else {}
            environment = os.environ | common | places
            self.processes.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )

    def wait(self):
        """Exit code and standard error of each process."""
        ended = [(process.communicate(timeout=120), process.returncode) for process in self.processes]
        return [code for _, code in ended], "\n".join(errors for (_, errors), _ in ended)

    def kill(self):
        for process in self.processes:
            process.kill()

    def wait_until(self, condition):
        """Wait until the condition holds; fails if a process ends first."""
        deadline = time.monotonic() + 90
        while not condition():
            ended = any(process.poll() is not None for process in self.processes)
            assert not ended, self.wait()
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def start_tiny():
    """Starts the tiny training in processes of its own: (arguments, *options, num_processes) -> Processes."""
    started = []

    def start(arguments, *options, num_processes=1):
        started.append(Processes(arguments, options, num_processes))
        return started[-1]

    yield start
    for processes in started:
        processes.kill()
