"""The gradient of one step: in one pass, or micro-batch by micro-batch with exactly the gradient of the whole batch."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor

from medclip_hf.training import zero
from medclip_hf.training.distributed import gather_counts
from medclip_hf.training.sharded import exchange_later, is_sharded

Batch = dict[str, Any]
Embed = Callable[[torch.nn.Module, Batch], dict[str, Tensor]]


class Objective(Protocol):
    """What a model is trained for; the loop knows nothing else about the model."""

    def split(self, batch: Batch, num_chunks: int) -> list[Batch]:
        """The batch as micro-batches, each of which `embed` takes."""

    def embed(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The embeddings of one model call; entries of several micro-batches can be concatenated along axis 0."""

    def compare(self, embeddings: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """The "loss" to differentiate, whose gradients' mean over processes is the global one, and values to log."""


class Stream(Protocol):
    """A loss over embeddings too large to be kept for a whole batch: they are compared as they go by."""

    def add(self, embeds: Tensor, /) -> Tensor:
        """The gradient at the next ones."""

    def finish(self, values: dict[str, Tensor], /) -> dict[str, Tensor]:
        """`values` of `compare` with this loss in them; the gradients of the leaves get its part as well."""


@runtime_checkable
class StreamingObjective(Protocol):
    """An objective that can embed images and texts apart, and that lets some embeddings of images go by."""

    streamed_name: str  # of those embeddings

    def embed_images(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What `embed` gives for the images."""

    def embed_texts(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What `embed` gives for the texts, scales and biases with them."""

    def open_stream(self, leaves: dict[str, Tensor], batch: Batch, num_parts: int) -> Stream:
        """The loss that `compare` leaves out where the streamed embeddings are not among the leaves."""


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

    What a `StreamingObjective` lets go by is never kept: the second passes over the images come first, each comparing
    its patches with all concepts, and the texts follow when every image has had its say in the concepts' gradients.
    """
    with zero.one_exchange(model):
        if num_micro_batches == 1:
            values = objective.compare(objective.embed(model, batch), batch)
            values["loss"].backward()
        else:
            values = _backward_by_micro_batches(model, objective, batch, num_micro_batches, accelerator)
    return {name: value.detach() for name, value in values.items()}


def _backward_by_micro_batches(
    model: torch.nn.Module, objective: Objective, batch: Batch, num_micro_batches: int, accelerator: Accelerator
) -> dict[str, Tensor]:
    micro_batches = objective.split(batch, num_micro_batches)
    if is_sharded(model) or zero.is_engine(model):
        micro_batches = _equally_many(micro_batches, accelerator.device)
    passes = _plan(objective, micro_batches)
    for one in passes:
        one.embed_without_graph(model, accelerator.device)
    leaves = _join(passes)
    values = objective.compare(leaves, batch)
    values["loss"].backward()
    _cut(leaves, passes)
    stream = None
    if isinstance(objective, StreamingObjective) and passes[-1].streamed is not None:
        stream = objective.open_stream(leaves, batch, num_parts=sum(one.has_images for one in passes))
    with torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []):
        return _continue_backward(model, passes, stream, values, accelerator)


def _continue_backward(
    model: torch.nn.Module,
    passes: list["_Pass"],
    stream: Stream | None,
    values: dict[str, Tensor],
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """The second passes; `values` with what a stream adds to them."""
    last = passes[-1]
    for one in passes[:-1]:
        if one.has_images:
            with exchange_later(model, accelerator):
                one.continue_backward(model, accelerator.device, stream)
    if stream is not None and last.streamed is not None:
        last.gradients[last.streamed_name] = stream.add(last.streamed)
        values = stream.finish(values)
    for one in passes[:-1]:
        if not one.has_images:
            with exchange_later(model, accelerator):
                one.continue_backward(model, accelerator.device)
    last.continue_backward(model, accelerator.device)  # processes exchange gradients once
    return values


class _Pass:
    """A forward pass over a micro-batch: first without a graph, later with one, from the same random numbers.

    Args:
        embed: of the objective; both towers or one.
        micro_batch: what is embedded.
        has_images: whether images are among it.
        streamed_name: of embeddings that are not kept; "" for none.
        is_last: keeps them all the same: their turn comes before the last pass's.
    """

    def __init__(
        self,
        embed: Embed,
        micro_batch: Batch,
        *,
        has_images: bool = True,
        streamed_name: str = "",
        is_last: bool = False,
    ) -> None:
        self.embed, self.micro_batch = embed, micro_batch
        self.has_images, self.streamed_name, self.is_last = has_images, streamed_name, is_last
        self.streamed: Tensor | None = None
        self.embeddings: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def embed_without_graph(self, model: torch.nn.Module, device: torch.device) -> None:
        """Keep the embeddings, and the random state from which they were computed."""
        self.random_state = _random_state(device)
        with torch.no_grad():
            embeddings = self.embed(model, self.micro_batch)
        # a model may hand out a parameter as it is, a bias for instance, which wants a gradient even here
        self.embeddings = {name: value.detach() for name, value in embeddings.items()}
        streamed = self.embeddings.pop(self.streamed_name, None)
        self.streamed = streamed if self.is_last else None

    def continue_backward(self, model: torch.nn.Module, device: torch.device, stream: Stream | None = None) -> None:
        """Embed again with a graph, and go on backwards from the gradients at the embeddings."""
        _set_random_state(self.random_state, device)
        embeddings = self.embed(model, self.micro_batch)
        if stream is not None:
            self.gradients[self.streamed_name] = stream.add(embeddings[self.streamed_name])
        learning = [name for name, value in embeddings.items() if value.requires_grad]
        torch.autograd.backward([embeddings[name] for name in learning], [self.gradients[name] for name in learning])
        self.gradients = {}


def _equally_many(micro_batches: list[Batch], device: torch.device) -> list[Batch]:
    """As many micro-batches as the process with most of them has: shards are gathered by all, pass by pass."""
    counts = gather_counts([len(micro_batches)], device)
    missing = max(count for (count,) in counts) - len(micro_batches)
    empty = {name: values[:0] for name, values in micro_batches[-1].items()}
    return [*micro_batches, *[empty] * missing]


def _plan(objective: Objective, micro_batches: list[Batch]) -> list[_Pass]:
    """The passes of a step.

    The last one is over everything: plain DDP exchanges gradients in a backward pass that reaches all parameters.
    """
    *others, last = micro_batches
    if not isinstance(objective, StreamingObjective):
        return [_Pass(objective.embed, micro_batch) for micro_batch in micro_batches]
    name = objective.streamed_name
    images = [_Pass(objective.embed_images, micro_batch, streamed_name=name) for micro_batch in others]
    texts = [_Pass(objective.embed_texts, micro_batch, has_images=False) for micro_batch in others]
    return [*images, *texts, _Pass(objective.embed, last, streamed_name=name, is_last=True)]


def _join(passes: list[_Pass]) -> dict[str, Tensor]:
    """The embeddings of the whole batch by name, each a leaf."""
    parts: dict[str, list[Tensor]] = {}
    for one in passes:
        for name, value in one.embeddings.items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(values).requires_grad_(_is_real(values[0])) for name, values in parts.items()}


def _cut(leaves: dict[str, Tensor], passes: list[_Pass]) -> None:
    """Give every pass its part of the leaves' gradients, as views: what is added to those later is in it."""
    for name, leaf in leaves.items():
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf) if leaf.requires_grad else None
        concerned = [one for one in passes if name in one.embeddings]
        sizes = [len(one.embeddings.pop(name)) for one in concerned]
        if leaf.grad is not None:
            for one, piece in zip(concerned, leaf.grad.split(sizes), strict=True):
                one.gradients[name] = piece


def _is_real(value: Tensor) -> bool:
    return value.is_floating_point()


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
