"""What must be the same on all processes of a run, and for a checkpoint to be continued."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.checkpoints import RunState
from medclip_hf.training.processes import in_words

# Of the arguments, what may differ between a run and its continuation: it does not change what is computed.
_FREE_ARGUMENTS = {
    "output_dir",
    "num_workers",
    "log_every",
    "evaluate_every",
    "best_metric",
    "best_metric_mode",
    "early_stopping_patience",
    "early_stopping_min_improvement",
    "checkpoint_every",
    "keep_checkpoints",
    "trackers",
    "progress_bar",
    "num_processes",
    "on_nonfinite_loss",
    "timeout_seconds",
}
# Of the recipe's other sections: places, which may have moved, and what belongs to validating alone.
_FREE_SECTIONS = {"training", "validation", "generation"}  # the first is compared as arguments
_FREE_KEYS = {"folder", "from_pretrained", "vision_weights", "vision_tower", "text_tower", "tokenizer", "peer_model"}
_FREE_KEYS |= {"language_model", "adapter_base_name", "answers", "validation_split", "test_split", "prompts"}


def check_rows(num_rows: int, num_processes: int) -> None:
    """Raise a ValueError where there is not a row for every process."""
    if num_rows == 0:
        raise ValueError("the training split has no rows. Look at data.folder and data.train_split.")
    if num_rows < num_processes:
        raise ValueError(
            f"the training split has {num_rows} rows, which {num_processes} processes cannot share. "
            "Start fewer processes."
        )


def check_processes_agree(
    num_rows: int, arguments: RunArguments, recipe: Mapping[str, Any], accelerator: Accelerator
) -> None:
    """Raise a ValueError on all processes where they would train different things; a collective call."""
    mine = {"rows of the training split": num_rows} | _of_arguments(asdict(arguments)) | _of_recipe(recipe)
    first, *others = gather_object([mine])
    for process, other in enumerate(others, start=1):
        if other != first:
            raise ValueError(
                f"process 0 and {in_words([process])} were given different things: {_differences(first, other)}. Start "
                "all of them with the same recipe, on the same data."
            )


def check_continues(
    checkpoint: Path, state: RunState, num_rows: int, arguments: RunArguments, recipe: Mapping[str, Any], world: int
) -> None:
    """Raise a ValueError where continuing would not give what the uninterrupted run gives.

    Args:
        checkpoint: its folder, for the message.
        state: of the run that wrote it.
        num_rows: of the training split now.
        arguments: of the run now.
        recipe: of the run now; one that a checkpoint without a recipe is not compared with.
        world: processes now.
    """
    if state.num_rows != num_rows:
        raise ValueError(
            f"{checkpoint} was trained on {state.num_rows} rows, but the training split now has "
            f"{num_rows}. Start a new run from the checkpoint's weights."
        )
    free = set()
    if state.num_processes != world:
        _check_global_batch(checkpoint, state, world, arguments)
        free = {"batch_size_per_process", "micro_batch_size"}
    before, now = _of_arguments(state.arguments, free), _of_arguments(asdict(arguments), free)
    if {name: now.get(name) for name in before} != before:  # an argument that is new since then has its default
        raise ValueError(_refusal(checkpoint, "other arguments", _differences(before, now, before)))
    if state.recipe and _of_recipe(state.recipe) != _of_recipe(recipe):
        told = _differences(_of_recipe(state.recipe), _of_recipe(recipe))
        raise ValueError(_refusal(checkpoint, "another recipe", told))


def _refusal(checkpoint: Path, what: str, told: str) -> str:
    return (
        f"{checkpoint} was written with {what}: {told}. Set them back to resume, or start a new run from the "
        "checkpoint's weights."
    )


def _check_global_batch(checkpoint: Path, state: RunState, num_processes: int, arguments: RunArguments) -> None:
    """Raise a ValueError where another number of processes would see other rows at each step."""
    before = state.arguments["batch_size_per_process"] * state.num_processes
    if arguments.batch_size_per_process * num_processes == before:
        return
    cure = (
        f"Set training.batch_size_per_process={before // num_processes}"
        if before % num_processes == 0
        else f"Launch a number of processes that divides {before}"
    )
    raise ValueError(
        f"{checkpoint} was written by {state.num_processes} processes and cannot be continued by {num_processes} with "
        f"{arguments.batch_size_per_process} rows each: its global batch is {before} rows. {cure}, or start a new run "
        "from the checkpoint's weights."
    )


def _of_arguments(arguments: Mapping[str, Any], free: set[str] | None = None) -> dict[str, Any]:
    """The arguments that count, as JSON gives them back."""
    free = _FREE_ARGUMENTS | (free or set())
    return {name: _plain(value) for name, value in arguments.items() if name not in free}


def _of_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's values that count, by "section.key" and deeper, as JSON gives them back."""
    sections = (name for name in recipe if name not in _FREE_SECTIONS)
    values = {f"{name}.{key}": value for name in sections for key, value in recipe[name].items()}
    return _leaves({name: _plain(value) for name, value in values.items() if name.split(".")[-1] not in _FREE_KEYS})


def _leaves(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        is_nested = isinstance(value, dict) and value
        leaves |= _leaves({f"{name}.{key}": one for key, one in value.items()}) if is_nested else {name: value}
    return leaves


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], names: Any = None) -> str:
    """What differs, in words."""
    missing = "not set"
    pairs = ((name, before.get(name, missing), now.get(name, missing)) for name in (names or {**before, **now}))
    return "; ".join(f"{name} was {old}, is {new}" for name, old, new in pairs if old != new)
