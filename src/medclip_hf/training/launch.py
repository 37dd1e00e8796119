"""The Accelerator of a run: device, processes, precision and trackers, and launches that are not what was asked for."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import ProjectConfiguration

from medclip_hf.training import zero
from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.processes import join_processes
from medclip_hf.training.signals import stop_with_launcher


def make_accelerator(arguments: RunArguments) -> Accelerator:
    """The Accelerator of a run: device, processes, precision and trackers.

    Raises:
        ValueError: the processes are not those that were asked for, compute on different devices, or share the model in
            a way that this loop does not.
    """
    if arguments.allow_tf32:
        torch.set_float32_matmul_precision("high")
    if arguments.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    use_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    zero.launched_plan()  # refuses what is not supported before processes meet
    join_processes(use_cpu, arguments.timeout_seconds)
    with zero.hidden_from_accelerate():
        accelerator = Accelerator(
            cpu=use_cpu,
            mixed_precision=arguments.mixed_precision,
            log_with=list(arguments.trackers) or None,
            project_config=ProjectConfiguration(arguments.output_dir, str(Path(arguments.output_dir) / "trackers")),
            # The models have no running statistics: nothing that would have to be sent before each forward pass.
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    broadcast_buffers=False,
                    find_unused_parameters=arguments.find_unused_parameters,
                    gradient_as_bucket_view=True,
                )
            ],
        )
    _check_processes(accelerator, arguments)
    stop_with_launcher()
    missing = set(arguments.trackers) - {getattr(kind, "value", kind) for kind in accelerator.log_with}
    if missing:
        raise ValueError(f"no tracker {sorted(missing)} is installed. Run: pip install 'medclip-hf[track]'")
    return accelerator


def end(accelerator: Accelerator) -> None:
    """Close trackers and process group.

    The wrapped models go first: one that outlives its group would end it once more, and then waits for ever at times
    (seen with gloo in PyTorch 2.13).
    """
    accelerator.free_memory()
    accelerator.end_training()


def _check_processes(accelerator: Accelerator, arguments: RunArguments) -> None:
    """Refuse a launch that is not what was asked for."""
    known = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP)
    if accelerator.distributed_type not in known:
        raise ValueError(
            f"this loop trains by data parallelism, in shards (FSDP) or without, not by "
            f"{accelerator.distributed_type.value}. Launch with scripts/launch/fsdp2.yaml."
        )
    if arguments.num_processes != 1 and _was_launched_for_several(accelerator):
        raise ValueError(
            "several processes were asked for, but only one was started: without GPUs 'accelerate launch' needs mpirun "
            "for more. Use: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ..., or "
            "--config_file scripts/launch/cpu_processes.yaml. If one process is meant, say training.num_processes=1."
        )
    if arguments.num_processes is not None and arguments.num_processes != accelerator.num_processes:
        raise ValueError(
            f"the recipe is made for {arguments.num_processes} processes, but {accelerator.num_processes} run: the "
            f"global batch would be {arguments.batch_size_per_process * accelerator.num_processes} instead of "
            f"{arguments.batch_size_per_process * arguments.num_processes} rows. Launch that many, or set "
            "training.num_processes=null and choose batch size and learning rate for what you have."
        )


def _was_launched_for_several(accelerator: Accelerator) -> bool:
    """Whether `accelerate launch` was told to start several processes and silently started this one alone.

    On CPUs it leaves that to mpirun: it sets an address to meet at, but no rank.
    """
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    return accelerator.num_processes == 1 and is_launched and "LOCAL_RANK" not in os.environ
