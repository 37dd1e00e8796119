"""What a run writes about itself: run.json, metrics.jsonl, and the rows it could not read."""

import json
import math
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from medclip_hf.training.checkpoints import UnwrittenError, write_json

_PACKAGES = ("medclip-hf", "torch", "transformers", "tokenizers", "accelerate", "datasets", "safetensors", "numpy")


class RunRecord:
    """The files of one run in its output folder. Numbers, versions and row ids alone: no text and no image of a row.

    - `run.json`: arguments, versions, git revision, machine, and one entry for each time the run was started;
    - `metrics.jsonl`: one object a line, keyed by "step";
    - `set_aside/rank-00000.jsonl`: one object a line for each row that could not be read, a file a process.

    Args:
        output_dir: of the run.
        accelerator: only the main process writes the first two.
        content: what the caller wants in `run.json` ("recipe", "arguments", ...).
    """

    def __init__(self, output_dir: Path, accelerator: Accelerator, content: Mapping[str, Any]) -> None:
        self.is_main, self.num_processes = accelerator.is_main_process, accelerator.num_processes
        self.run_path = output_dir / "run.json"
        self.metrics_path = output_dir / "metrics.jsonl"
        self.set_aside_path = output_dir / "set_aside" / f"rank-{accelerator.process_index:05d}.jsonl"
        self.content = {
            **content,
            "command": sys.argv,
            "versions": package_versions(),
            "git_revision": git_revision(),
            "machine": describe_machine(accelerator),
        }

    def start(self, step: int, is_resumed: bool = False) -> None:
        """Open the files; what an earlier start logged after `step` is removed, since it will be done again."""
        with _told(self.set_aside_path):
            self.set_aside_path.parent.mkdir(parents=True, exist_ok=True)
            _keep_lines_until(self.set_aside_path, step)
        if self.is_main:
            with _told(self.metrics_path):
                _keep_lines_until(self.metrics_path, step)
                for path in self._of_more_processes():
                    _keep_lines_until(path, step)
            starts = _earlier_starts(self.run_path) if is_resumed else []
            self.content["starts"] = [*starts, {"from_step": step, "started": _now()}]
            self.set_status("running", step)

    def _of_more_processes(self) -> list[Path]:
        """What an earlier start with more processes than now has set aside."""
        files = self.set_aside_path.parent.glob("rank-*.jsonl")
        return sorted(path for path in files if int(path.stem.partition("-")[2]) >= self.num_processes)

    def set_status(self, status: str, step: int) -> None:
        """Note where the run stands: "running", "complete", "interrupted" or "failed"."""
        if self.is_main:
            self.content["starts"][-1] |= {"status": status, "to_step": step, "seen": _now()}
            with _told(self.run_path):
                write_json(self.run_path, {"status": status, "step": step, **self.content})

    def add_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to `metrics.jsonl`."""
        if self.is_main:
            # JSON has no NaN
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            with _told(self.metrics_path):
                _append(self.metrics_path, [{"step": step, **finite}])

    def add_set_aside(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the rows that this process left out of its batch, with the reason of each."""
        if rows:
            with _told(self.set_aside_path):
                _append(self.set_aside_path, [{"step": step, **row} for row in rows])


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def git_revision() -> str | None:
    """The commit of the checkout this package runs from, "+changes" behind it if files differ; None outside of one."""
    here = Path(__file__).resolve().parent
    try:
        # the package may lie inside another project's repository, in its environment for instance
        if _git(here, "ls-files", Path(__file__).name) == "":
            return None
        revision = _git(here, "rev-parse", "HEAD")
        return revision + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe_machine(accelerator: Accelerator) -> dict[str, Any]:
    """What the run computes on; no host name and no user name."""
    on_gpu = accelerator.device.type == "cuda"
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(accelerator.device) if on_gpu else accelerator.device.type,
        "num_processes": accelerator.num_processes,
        "num_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if on_gpu else None,
    }


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()  # noqa: S603


def _earlier_starts(path: Path) -> list[dict[str, Any]]:
    """The entries of the run's earlier starts; none if the record is lost."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["starts"])
    except (OSError, ValueError, KeyError):
        return []


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Has an error of the disk say which file it is about, and what to do."""
    try:
        yield
    except OSError as error:
        raise UnwrittenError(
            f"{path} could not be written: {error}. Checkpoints are untouched: free some space, then start again with "
            "--resume."
        ) from error


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _keep_lines_until(path: Path, step: int) -> None:
    """Rewrite a log without the lines after `step` and without a last line that was cut off."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
