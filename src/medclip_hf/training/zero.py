"""Models cut by DeepSpeed (ZeRO), for launches that ask for it in place of FSDP2.

Of Accelerate's DeepSpeed mode the launch and its configuration are used, but not its steps: those expect one backward
pass a step and weights in 16 bits. DeepSpeed owns gradients, clipping and update; the loop asks it for the norm
afterwards. Its own checkpoints are pickles of one world size, so ours are written: whole, from parameters and moments
that are gathered one by one.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from medclip_hf.training.arguments import RunArguments

_LAUNCHED_FOR = "ACCELERATE_USE_DEEPSPEED"
_PREFIX = "ACCELERATE_DEEPSPEED_"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_GATHERED = -1  # in place of a module's number: while one uses a parameter, the end of a forward pass does not cut it


@dataclass(frozen=True)
class ZeroPlan:
    """What the launch asks of DeepSpeed.

    Args:
        stage: 1 cuts moments among the processes, 2 gradients too, 3 weights too.
        offload_optimizer: keep moments, and update, in the memory of the machine.
        offload_weights: keep weights there too; stage 3 alone.
    """

    stage: int
    offload_optimizer: bool
    offload_weights: bool


def launched_plan() -> ZeroPlan | None:
    """What `accelerate launch` says of DeepSpeed; None if nothing.

    Raises:
        ValueError: it asks for what is not supported here, or DeepSpeed is not installed.
    """
    if os.environ.get(_LAUNCHED_FOR, "false").lower() != "true":
        return None
    if os.environ.get(_PREFIX + "CONFIG_FILE", "none").lower() != "none":
        raise ValueError(
            "a DeepSpeed configuration file is not read: precision, clipping and batch sizes stand in the recipe. Set "
            "zero_stage and the offload devices in the launch configuration, as scripts/launch/deepspeed.yaml does."
        )
    stage = int(os.environ.get(_PREFIX + "ZERO_STAGE", "2"))
    devices = [os.environ.get(f"{_PREFIX}OFFLOAD_{what}_DEVICE", "none") for what in ("OPTIMIZER", "PARAM")]
    if stage not in (1, 2, 3) or not set(devices) <= {"none", "cpu"}:
        raise ValueError(
            "DeepSpeed is supported with zero_stage 1, 2 or 3 and offloading to none or cpu, but the launch asks for "
            f"stage {stage} and offloading to {' and '.join(devices)}. Look at scripts/launch/deepspeed.yaml."
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("the launch asks for DeepSpeed: pip install 'medclip-hf[deepspeed]'")
    return ZeroPlan(stage, devices[0] == "cpu", stage == 3 and devices[1] == "cpu")


@contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """While entered, an Accelerator can be made that does not take the steps over."""
    asked_for = os.environ.pop(_LAUNCHED_FOR, None)
    try:
        yield
    finally:
        if asked_for is not None:
            os.environ[_LAUNCHED_FOR] = asked_for


def cut(
    model: Any, optimizer: torch.optim.Optimizer, plan: ZeroPlan, arguments: RunArguments, accelerator: Accelerator
) -> Any:
    """The engine of DeepSpeed around the model; call it as the model.

    Args:
        model: with the same weights on every process; it is cut in place.
        optimizer: over its parameters. Moments that it has already are kept, cut as well.
        plan: of the launch.
        arguments: of the run.
        accelerator: of the run. Under bf16 the model computes by autocast, weights stay float32.

    Raises:
        ValueError: compiled blocks under stage 3, whose hooks a compiler does not see.
    """
    if accelerator.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read at the import; there may be GPUs that are not to be used
    import deepspeed

    if plan.stage == 3 and arguments.compile_blocks:
        raise ValueError(
            "training.compile_blocks does not go with stage 3 of DeepSpeed. Set it to false, or use FSDP2."
        )
    if accelerator.device.type == "cpu":  # an exchange of its own, compiled for a minute at the first start: not here
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    moments = _moments_by_name(model, optimizer)
    optimizer.state.clear()
    model = accelerator.prepare_model(model.to(accelerator.device), evaluation_mode=True)
    zero: dict[str, Any] = {"stage": plan.stage}
    if plan.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": accelerator.device.type == "cuda"}
    if plan.offload_weights:
        zero["offload_param"] = {"device": "cpu", "pin_memory": accelerator.device.type == "cuda"}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": arguments.batch_size_per_process,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": arguments.max_grad_norm or 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        },
    )
    _make_moments(engine, moments)
    return engine


def is_engine(model: Any) -> bool:
    """Whether `cut` made it."""
    return hasattr(model, "coalesce_grad_reduction")


def one_exchange(model: Any) -> AbstractContextManager[None]:
    """A context of a step's passes, whose gradients are added up, exchanged and cut at its end; nothing for others.

    Without it DeepSpeed expects one forward pass for one backward pass over all parameters: of several forward passes
    it knows the last, and parameters that the first backward pass does not reach keep the gradient of the step before
    (both seen with 0.19.8). The price is that each process holds the whole gradient until the end of the step.
    """
    context: AbstractContextManager[None] = model.coalesce_grad_reduction() if is_engine(model) else nullcontext()
    return context


def update(engine: Any, device: torch.device) -> torch.Tensor:
    """Clip and update, unless the gradient is not finite; its norm before, infinite in that case."""
    engine.step()
    norm = engine.get_global_grad_norm() if engine.was_step_applied() else float("inf")
    return torch.as_tensor(norm, dtype=torch.float32, device=device)


@contextmanager
def editing(engine: Any, *, only: str) -> Iterator[None]:
    """While entered, parameters with `only` in their names are whole; what is written into them by then is kept."""
    import deepspeed

    edited = [parameter for name, parameter in engine.module.named_parameters() if only in name]
    with deepspeed.zero.GatheredParameters(edited, modifier_rank=0):
        yield
        values = [parameter.detach().clone() for parameter in edited]
    for parameter, value in zip(edited, values, strict=True):
        _set(parameter, value)  # in the copy that the optimiser updates


def is_cut(model: torch.nn.Module) -> bool:
    """Whether the parameters of a model, without its engine, are cut among the processes: stage 3."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """While entered, every process holds all parameters whole; see `sharded.gathered`."""
    import deepspeed

    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(_GATHERED)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.ds_active_sub_modules.discard(_GATHERED)


def whole_weights(engine: Any) -> dict[str, torch.Tensor]:
    """All weights by name in memory of the main process, an empty mapping on the others.

    Every process calls this. Parameters are gathered one at a time.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    parameters = dict(engine.module.named_parameters())
    weights = {name: value for name, value in engine.module.state_dict().items() if name not in parameters}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            _keep(weights, name, safe_get_full_fp32_param(parameter))
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                _keep(weights, name, parameter)
    return weights if _is_main() else {}


