"""The arguments of one training run, and how they are read from a recipe (YAML) with overrides."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

Section = TypeVar("Section")


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """What changes one run and not the shape of a tensor: section `training` of a recipe.

    Exactly one of `max_steps` and `num_epochs` is given. The global batch is `batch_size_per_process` × processes; an
    epoch has as many steps as whole global batches fit into the rows, and which rows are left over changes by epoch.

    Args:
        output_dir: folder of the run: checkpoints, final model, logs. All processes must see the same folder.
        seed: of the data order, of dropout, of everything that is drawn.
        max_steps: optimiser steps of the run.
        num_epochs: passes over the rows.
        batch_size_per_process: rows each process contributes to the global batch of the contrastive loss.
        micro_batch_size: rows held on the device at a time; the gradient stays that of the whole batch (embeddings are
            computed twice). None: the whole batch at once.
        num_processes: how many processes the recipe is made for; a run with another number is refused. None: any.
        learning_rate: the peak.
        min_learning_rate: where the cosine ends.
        warmup_steps: linear from `warmup_start_learning_rate` to the peak.
        lr_schedule: "cosine" falls at every step, "cosine_per_epoch" once an epoch, "constant" not at all.
        weight_decay: of AdamW, decoupled.
        decay_norms_and_biases: also decay biases, norms, logit scales and every other vector; off is the usual rule.
        layer_decay: factor on the learning rate from each block of a tower to the one below it, for fine-tuning (Clark
            et al., "ELECTRA", 2020); what lies above the blocks learns at the full rate. 1: the same everywhere.
        max_grad_norm: gradients are clipped to this norm; None: never.
        mixed_precision: "bf16" runs the model and the search for the best patch under autocast; weights, optimiser and
            loss stay float32.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        keep_activations: with `gradient_checkpointing`, the share of each tower's blocks that recompute nothing: memory
            and time go from those of full checkpointing (0) to those of none (1).
        compile_blocks: compile each transformer block by itself with torch.compile; the first step then takes longer.
        allow_tf32: TensorFloat-32 in float32 matrix products on GPUs that have it.
        deterministic: deterministic kernels, so that resuming on a GPU is exact too; slower. CPUs are exact anyway.
        find_unused_parameters: for models of which a step may leave out a part.
        num_workers: processes that read data, for each training process.
        on_nonfinite_loss: "stop" with an error that names step and rows, or "skip" the step and count it.
        log_every: steps between two lines of metrics.jsonl and two points of the trackers.
        evaluate_every: steps between validations; None: only where the caller does it.
        best_metric: of the validation, by the name that `evaluate_fn` gives it; the final model is then the one of the
            validation where it was best. None: the final model is that of the last step.
        best_metric_mode: whether more or less of it is better.
        early_stopping_patience: end the run after so many validations without a better `best_metric`; None: never.
        early_stopping_min_improvement: by how much a better value must exceed the best so far.
        timeout_seconds: how long a process waits for the others before the run ends and names those that did not come.
        checkpoint_every: steps between checkpoints; None: only when interrupted.
        keep_checkpoints: how many of the newest stay on disk.
        trackers: of Accelerate, by name: "tensorboard", "trackio".
        progress_bar: show one on the main process.
    """

    output_dir: str
    seed: int = 0
    max_steps: int | None = None
    num_epochs: int | None = None
    batch_size_per_process: int = 32
    micro_batch_size: int | None = None
    num_processes: int | None = None

    learning_rate: float = 5e-4
    min_learning_rate: float = 0.0
    warmup_steps: int = 0
    warmup_start_learning_rate: float = 0.0
    lr_schedule: Literal["cosine", "cosine_per_epoch", "constant"] = "cosine"
    weight_decay: float = 0.2
    decay_norms_and_biases: bool = False
    layer_decay: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0

    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    keep_activations: float = 0.0
    compile_blocks: bool = False
    allow_tf32: bool = False
    deterministic: bool = False
    find_unused_parameters: bool = False
    num_workers: int = 0
    on_nonfinite_loss: Literal["stop", "skip"] = "stop"

    log_every: int = 10
    evaluate_every: int | None = None
    best_metric: str | None = None
    best_metric_mode: Literal["max", "min"] = "max"
    early_stopping_patience: int | None = None
    early_stopping_min_improvement: float = 0.0
    timeout_seconds: float = 1800.0
    checkpoint_every: int | None = 1000
    keep_checkpoints: int = 3
    trackers: tuple[str, ...] = ()
    progress_bar: bool = True

    def __post_init__(self) -> None:
        if (self.max_steps is None) == (self.num_epochs is None):
            raise ValueError(
                f"exactly one of max_steps and num_epochs must be given, but max_steps is {self.max_steps} "
                f"and num_epochs is {self.num_epochs}. Set the other to null."
            )
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"training.{name} must be positive, but is {value}.")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"training.{name} must not be negative, but is {getattr(self, name)}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"training.{name} must lie in [0, 1), but is {getattr(self, name)}.")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"training.min_learning_rate ({self.min_learning_rate}) is above learning_rate ({self.learning_rate})."
            )
        if not 0 <= self.keep_activations <= 1:
            raise ValueError(f"training.keep_activations must lie in [0, 1], but is {self.keep_activations}.")
        if self.layer_decay > 1:
            raise ValueError(f"training.layer_decay must lie in (0, 1], but is {self.layer_decay}.")
        self._check_best_metric()

    def _check_best_metric(self) -> None:
        if self.best_metric is None and self.early_stopping_patience is not None:
            raise ValueError("training.early_stopping_patience needs training.best_metric: the metric to wait for.")
        if self.best_metric is not None and self.evaluate_every is None:
            raise ValueError("training.best_metric needs training.evaluate_every: the steps between validations.")

    @property
    def num_micro_batches(self) -> int:
        """How many micro-batches a process cuts its batch into."""
        if self.micro_batch_size is None:
            return 1
        return -(-self.batch_size_per_process // self.micro_batch_size)


_POSITIVE = (
    "max_steps",
    "num_epochs",
    "batch_size_per_process",
    "micro_batch_size",
    "num_processes",
    "learning_rate",
    "adam_epsilon",
    "max_grad_norm",
    "log_every",
    "evaluate_every",
    "early_stopping_patience",
    "layer_decay",
    "timeout_seconds",
    "checkpoint_every",
    "keep_checkpoints",
)
_NOT_NEGATIVE = (
    "seed",
    "min_learning_rate",
    "warmup_steps",
    "warmup_start_learning_rate",
    "weight_decay",
    "early_stopping_min_improvement",
    "num_workers",
)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe at `path` as nested mappings, with overrides put in.

    Args:
        path: a YAML file whose top level names the sections.
        overrides: "section.key=value", the value in YAML's spelling; deeper keys with more dots.

    Raises:
        ValueError: no such file, not YAML, not a mapping of sections, an override without "=" or through a value that
            is no mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no recipe at {path}.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the recipe {path} is not readable as YAML: {error}") from error
    if not isinstance(recipe, dict) or not all(isinstance(section, dict) for section in recipe.values()):
        raise ValueError(f"the recipe {path} must map section names to mappings, for instance 'training: {{...}}'.")
    for override in overrides:
        _put(recipe, override)
    return recipe


def build_sections(recipe: Mapping[str, Any], sections: Mapping[str, type], where: str = "recipe") -> dict[str, Any]:
    """One instance of each dataclass of `sections`, filled from the recipe's section of that name.

    Args:
        recipe: section name → mapping, from `read_recipe`.
        sections: section name → dataclass. A section the recipe leaves out is built from defaults.
        where: named in errors, usually the file.

    Raises:
        ValueError: a section or key that nobody asked for, a required key left out, a value of the wrong type.
    """
    for name in recipe:
        if name not in sections:
            raise ValueError(f"{where} has an unknown section '{name}'. {_closest(name, sections)}")
    return {name: build_section(kind, recipe.get(name, {}), name) for name, kind in sections.items()}


def build_section(kind: type[Section], values: Mapping[str, Any], name: str) -> Section:
    """An instance of the dataclass `kind`, each value checked against and converted to the type of its field.

    Raises:
        ValueError: unknown key (the closest known one is named), required key left out, value of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ValueError(f"unknown key '{name}.{key}'. {_closest(str(key), fields)}")
    for key, field in fields.items():
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_required and key not in values:
            raise ValueError(f"'{name}.{key}' is missing: set it in the recipe or with --set {name}.{key}=...")
    return kind(**{key: _convert(value, hints[key], f"{name}.{key}") for key, value in values.items()})


