"""Checkpoints of a run: written whole or not at all, found again, and read back bit for bit.

A checkpoint is a folder `checkpoint-00000123` that `from_pretrained` loads, with the optimiser's moments
(`optimizer.safetensors`), the random states of each process (`random_state-00000.safetensors`), the state of the run
(`run_state.json`) and, written last, `manifest.json`: size and checksums of every file. The folder carries the suffix
`.tmp` until all of it is on the disk. A folder without a manifest, or whose files differ from it, is no checkpoint.
Nothing is pickled.
"""

import json
import logging
import os
import random
import re
import shutil
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from medclip_hf.training import sharded

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
_NAME = re.compile(r"checkpoint-(\d{8,})")
_MANIFEST = "manifest.json"
_RUN_STATE = "run_state.json"
_OPTIMIZER = "optimizer.safetensors"
_OBJECTIVE = "objective.safetensors"
_OWN_FILES = (_MANIFEST, _RUN_STATE, _OBJECTIVE, "random_state-")
_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"
_TRAINED_WEIGHTS = "trained_weights.safetensors"
_PIECE_BYTES = 2**26  # of a file under one checksum, by one thread
_BUFFER_BYTES = 2**20  # stays in the processor's cache
_NUM_READERS = 8


class UnwrittenError(OSError):
    """Something of the run could not be written; the message says what, and what to do."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands, and what must be the same for another process to continue it bit for bit.

    Args:
        step: optimiser steps done.
        num_rows: of the training split.
        num_processes: of the run.
        arguments: the run's arguments, by name.
        skipped_steps: steps left out because the loss was not finite.
        rows_set_aside: rows that could not be read, over all processes.
        recipe: the run was started with, section by section.
    """

    step: int
    num_rows: int
    num_processes: int
    arguments: dict[str, Any]
    skipped_steps: int = 0
    rows_set_aside: int = 0
    recipe: dict[str, Any] = field(default_factory=dict)


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return output_dir / CHECKPOINTS / f"checkpoint-{step:08d}"


def save_checkpoint(
    output_dir: Path,
    state: RunState,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    *,
    processor: Any = None,
    objective_state: dict[str, torch.Tensor] | None = None,
    keep: int | None = None,
    writer: sharded.ShardWriter | None = None,
    whole: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None = None,
) -> Path:
    """The folder of a new checkpoint; every process calls this at the same step.

    Args:
        output_dir: of the run.
        state: stored in `run_state.json`.
        model: unwrapped; written with `save_pretrained`, in shards without it.
        optimizer: its moments are stored under the parameters' names.
        accelerator: tells the processes apart.
        processor: saved beside the model, if given.
        objective_state: of an objective that has one; the same on every process.
        keep: how many of the newest checkpoints stay; None: all.
        writer: writes weights and moments in shards, in the background; the folder is there once `finish_checkpoint`
            has come back. None: the main process writes them whole, now.
        whole: weights by name and moments as "moment/name", where model and optimizer hold parts of them.

    Raises:
        UnwrittenError: any process could not write its part; all of them raise it. Earlier checkpoints are untouched.
    """
    final = checkpoint_path(output_dir, state.step)
    temporary = final.with_name(final.name + ".tmp")
    is_main = accelerator.is_main_process

    def begin() -> None:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def write() -> None:
        path = temporary / _random_state_name(accelerator.process_index)
        save_random_state(path, capture_random_state(accelerator.device))
        if is_main and writer is None:
            weights, moments = whole or (None, _optimizer_tensors(model, optimizer))
            _save_pretrained(temporary, model, processor, weights)
            if weights is None:
                _save_weights_left_out(temporary, model)
            save_file(moments, temporary / _OPTIMIZER)
        elif is_main:
            _save_configuration(temporary, model, processor)
        if is_main and objective_state is not None:
            save_file({name: value.contiguous() for name, value in objective_state.items()}, temporary / _OBJECTIVE)
        if is_main:
            write_json(temporary / _RUN_STATE, asdict(state))

    def seal() -> None:
        if is_main:
            _seal(temporary, final)
            if keep is not None:
                _remove_oldest(output_dir, keep)

    together(begin, temporary, accelerator)
    together(write, temporary, accelerator)
    if writer is None:
        together(seal, temporary, accelerator)
    else:
        writer.start(temporary, sharded.tensors_of(model, optimizer), seal)
    return final


def finish_checkpoint(writer: sharded.ShardWriter, final: Path, accelerator: Accelerator) -> None:
    """Wait for the checkpoint that is written in the background; every process calls this.

    Raises:
        UnwrittenError: any process could not write its part; all of them raise it.
    """
    together(writer.wait, final.with_name(final.name + ".tmp"), accelerator)