def whole_moments(engine: Any) -> dict[str, torch.Tensor]:
    """What the optimiser has of each parameter, as "moment/name", where `whole_weights` has the weights."""
    from deepspeed.utils import safe_get_full_optimizer_state

    moments: dict[str, torch.Tensor] = {}
    num_updates = _num_updates(engine)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            for moment in _MOMENTS:
                _keep(moments, f"{moment}/{name}", safe_get_full_optimizer_state(parameter, moment))
            _keep(moments, f"step/{name}", num_updates)
    return moments


def _is_main() -> bool:
    return dist.get_rank() == 0


def _keep(tensors: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    if _is_main():
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()


def _moments_by_name(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """What the optimiser has of each parameter, by the parameter's name."""
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def _flat_parameters(engine: Any) -> list[torch.Tensor]:
    """This process's parts of the parameters, by which the optimiser within knows its state."""
    optimizer = engine.optimizer
    is_stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    return list(optimizer.fp32_partitioned_groups_flat if is_stage_3 else optimizer.single_partition_of_fp32_groups)


def _make_moments(engine: Any, moments: dict[str, dict[str, torch.Tensor]]) -> None:
    """Room for the moments of the optimiser within, filled with what a checkpoint kept of them.

    It would make room at its first update. But DeepSpeed 0.19.8 looks for it after the first group of parameters, does
    not find that of the others, and never looks again.
    """
    optimizer = engine.optimizer
    step = max((state["step"] for state in moments.values()), default=torch.zeros(()))
    for flat in _flat_parameters(engine):
        room = {moment: torch.zeros_like(flat) for moment in _MOMENTS}
        is_fused = optimizer.optimizer.defaults.get("fused")
        optimizer.optimizer.state[flat] = room | {"step": step.to(flat.device if is_fused else "cpu").clone()}
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2 know parts by an index of them
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        for moment in _MOMENTS:
            if name in moments:
                _set(parameter, moments[name][moment].to(engine.device), moment)


def _set(parameter: Any, value: torch.Tensor, moment: str | None = None) -> None:
    """Write what every process has whole into this process's part: of the float32 weights, or of a moment."""
    from deepspeed import utils

    which = () if moment is None else (moment,)
    if not hasattr(parameter, "ds_id"):  # stages 1 and 2
        (utils.safe_set_full_optimizer_state if which else utils.safe_set_full_fp32_param)(parameter, value, *which)
        return
    # Where a parameter cannot be shared out evenly, the last part ends in zeros, which DeepSpeed's own does not know.
    size = parameter.partition_numel()
    padded = torch.nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    part = padded.narrow(0, size * dist.get_rank(), size)
    (utils.safe_set_local_optimizer_state if which else utils.safe_set_local_fp32_param)(parameter, part, *which)


def _num_updates(engine: Any) -> torch.Tensor:
    """How often the optimiser has updated, as AdamW counts it."""
    state = engine.optimizer.optimizer.state[_flat_parameters(engine)[0]]
    return state["step"].detach().to("cpu", torch.float32).reshape(())
