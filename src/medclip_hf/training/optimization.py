"""The optimiser and its learning rate: AdamW with a no-decay group, and a schedule that is a function of the step."""

import math
import re
from collections.abc import Iterable

import torch

from medclip_hf.training.arguments import RunArguments

_BLOCK = re.compile(r"(.*?)\b(?:encoder\.)?layers?\.(\d+)\.")  # (tower, number) of "…text_model.encoder.layer.3.…"


def make_optimizer(model: torch.nn.Module, arguments: RunArguments) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`, those that decay first, those that do not second.

    With `layer_decay` each depth of the towers has two such groups, and its share of the learning rate as `lr_scale`.

    Raises:
        ValueError: nothing is trainable.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train.")
    scales = layer_scales((name for name, _ in model.named_parameters()), arguments.layer_decay)
    members: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in trainable.items():
        decays = arguments.decay_norms_and_biases or is_decayed(name, parameter)
        members.setdefault((scales[name], decays), []).append(parameter)
    groups = [
        {
            "params": parameters,
            "weight_decay": arguments.weight_decay if decays else 0.0,
            "lr_scale": scale,
        }
        for (scale, decays), parameters in sorted(members.items(), key=lambda item: item[0], reverse=True)
    ]
    return torch.optim.AdamW(
        groups,
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        fused=_can_fuse(trainable.values()),
    )


def _can_fuse(parameters: Iterable[torch.nn.Parameter]) -> bool:
    """Whether one kernel can update them all: real numbers on one GPU or CPU."""
    devices = {parameter.device.type for parameter in parameters if parameter.is_floating_point()}
    return devices in ({"cuda"}, {"cpu"}) and all(parameter.is_floating_point() for parameter in parameters)


def layer_scales(names: Iterable[str], decay: float) -> dict[str, float]:
    """The share of the learning rate that each parameter gets: decay ** (blocks between it and the top of its tower).

    A tower is what its blocks (`layer.3` or `layers.3`) have before them in their names. Its embeddings lie one below
    the first block; whatever is in no tower, and what a tower has above its blocks, gets the whole rate.
    """
    names = list(names)
    blocks = {name: match for name in names if (match := _BLOCK.match(name))}
    heights: dict[str, int] = {}
    for match in blocks.values():
        heights[match[1]] = max(heights.get(match[1], 0), int(match[2]) + 1)
    scales = {}
    for name in names:
        tower = next((tower for tower in heights if name.startswith(tower)), None)
        depth = 0
        if name in blocks:
            depth = heights[blocks[name][1]] - int(blocks[name][2])
        elif tower is not None and "embeddings" in name:
            depth = heights[tower] + 1
        scales[name] = decay**depth
    return scales


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
    """Give every group of the optimiser its share of this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)