def together(work: Callable[[], None], temporary: Path, accelerator: Accelerator) -> None:
    """Do this process's part of what all write; where one fails, the folder goes, and all raise an UnwrittenError."""
    error: BaseException | None = None
    try:
        work()
    except Exception as caught:
        error = caught
    has_failed = torch.tensor([float(error is not None)], device=accelerator.device)
    num_failed = int(accelerator.reduce(has_failed, reduction="sum"))
    if num_failed == 0:
        return
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
    reason = str(error) if error is not None else "another process could not write its part"
    raise UnwrittenError(
        f"{temporary.with_suffix('')} could not be written: {reason} ({num_failed} of {accelerator.num_processes} "
        "processes failed). Earlier checkpoints are untouched: free some space, then start again with --resume."
    ) from error


def save_model(
    folder: Path,
    model: torch.nn.Module,
    processor: Any = None,
    weights: dict[str, torch.Tensor] | None = None,
    *,
    beside: Iterable[Path] = (),
) -> None:
    """Write model and processor into `folder` as a whole, replacing what was there; the main process calls this.

    Args:
        folder: to write.
        model: unwrapped.
        processor: saved beside it, if given.
        weights: of a sharded model, from `sharded.whole_weights`; None: those of the model.
        beside: files to copy, unless the model brings its own of that name.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _save_pretrained(temporary, model, processor, weights)
    for file in beside:
        if not (temporary / file.name).exists():
            shutil.copy2(file, temporary)
    for file in _files(temporary):
        _flush(file)
    _replace(temporary, folder)


def find_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of the run, None if there is none. Incomplete ones are reported by name."""
    for folder in reversed(_checkpoint_folders(output_dir)):
        defect = find_defect(folder, in_content=True)
        if defect is None:
            return folder
        logger.warning("%s is ignored: %s.", folder, defect)
    return None


def find_defect(folder: Path, *, in_content: bool = False) -> str | None:
    """Why the folder is no complete checkpoint; None if it is one.

    Args:
        folder: to look at.
        in_content: read all files, to see that they still hold what was written.
    """
    if folder.suffix == ".tmp":
        return "it was only half written when the run ended"
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        sizes, checksums = dict(manifest["files"]), dict(manifest.get("crc32", {}))
    except FileNotFoundError:
        return f"it has no {_MANIFEST}"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"its {_MANIFEST} is not readable ({error})"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    if not in_content:
        return None
    found = _checksums(folder, list(checksums))
    changed = sorted(name for name, checksum in checksums.items() if found[name] != checksum)
    return f"{changed[0]} no longer holds what was written (its checksum differs)" if changed else None


def require_no_defect(folder: Path, defect: str | None) -> None:
    """Raise a ValueError where a checkpoint that was asked for has a defect."""
    if defect is not None:
        raise ValueError(
            f"{folder} cannot be resumed: {defect}. Give a complete checkpoint, or no path for the newest."
        )


def read_run_state(folder: Path) -> RunState:
    """The state of the run that wrote the checkpoint.

    Raises:
        ValueError: the folder is no complete checkpoint, or one of another version of this package.
    """
    require_no_defect(folder, find_defect(folder))
    try:
        return RunState(**json.loads((folder / _RUN_STATE).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / _RUN_STATE} is not a state that this version knows: {error}.") from error


def restore_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    *,
    with_random_state: bool = True,
    group: Any = None,
) -> None:
    """Put weights, optimiser moments and this process's random states back, bit for bit.

    Args:
        folder: of the checkpoint, whole or in shards; the model may be either as well.
        model: unwrapped.
        optimizer: over its parameters.
        accelerator: tells the processes apart.
        with_random_state: False where another number of processes wrote it: those states belong to none of these.
        group: of the processes, for reading shards.

    Raises:
        ValueError: the checkpoint holds other parameters than the model.
    """
    if sharded.has_shards(folder):
        sharded.restore_shards(folder, model, optimizer, group)
    else:
        _restore_weights(folder, model)
        _restore_optimizer(folder / _OPTIMIZER, model, optimizer)
    if with_random_state:
        state = load_random_state(folder / _random_state_name(accelerator.process_index))
        restore_random_state(state, accelerator.device)


