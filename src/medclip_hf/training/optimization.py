"""The optimiser and its learning rate: AdamW with a no-decay group, and a schedule that is a function of the step."""

import math

import torch

from medclip_hf.training.arguments import RunArguments


def make_optimizer(model: torch.nn.Module, arguments: RunArguments) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`, those that decay first, those that do not second.

    Raises:
        ValueError: nothing is trainable.
    """
    decayed: list[torch.nn.Parameter] = []
    exempt: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = arguments.decay_norms_and_biases or is_decayed(name, parameter)
            (decayed if decays else exempt).append(parameter)
    if not decayed and not exempt:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train.")
    groups = [
        {"params": decayed, "weight_decay": arguments.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        fused=all(parameter.is_cuda for parameter in decayed + exempt),
    )


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to biases, norms, logit scales or other vectors."""
    return parameter.ndim >= 2 and not name.endswith("bias") and "logit_scale" not in name


def learning_rate_at(step: int, arguments: RunArguments, max_steps: int, steps_per_epoch: int) -> float:
    """The learning rate of the optimiser step with number `step`, counted from 0.

    Warm-up: start + (peak - start) · (step + 1) / warmup_steps. Then, with t from 0 to 1 over what remains,
    min + (peak - min) · (1 + cos(π t)) / 2. "cosine_per_epoch" takes t = epoch / number of epochs, counted from the
    first epoch, warm-up or not.
    """
    start, peak, low = arguments.warmup_start_learning_rate, arguments.learning_rate, arguments.min_learning_rate
    if step < arguments.warmup_steps:
        return start + (peak - start) * (step + 1) / arguments.warmup_steps
    if arguments.lr_schedule == "constant":
        return peak
    if arguments.lr_schedule == "cosine":
        progress = (step - arguments.warmup_steps) / max(1, max_steps - arguments.warmup_steps)
    else:
        progress = (step // steps_per_epoch) / math.ceil(max_steps / steps_per_epoch)
    return low + (peak - low) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group of the optimiser this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
