"""The gradient of one step: in one pass, or micro-batch by micro-batch with exactly the gradient of the whole batch."""

from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor

Batch = dict[str, Any]


class Objective(Protocol):
    """What a model is trained for; the loop knows nothing else about the model."""

    def split(self, batch: Batch, num_chunks: int) -> list[Batch]:
        """The batch as micro-batches, each of which `embed` takes."""

    def embed(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The embeddings of one model call; entries of several micro-batches can be concatenated along axis 0."""

    def compare(self, embeddings: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """The "loss" to differentiate, whose gradients' mean over processes is the global one, and values to log."""


@runtime_checkable
class StatefulObjective(Protocol):
    """What an objective has beside the three methods if it learns on its own, from averaged weights for instance."""

    def after_step(self, model: torch.nn.Module) -> None:
        """Follow the unwrapped model after its optimiser step; the same on every process."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""

    def load_state_dict(self, state: dict[str, Tensor], /) -> Any:
        """Continue from what a checkpoint kept."""


def backward(
    model: torch.nn.Module, objective: Objective, batch: Batch, num_micro_batches: int, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Add the gradient of the batch's loss to the parameters; gives back what `objective.compare` does, detached.

    A contrastive loss compares every row with every other, so gradients of micro-batches' own losses do not add up to
    that of the batch. With several micro-batches the gradient is therefore cached at the embeddings (Gao et al.,
    "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021): embed all without a graph,
    differentiate the loss with respect to the embeddings, then embed each micro-batch again with a graph and continue
    the backward pass from there. The second pass replays the random numbers of the first, so that dropout is the same.
    """
    if num_micro_batches == 1:
        values = objective.compare(objective.embed(model, batch), batch)
        values["loss"].backward()
        return {name: value.detach() for name, value in values.items()}

    micro_batches = objective.split(batch, num_micro_batches)
    parts, random_states = _embed_without_graph(model, objective, micro_batches, accelerator.device)
    leaves = {
        name: torch.cat([part[name] for part in parts]).requires_grad_(_is_real(parts[0][name])) for name in parts[0]
    }
    values = objective.compare(leaves, batch)
    values["loss"].backward()

    cached = _split_like(parts, {name: leaf.grad for name, leaf in leaves.items()})
    device_ids = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(device_ids):
        for i, micro_batch in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            with nullcontext() if is_last else accelerator.no_sync(model):  # processes exchange gradients once
                _set_random_state(random_states[i], accelerator.device)
                embeddings = objective.embed(model, micro_batch)
                learning = [name for name, value in embeddings.items() if value.requires_grad]
                torch.autograd.backward([embeddings[name] for name in learning], [cached[i][name] for name in learning])
    return {name: value.detach() for name, value in values.items()}


def _embed_without_graph(
    model: torch.nn.Module, objective: Objective, micro_batches: list[Batch], device: torch.device
) -> tuple[list[dict[str, Tensor]], list[tuple[Tensor, Tensor | None]]]:
    """The embeddings of each micro-batch, and the random state from which each was computed."""
    parts, random_states = [], []
    with torch.no_grad():
        for micro_batch in micro_batches:
            random_states.append(_random_state(device))
            embeddings = objective.embed(model, micro_batch)
            # a model may hand out a parameter as it is, a bias for instance, which wants a gradient even here
            parts.append({name: value.detach() for name, value in embeddings.items()})
    return parts, random_states


def _split_like(parts: list[dict[str, Tensor]], gradients: dict[str, Tensor | None]) -> list[dict[str, Tensor]]:
    """The gradients of the concatenated embeddings, cut where the micro-batches met; zeros where there is none."""
    cut: list[dict[str, Tensor]] = [{} for _ in parts]
    for name, gradient in gradients.items():
        sizes = [len(part[name]) for part in parts]
        pieces = [torch.zeros_like(part[name]) for part in parts] if gradient is None else gradient.split(sizes)
        for piece, target in zip(pieces, cut, strict=True):
            target[name] = piece
    return cut


def _is_real(value: Tensor) -> bool:
    return value.is_floating_point()


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