def consolidate(checkpoint: Path, output: Path, make_model: Callable[[Path], Any]) -> int:
    """The step of a checkpoint in shards, whose model is then in `output`, ready for `from_pretrained`.

    Args:
        checkpoint: folder of a complete checkpoint.
        output: to write; what belongs to a processor is copied.
        make_model: folder with a `config.json` → a model of that configuration; its weights are replaced.

    Raises:
        ValueError: the checkpoint is not complete, not in shards, or of another model.
    """
    require_no_defect(checkpoint, find_defect(checkpoint, in_content=True))
    step = read_run_state(checkpoint).step
    if not sharded.has_shards(checkpoint):
        raise ValueError(f"{checkpoint} is not in shards: from_pretrained loads it as it is.")
    model = make_model(checkpoint)
    sharded.restore_shards(checkpoint, model)
    files = (file for file in checkpoint.iterdir() if file.is_file())
    save_model(output, model, beside=[file for file in files if not file.name.startswith(_OWN_FILES)])
    return step


def load_objective_state(folder: Path) -> dict[str, torch.Tensor]:
    """What the checkpoint keeps of the objective.

    Raises:
        ValueError: it keeps nothing.
    """
    path = folder / _OBJECTIVE
    if not path.is_file():
        raise ValueError(f"{folder} was written with an objective without a state: it has no {_OBJECTIVE}.")
    return load_file(path)


@dataclass
class RandomState:
    """The states of all generators of a process."""

    python: Any
    numpy: tuple[Any, ...]
    torch_cpu: torch.Tensor
    torch_cuda: torch.Tensor | None


def capture_random_state(device: torch.device) -> RandomState:
    """The states of Python's, numpy's and torch's generators, on a GPU also of its own."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RandomState(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)  # type: ignore[arg-type]


def restore_random_state(state: RandomState, device: torch.device) -> None:
    """Set all generators of this process to the state."""
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.torch_cpu)
    if state.torch_cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state.torch_cuda, device)


def save_random_state(path: Path, state: RandomState) -> None:
    """Write the state: tensors as such, what is not a tensor as JSON in the file's metadata."""
    tensors = {"torch_cpu": state.torch_cpu, "numpy_keys": torch.from_numpy(state.numpy[1].astype(np.int64))}
    if state.torch_cuda is not None:
        tensors["torch_cuda"] = state.torch_cuda
    numpy_rest = [state.numpy[0], *state.numpy[2:]]
    save_file(tensors, path, {"python": json.dumps(state.python), "numpy": json.dumps(numpy_rest)})


def load_random_state(path: Path) -> RandomState:
    """Read what `save_random_state` wrote."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    version, internal, gauss = json.loads(metadata["python"])
    kind, *rest = json.loads(metadata["numpy"])
    keys = tensors["numpy_keys"].numpy().astype(np.uint32)
    return RandomState(
        (version, tuple(internal), gauss), (kind, keys, *rest), tensors["torch_cpu"], tensors.get("torch_cuda")
    )


def write_json(path: Path, content: Any) -> None:
    """Write JSON such that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _flush(temporary)
    temporary.replace(path)


def _save_pretrained(folder: Path, model: Any, processor: Any, weights: dict[str, torch.Tensor] | None = None) -> None:
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # it would tear the one of the training
    if weights is None:
        model.save_pretrained(folder)
    else:
        with sharded.own_class(model):
            model.save_pretrained(folder, state_dict=weights)
    if was_shown:
        transformers_logging.enable_progress_bar()
    if processor is not None:
        processor.save_pretrained(folder)


def _save_configuration(folder: Path, model: Any, processor: Any) -> None:
    """What a model of the checkpoint's shards is made from."""
    with sharded.own_class(model):
        model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def _save_weights_left_out(folder: Path, model: torch.nn.Module) -> None:
    """Where `save_pretrained` wrote an adapter alone, keep all that is trained under the parameters' own names."""
    if not (folder / _WEIGHTS).is_file() and not (folder / _WEIGHTS_INDEX).is_file():
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        save_file(
            {name: parameter.detach().contiguous() for name, parameter in trained.items()}, folder / _TRAINED_WEIGHTS
        )


def _random_state_name(process_index: int) -> str:
    return f"random_state-{process_index:05d}.safetensors"


