"""How the processes of a run meet: all of them, in time, and on the same kind of device."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ARRIVAL_SECONDS = 600.0  # a node of a large job may start minutes after the first
_CPU, _GPU = "a CPU", "a GPU"
_shared: list[dist.Store] = []  # as the process group, it belongs to the process


def join_processes(use_cpu: bool, timeout_seconds: float) -> None:
    """Make the process group of this launch, if it has several processes.

    Accelerate finds the group and uses it. It is made here because a process on a CPU among processes on GPUs would
    wait for them in another kind of group until the end of its patience, and so would they.

    Args:
        use_cpu: compute on the CPU.
        timeout_seconds: how long a collective operation waits for the others.

    Raises:
        ValueError: a launch that says half of what it has to, processes that did not arrive, or that do not compute on
            the same kind of device.
    """
    if not _is_one_of_several() or dist.is_initialized():
        return
    store, rank, num_processes = next(iter(rendezvous("env://", timeout=timedelta(seconds=_ARRIVAL_SECONDS))))
    # torchrun keeps one store over its restarts: what the processes before left in it leads nowhere
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    meet(store, rank, num_processes, _device_of_this_process(use_cpu), _ARRIVAL_SECONDS)
    dist.init_process_group(
        "gloo" if use_cpu else "cpu:gloo,cuda:nccl",  # checkpoints in the background talk from CPU to CPU
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=num_processes,
        timeout=timedelta(seconds=timeout_seconds),
    )
    _shared[:] = [dist.PrefixStore("watch", store)]


def _is_one_of_several() -> bool:
    """Whether the environment gives this process a place among several; half a place is refused."""
    num_processes, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    if num_processes == "1":
        return False
    missing = [name for name in _LAUNCHED if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={num_processes} announces several processes, but {', '.join(missing)} is not set. Start them "
            "by torchrun or accelerate launch, which set it all, or unset WORLD_SIZE for a single one."
        )
    if not (rank.isdecimal() and num_processes.isdecimal() and int(rank) < int(num_processes)):
        raise ValueError(
            f"RANK={rank} is no place among WORLD_SIZE={num_processes} processes, which count from 0. Look at what "
            "started this one."
        )
    return True


def shared_store() -> dist.Store | None:
    """Where the processes of this launch can leave word for each other; None for a single process."""
    return _shared[0] if _shared and dist.is_initialized() else None


def meet(store: dist.Store, rank: int, num_processes: int, device: str, timeout_seconds: float) -> None:
    """Wait until every process has told its device, and see that they are alike.

    Args:
        store: that all processes share.
        rank: of this process.
        num_processes: of the run.
        device: what this process computes on, in words.
        timeout_seconds: how long to wait for the others.

    Raises:
        ValueError: some did not come, or have another device; they are named.
    """
    store.set(f"device/{rank}", device)
    keys = [f"device/{other}" for other in range(num_processes)]
    try:
        store.wait(keys, timedelta(seconds=timeout_seconds))
    except RuntimeError as error:
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
        raise ValueError(
            f"{len(missing)} of {num_processes} processes did not arrive within {timeout_seconds:g} s: "
            f"{in_words(missing)}. Look at their own output, and whether every machine reaches the first one."
        ) from error
    devices = [value.decode() for value in store.multi_get(keys)]
    if len(set(devices)) > 1:
        groups = {kind: [other for other, own in enumerate(devices) if own == kind] for kind in sorted(set(devices))}
        told = "; ".join(f"{in_words(ranks)} computes on {kind}" for kind, ranks in groups.items())
        raise ValueError(
            f"all processes have to compute on the same kind of device, but {told}. Look at the drivers and at "
            "CUDA_VISIBLE_DEVICES of those machines, start no more processes on a machine than it has GPUs, or set "
            "ACCELERATE_USE_CPU=true for all."
        )


def in_words(ranks: list[int]) -> str:
    """Processes by number, shortened where there are many."""
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"process {shown}"


def _device_of_this_process(use_cpu: bool) -> str:
    if use_cpu:
        return _CPU
    num_gpus, place = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    return _GPU if place < num_gpus else f"none of the {num_gpus} GPUs of its machine, all taken"
