"""Fixtures that several test files share: where reference values and real data lie, and a process without us."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("MEDCLIP_HF_SHARED", REPOSITORY.parent / "shared"))
SECONDS_OF_A_STRANGER = 300

# Imports what every stranger needs, once, and computes nothing; then each line asks for a program in a fork of its own.
STRANGERS = """
import json, os, sys, traceback

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "medclip_hf":
            raise ModuleNotFoundError("medclip_hf is not installed here", name=name)

sys.meta_path.insert(0, Absent())

import safetensors.torch, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, BertModel, SiglipModel, pipeline

torch.set_num_threads(1)
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        output = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(asked["folder"])
        sys.argv = ["-c", *asked["arguments"]]
        try:
            exec(compile(asked["program"], "<program>", "exec"), {"__name__": "__main__"})
            assert "medclip_hf" not in sys.modules
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def _folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{name} not found under {SHARED}: set MEDCLIP_HF_SHARED to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of the reference values computed with the official code; skips where absent."""
    return _folder("goldens")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the small real data sets (pmc_sample, bccd, ct); skips where absent."""
    return _folder("data")


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """A process that cannot import medclip_hf and starts programs: see `STRANGERS`."""
    folder = tmp_path_factory.mktemp("strangers")
    environment = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", STRANGERS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        cwd=folder,  # from another folder, so that no source tree is found by chance
    ) as process:
        yield process
        process.kill()


@pytest.fixture
def run_without_package(strangers: subprocess.Popen[str], tmp_path: Path) -> Callable[..., str]:
    """Runs a program where medclip_hf cannot be imported, with arguments as sys.argv[1:]; gives what it printed."""

    def run(program: str, *arguments: object) -> str:
        output = tmp_path / "printed"
        asked = {
            "program": program,
            "arguments": [*map(str, arguments)],
            "folder": str(tmp_path),
            "output": str(output),
        }
        assert strangers.stdin is not None
        assert strangers.stdout is not None
        strangers.stdin.write(json.dumps(asked) + "\n")
        strangers.stdin.flush()
        if not select.select([strangers.stdout], [], [], SECONDS_OF_A_STRANGER)[0]:
            strangers.kill()
            pytest.fail(f"no end within {SECONDS_OF_A_STRANGER} s: {output.read_text()}")
        code, printed = strangers.stdout.readline().strip(), output.read_text()
        assert code == "0", printed
        return printed

    return run