def _optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state as "moment/parameter name" → tensor."""
    return {
        f"{moment}/{name}": value.contiguous()
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill the optimiser's state; every moment finds its parameter and keeps its own type and shape."""
    parameters = dict(model.named_parameters())
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for key, value in load_file(path).items():
        moment, name = key.split("/", 1)
        parameter = parameters.get(name)
        if parameter is None or id(parameter) not in trained:
            raise ValueError(f"{path} holds '{key}', but the model trains no parameter of that name.")
        if moment != "step" and value.shape != parameter.shape:
            raise ValueError(
                f"{path} holds '{key}' of shape {tuple(value.shape)}, but it is {tuple(parameter.shape)} here."
            )
        # AdamW keeps its step counter on the CPU, unless fused
        on_device = moment != "step" or optimizer.defaults.get("fused")
        value = value.to(parameter.device) if on_device else value
        optimizer.state[parameter][moment] = value if moment == "step" else sharded.like(value, parameter.detach())


def _restore_weights(folder: Path, model: Any) -> None:
    """Load the weights in place: all of them, or the trained ones where the rest never changes."""
    own = model.state_dict()
    whole = _read_weights(folder)
    for name, value in whole.items():
        if name in own and own[name].shape != value.shape:
            shapes = f"{tuple(value.shape)}, but it is {tuple(own[name].shape)} here"
            raise ValueError(f"the weights in {folder} are not those of this model: '{name}' is {shapes}.")
    weights = {name: sharded.like(value, own.get(name, value)) for name, value in whole.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    needed = set(missing) - set(getattr(model, "all_tied_weights_keys", None) or ())
    if (folder / _TRAINED_WEIGHTS).is_file():
        needed &= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if needed or unexpected:
        raise ValueError(
            f"the weights in {folder} are not those of this model: "
            f"missing {sorted(needed) or 'none'}, unknown {sorted(unexpected) or 'none'}."
        )


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, from one file or several shards."""
    if (folder / _TRAINED_WEIGHTS).is_file():
        return load_file(folder / _TRAINED_WEIGHTS)
    if not (folder / _WEIGHTS_INDEX).is_file():
        return load_file(folder / _WEIGHTS)
    shards = set(json.loads((folder / _WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    return {name: value for shard in sorted(shards) for name, value in load_file(folder / shard).items()}


def _seal(temporary: Path, final: Path) -> None:
    """Bring all files to the disk, write the manifest, and give the folder its name."""
    files = _files(temporary)
    for file in files:
        _flush(file)
    sizes = {file.relative_to(temporary).as_posix(): file.stat().st_size for file in files}
    write_json(temporary / _MANIFEST, {"files": sizes, "crc32": _checksums(temporary, list(sizes))})
    _replace(temporary, final)


def _checksums(folder: Path, names: list[str]) -> dict[str, list[int]]:
    """The checksums of files of the folder by name: one for each piece, several pieces at a time."""

    def of_piece(piece: tuple[str, int]) -> int:
        name, start = piece
        checksum, buffer = 0, memoryview(bytearray(_BUFFER_BYTES))
        with (folder / name).open("rb") as file:
            file.seek(start)
            for _ in range(_PIECE_BYTES // _BUFFER_BYTES):
                checksum = zlib.crc32(buffer[: file.readinto(buffer)], checksum)
        return checksum

    pieces = [(name, start) for name in names for start in range(0, (folder / name).stat().st_size, _PIECE_BYTES)]
    checksums: dict[str, list[int]] = {name: [] for name in names}
    with ThreadPoolExecutor(min(_NUM_READERS, os.cpu_count() or 1)) as readers:
        for (name, _), checksum in zip(pieces, readers.map(of_piece, pieces), strict=True):
            checksums[name].append(checksum)
    return checksums


def _replace(temporary: Path, final: Path) -> None:
    """Rename a folder to its final name; what bore the name before is moved away first, then deleted."""
    _flush(temporary)
    if final.exists():
        _remove(final)
    temporary.rename(final)
    _flush(final.parent)


def _remove(folder: Path) -> None:
    """Delete a folder such that it is never seen half deleted under its own name."""
    doomed = folder.with_name(folder.name + ".removed.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _remove_oldest(output_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints, and what older runs left half written."""
    complete = [folder for folder in _checkpoint_folders(output_dir) if find_defect(folder) is None]
    for folder in complete[:-keep]:
        _remove(folder)
    for folder in _checkpoint_folders(output_dir):
        if folder.suffix == ".tmp":
            shutil.rmtree(folder, ignore_errors=True)


def _checkpoint_folders(output_dir: Path) -> list[Path]:
    """Folders named as checkpoints, whole or not, in the order of their steps."""
    root = output_dir / CHECKPOINTS
    found = [(match, folder) for folder in root.glob("checkpoint-*") if (match := _NAME.match(folder.name))]
    return [folder for match, folder in sorted(found, key=lambda pair: (int(pair[0][1]), pair[1].name == pair[0][0]))]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
