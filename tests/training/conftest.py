"""The tiny training that tests of the loop share, in this process and in others."""

import importlib.util
import json
import os
import subprocess
import sys
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


@pytest.fixture(scope="session")
def start_tiny():
    """Starts the tiny training in a process of its own: (arguments, *options, num_processes) -> Popen."""

    def start(arguments, *options, num_processes=1):
        command = [sys.executable]
        if num_processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
        command += [str(TINY_TRAINING), json.dumps(arguments), *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start