def _put(recipe: dict[str, Any], override: str) -> None:
    """Put one "section.key=value" into the recipe."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise ValueError(
            f"an override reads section.key=value, for instance training.max_steps=20, but got {override!r}."
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the value of the override {override!r} is not readable as YAML: {error}") from error
    place = recipe
    for key in keys[:-1]:
        if place.get(key) is None:
            place[key] = {}
        place = place[key]
        if not isinstance(place, dict):
            raise ValueError(f"the override {override!r} goes through '{key}', which is no mapping in the recipe.")
    place[keys[-1]] = value


def _closest(word: str, known: Mapping[str, Any]) -> str:
    """Which known name the writer may have meant."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"Did you mean '{near[0]}'?" if near else f"Known are: {', '.join(known)}."


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`. YAML reads 5e-4 as text and 1 as an integer: both are good floats here."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        kinds = [option for option in options if option is not type(None)]
        return _convert(value, kinds[0], where)
    if origin is Literal:
        if value not in options:
            # YAML 1.1 reads a bare no as False
            value = "no" if value is False and "no" in options else value
        if value not in options:
            raise ValueError(f"'{where}' must be one of {', '.join(map(repr, options))}, but is {value!r}.")
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        if options[-1] is not Ellipsis and len(value) != len(options):
            raise ValueError(f"'{where}' must hold {len(options)} values, but is {value!r}.")
        kinds = [options[0]] * len(value) if options[-1] is Ellipsis else list(options)
        return tuple(_convert(item, kind, where) for item, kind in zip(value, kinds, strict=True))
    if origin is dict and isinstance(value, dict):
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"'{where}' must be {_spelled(hint)}, but is {value!r}.")


def _spelled(hint: Any) -> str:
    """A type in words, for errors."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if hint in words:
        return words[hint]
    return {tuple: "a list", dict: "a mapping"}.get(typing.get_origin(hint), str(hint))
