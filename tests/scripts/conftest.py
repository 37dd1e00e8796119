"""What the tests of several scripts share."""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


class _TrainedHere:
    """What a demo sees of a training that ran in this process."""

    def __init__(self, script, options):
        self.args = [str(script), *options]
        self.returncode = _load(script).main(options)

    def wait(self):
        return self.returncode

    poll = wait


@contextlib.contextmanager
def _output_of_processes(path):
    """Send what processes started from here print to that file."""
    sys.stdout.flush()
    kept = os.dup(1)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@pytest.fixture(scope="session")
def run_demo(tmp_path_factory):
    """Runs a demo, shortened, in this process: (its name, output, which training it launches) -> exit code, its tables.

    A demo starts every training as a process with a launcher before it, three times the same way and with as many
    imports of PyTorch. Here one training, named by its folder, is launched so; the others are run in this process.
    """

    def run(name, output, launched):
        demo = _load(SCRIPTS / f"{name}.py")
        launch = demo.start_training

        def start_training(script, recipe, overrides, **resources):
            if f"training.output_dir={output / launched}" in overrides:
                return launch(script, recipe, overrides, **resources)
            options = ["--config", str(recipe), *(word for override in overrides for word in ("--set", override))]
            return _TrainedHere(script, options)

        demo.start_training = start_training
        printed = tmp_path_factory.mktemp("printed") / name
        with _output_of_processes(printed):
            code = demo.main(["--quick", "--output", str(output)])
        return code, printed.read_text(encoding="utf-8")

    return run
