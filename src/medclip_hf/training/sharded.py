"""Models in shards (FSDP2), and checkpoints that all processes write at once and in the background.

torch.distributed.checkpoint writes them as safetensors: each process its own shards of weights and moments, each with
its place in the whole in the file's header. So another number of processes can read them, and nothing is pickled. The
step goes on as soon as the shards are copied to memory; the checkpoint gets its name when all files are on the disk.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from medclip_hf.training import zero
from medclip_hf.training.acceleration import towers_of

logger = logging.getLogger(__name__)

SHARDS = "shards"
_WEIGHT = "model/"
_MOMENT = "optimizer/"


def is_sharding_asked_for() -> bool:
    """Whether the launch says FSDP, version 2, as `accelerate launch` hands it on.

    Accelerate itself ignores that on CPUs.

    Raises:
        ValueError: it says version 1.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise ValueError("the launch configuration asks for FSDP version 1; set fsdp_version: 2.")
    return True


def shard(model: Any, accelerator: Accelerator) -> Any:
    """The same model with every parameter cut among the processes; its units are gathered as they are needed.

    Each transformer block is a unit, and the rest is another.
    The model has to be called by its `forward`: other methods find its parameters cut.

    Args:
        model: with the same weights on every process.
        accelerator: of the run. Under bf16 blocks compute by autocast, as without shards; weights travel in float32.
    """
    if accelerator.num_processes == 1:
        return accelerator.prepare_model(model.to(accelerator.device), evaluation_mode=True)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    offload = os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
    common: dict[str, Any] = {"mesh": mesh, "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy()}
    for block in (block for tower in towers_of(model) for block in tower):
        fully_shard(block, reshard_after_forward=_cuts_after_forward(), **common)
    fully_shard(model, **common)
    return accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `shard` has cut the model."""
    return isinstance(model, FSDPModule)


def whole_weights(model: Any) -> dict[str, Any] | None:
    """All weights in memory of the main process, an empty mapping on the others; None if the model is not sharded.

    Every process calls this.
    """
    if not is_sharded(model):
        return None
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


@contextmanager
def own_class(model: Any) -> Iterator[None]:
    """While entered, a sharded model is of the class it was written as: what is saved names and copies that one."""
    sharded_class = type(model)
    if is_sharded(model):
        model.__class__ = next(kind for kind in sharded_class.__mro__ if not issubclass(kind, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = sharded_class


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """While entered, every process holds all parameters whole, for reading, and for forward passes of its own.

    Without it a forward pass gathers parameters from all processes: they have to call the model equally often.
    """
    if zero.is_cut(model):
        with zero.gathered(model):
            yield
        return
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
        if unit is not model:
            unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            if unit is not model:
                unit.set_reshard_after_forward(_cuts_after_forward(), recurse=False)


def like(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`value`, which every process has whole, cut as `target` is."""
    if not isinstance(target, DTensor):
        return value
    cut = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    return cut.to(target.device)  # shards kept in the memory of the machine belong to a mesh of GPUs all the same


def _cuts_after_forward() -> bool:
    """Whether a block that was gathered for the forward pass is gathered once more for the backward pass."""
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"


class ShardWriter:
    """Writes shards in the background, one checkpoint at a time.

    Args:
        accelerator: of the run.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        # its own group: messages of the background thread must not meet those of the training
        self.group = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self._future: Future[Any] | None = None
        self._error: BaseException | None = None
        self._is_done = threading.Event()

    def start(self, folder: Path, tensors: dict[str, torch.Tensor], seal: Callable[[], None]) -> None:
        """Copy this process's shards to memory and go on; they are written meanwhile.

        Args:
            folder: of the checkpoint, still under its temporary name; what each process has put there before is part
                of it.
            tensors: from `tensors_of`.
            seal: called on the main process once the shards of all processes are written.
        """
        self._is_done.clear()
        future = dcp.async_save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True),
            process_group=self.group,
            no_dist=self.group is None,
        )
        assert isinstance(future, Future)
        self._future = future
        future.add_done_callback(lambda future: self._finish(future, seal))

    def has_failed(self) -> bool:
        """Whether the checkpoint being written is known to have failed on this process."""
        return self._is_done.is_set() and self._error is not None

    def wait(self) -> None:
        """Wait for the background.

        Raises:
            OSError: what went wrong there on any process; once.
        """
        if self._future is None:
            return
        self._is_done.wait()
        error, self._error, self._future = self._error, None, None
        if isinstance(error, CheckpointException):
            first = min(error.failures)
            raise OSError(f"process {first}: {error.failures[first][0]}") from None  # its own text is all tracebacks
        if error is not None:
            raise error

    def _finish(self, future: Any, seal: Callable[[], None]) -> None:
        """In the background, after the writing: give the checkpoint its name, or keep the error for the loop."""
        try:
            self._error = future.exception()
            if self._error is None and self.accelerator.is_main_process:
                seal()
        except Exception as error:
            self._error = error
        finally:
            self._is_done.set()


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps of both: "model/name" and "optimizer/moment/name"."""
    tensors = {_WEIGHT + name: value.detach() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{_MOMENT}{moment}/{name}"] = value
    return {key: _with_an_axis(value) for key, value in tensors.items()}


def has_shards(folder: Path) -> bool:
    """Whether the checkpoint was written in shards."""
    return (folder / SHARDS).is_dir()


def restore_shards(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None, group: Any = None
) -> None:
    """Fill weights and moments, each process its own part, whatever number of processes wrote the checkpoint.

    Args:
        folder: of the checkpoint.
        model: sharded or whole.
        optimizer: over its parameters; None restores the weights alone.
        group: of the processes, one that exchanges tensors of CPUs.

    Raises:
        ValueError: the checkpoint holds other parameters than the model.
    """
    reader = HuggingFaceStorageReader(str(folder / SHARDS))
    kept = reader.read_metadata().state_dict_metadata
    stored = {key: tuple(one.size) for key, one in kept.items() if isinstance(one, TensorStorageMetadata)}
    targets = {_WEIGHT + name: value.detach() for name, value in model.state_dict().items()}
    weights = {key for key in stored if key.startswith(_WEIGHT)}
    if weights != set(targets):
        missing = sorted(key.removeprefix(_WEIGHT) for key in set(targets) - weights)
        unknown = sorted(key.removeprefix(_WEIGHT) for key in weights - set(targets))
        raise ValueError(
            f"the weights in {folder} are not those of this model: missing {missing or 'none'}, unknown "
            f"{unknown or 'none'}."
        )
    if optimizer is not None:
        targets |= _empty_moments(folder, [key for key in stored if key.startswith(_MOMENT)], model, optimizer)
    targets = {key: _with_an_axis(value) for key, value in targets.items()}
    for key, target in targets.items():
        if stored[key] != tuple(target.shape):
            raise ValueError(f"{folder} holds '{key}' of shape {stored[key]}, but it is {tuple(target.shape)} here.")
    dcp.load(targets, storage_reader=reader, process_group=group, no_dist=group is None)


def _empty_moments(
    folder: Path, keys: list[str], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Room in the optimiser's state for what the checkpoint keeps of it."""
    parameters = dict(model.named_parameters())
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    room = {}
    for key in keys:
        moment, name = key.removeprefix(_MOMENT).split("/", 1)
        parameter = parameters.get(name)
        if parameter is None or id(parameter) not in trained:
            raise ValueError(f"{folder} holds '{key}', but the model trains no parameter of that name.")
        if moment == "step":  # AdamW keeps it on the CPU, unless fused
            device = parameter.device if optimizer.defaults.get("fused") else "cpu"
            value = torch.zeros((), dtype=torch.float32, device=device)
        else:
            value = torch.zeros_like(parameter)
        optimizer.state[parameter][moment] = value.detach()
        room[key] = optimizer.state[parameter][moment]
    return room


def _with_an_axis(value: torch.Tensor) -> torch.Tensor:
    """A single number as a vector of one, in the same memory: the file format places shards along axes."""
    return value if value.dim() > 0 else value.reshape(1)


def exchange_later(model: torch.nn.Module, accelerator: Accelerator) -> Any:
    """A context in which a backward pass adds up gradients without exchanging them between processes.

    Shards do exchange them: keeping the sum whole would take the memory that sharding is to save.
    """
    return nullcontext() if is_sharded(model) or zero.is_engine(model) else accelerator.no_sync(model)
