"""When a run stops early, and which of its states is the best: a function of the validations so far."""

import json
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from medclip_hf.training.arguments import RunArguments

BEST_MODELS = "best"


@dataclass(frozen=True)
class Progress:
    """Where the validations stand.

    Args:
        best_step: after which the metric was best; None before the first finite value.
        best_value: the metric then.
        num_without_improvement: validations since.
        should_stop: that they are as many as the run's patience.
    """

    best_step: int | None = None
    best_value: float = math.nan
    num_without_improvement: int = 0
    should_stop: bool = False


def judge(values: Iterable[tuple[int, float]], arguments: RunArguments) -> Progress:
    """What the validations so far say, from (step, metric) in the order of the steps.

    A value counts as better if it exceeds the best by more than `early_stopping_min_improvement`; NaN never does.
    """
    sign = 1.0 if arguments.best_metric_mode == "max" else -1.0
    best_step, best, waited = None, math.nan, 0
    for step, value in values:
        gain = sign * (value - best)
        if math.isfinite(value) and (best_step is None or gain > arguments.early_stopping_min_improvement):
            best_step, best, waited = step, value, 0
        else:
            waited += 1
    patience = arguments.early_stopping_patience
    return Progress(best_step, best, waited, patience is not None and waited >= patience)


def read_validations(metrics_path: Path, metric: str, last_step: int) -> list[tuple[int, float]]:
    """(step, value) of a metric in a run's `metrics.jsonl` up to `last_step`: what a resumed run goes on from."""
    if not metrics_path.is_file():
        return []
    found = []
    for line in metrics_path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the last line, cut off where the run died
            continue
        if entry["step"] <= last_step and f"validation_{metric}" in entry:
            value = entry[f"validation_{metric}"]
            found.append((int(entry["step"]), math.nan if value is None else float(value)))
    return found


def best_model_path(output_dir: Path, step: int) -> Path:
    """Where the model of a validation lies that was the best so far."""
    return output_dir / BEST_MODELS / f"step-{step:08d}"


def remove_others(output_dir: Path, best_step: int | None) -> None:
    """Delete the models that are no longer the best.

    Called when a checkpoint is written: until then a run that crashes goes on from before the newest best, and needs
    the one before it.
    """
    for folder in sorted((output_dir / BEST_MODELS).glob("step-*")):
        if best_step is None or folder != best_model_path(output_dir, best_step):
            shutil.rmtree(folder, ignore_errors=True)


def copy_model(source: Path, target: Path) -> None:
    """Make `target` a copy of the folder `source`, as a whole; files are shared on the disk where that is possible."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=_link_or_copy)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
