"""What the demonstrations share: a folder of their own, and trainings started as a user starts them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MARKER = ".medclip_hf_demo"


def claim_folder(folder: Path) -> None:
    """Make the folder ready: new, or emptied if an earlier demo made it.

    Raises:
        ValueError: it holds something that no demo made.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder for the demo.")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise ValueError(f"{folder} is not empty and not of an earlier demo: name another folder.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def start_training(
    script: Path, recipe: Path, overrides: Sequence[str], *, num_processes: int = 1, num_threads: int = 1
) -> subprocess.Popen[bytes]:
    """A running `accelerate launch` of a training script on CPUs.

    Args:
        script: of the training; the launch files lie in `launch` beside it.
        recipe: of the run.
        overrides: "section.key=value" each.
        num_processes: of the training.
        num_threads: of each process.
    """
    launch_file = "cpu_processes.yaml" if num_processes > 1 else "one_cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(script.parent / "launch" / launch_file)]
    command += ["--num_processes", str(num_processes), "--num_cpu_threads_per_process", str(num_threads)]
    command += [str(script), "--config", str(recipe)]
    command += [word for override in overrides for word in ("--set", override)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(num_threads)})  # noqa: S603 (our own)


def wait_for(*trainings: subprocess.Popen[bytes]) -> None:
    """Wait until all have ended; if one fails or this process is stopped, end the others too.

    Raises:
        subprocess.CalledProcessError: the first that failed.
    """
    try:
        for training in trainings:
            if training.wait():
                raise subprocess.CalledProcessError(training.returncode, list(training.args))  # type: ignore[arg-type]
    finally:
        for training in trainings:
            if training.poll() is None:
                training.terminate()
                training.wait()
