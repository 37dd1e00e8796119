"""The tiny training that tests of the loop share, in this process and in others."""

import importlib.util
import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import pytest

TINY_TRAINING = Path(__file__).parent / "tiny_training.py"

# Run in the new process: output to a file, the script's command line, the places of its rank, then the script.
START = """
import os, runpy, sys
import torch
output = os.open(output_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(output, 1)
os.dup2(output, 2)
os.environ.update(environment)
sys.argv = command
torch.set_num_threads(1)
runpy.run_path(command[0], run_name="__main__")
"""


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

    def __init__(self, context, folder, script, arguments, options, num_processes, environment):
        common = {"CUDA_VISIBLE_DEVICES": ""} | environment
        if num_processes > 1:
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(num_processes)}
        self.outputs = [folder / f"output-{rank}.txt" for rank in range(num_processes)]
        self.processes = []
        for rank, output in enumerate(self.outputs):
            names = {
                "output_path": str(output),
                "environment": common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_processes > 1 else {}),
                "command": [str(script), json.dumps(arguments), *options],
            }
            self.processes.append(context.Process(target=exec, args=(START, names)))
            self.processes[-1].start()

    def wait(self):
        """Exit code of each process, and what all of them wrote."""
        for process in self.processes:
            process.join(120)
        texts = [output.read_text() if output.exists() else "" for output in self.outputs]
        return [process.exitcode for process in self.processes], "\n".join(texts)

    def kill(self):
        for process in self.processes:
            process.kill()

    def send_signal(self, rank, number):
        os.kill(self.processes[rank].pid, number)

    def wait_until(self, condition):
        """Wait until the condition holds; fails if a process ends first."""
        deadline = time.monotonic() + 90
        while not condition():
            ended = any(process.exitcode is not None for process in self.processes)
            assert not ended, self.wait()
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def start_tiny(tmp_path_factory):
    """Starts a training in processes of its own: (arguments, *options, num_processes, ...) -> Processes.

    They are forked from a server that has imported everything and computed nothing: a start takes no 8 CPU seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["medclip_hf.training.loop", "transformers.modeling_utils"])
    started = []

    def start(arguments, *options, num_processes=1, environment=None, script=TINY_TRAINING):
        folder = tmp_path_factory.mktemp("processes")
        started.append(Processes(context, folder, script, arguments, options, num_processes, environment or {}))
        return started[-1]

    yield start
    for processes in started:
        processes.kill()
