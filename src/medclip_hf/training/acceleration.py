"""What makes a step faster or smaller without changing it: recomputed blocks by a budget, compiled blocks, a watch.

The blocks of the towers are found by their base class in transformers, so that nothing here knows a model.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from medclip_hf.training.arguments import RunArguments

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


def prepare_blocks(model: Any, arguments: RunArguments) -> None:
    """Have the model's blocks recompute their activations, and compile them, as far as the arguments ask for it."""
    if arguments.gradient_checkpointing:
        recompute_blocks(model, arguments.keep_activations)
    if arguments.compile_blocks:
        compile_blocks(model)


def towers_of(model: torch.nn.Module) -> list[list[Any]]:
    """The transformer blocks of every tower from its input to its output: the members of each list of blocks."""
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    blocks = ([child for child in one if isinstance(child, GradientCheckpointingLayer)] for one in lists)
    return [tower for tower in blocks if tower]


def recompute_blocks(model: Any, keep: float = 0.0) -> None:
    """Recompute the activations of blocks in the backward pass, of all but a share of every tower.

    A block that recomputes keeps its input alone, for a second forward pass of itself. With L blocks, round(keep · L)
    keep everything, those next to the output: their activations are needed first and freed first, so the peak, which
    comes when the backward pass begins its first recomputation, is no higher than with any other choice.

    Args:
        model: of transformers.
        keep: share of the blocks of each tower that recompute nothing, in [0, 1].

    Raises:
        ValueError: the share lies elsewhere, or the model has no blocks that could.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"the share of blocks that keep their activations must lie in [0, 1], got {keep}.")
    towers = towers_of(model)
    if not towers:
        raise ValueError(f"{type(model).__name__} has no blocks of transformers that could recompute activations.")
    for tower in towers:
        first_kept = len(tower) - round(keep * len(tower))
        for number, block in enumerate(tower):
            block.gradient_checkpointing = number < first_kept
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def compile_blocks(model: torch.nn.Module) -> int:
    """Compile every transformer block by itself, in place; gives back how many.

    Blocks of one tower have the same code and shapes, so one of them is compiled and the others take what it gave: a
    model of 39 blocks starts about as fast as one of 2. What lies around them (losses, gathering, ragged masks) stays
    as it is. Names of parameters, and with them checkpoints, do not change.

    Raises:
        ValueError: the model has no such blocks, or the machine no compiler for its device.
    """
    blocks = [block for tower in towers_of(model) for block in tower]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks of transformers that could be compiled.")
    _check_compiler(next(model.parameters()).device)
    for block in blocks:
        block.compile()
    logger.info("%d blocks are compiled at their first call; expect a minute before the first step", len(blocks))
    return len(blocks)


class Watch(Generic[Item]):
    """Goes through items and knows what share of the time was spent waiting for them.

    Args:
        items: for instance a DataLoader's batches.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self.items = items
        self.waited = 0.0
        self.since = time.perf_counter()

    def __iter__(self) -> Iterator[Item]:
        iterator = iter(self.items)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            yield item

    def share(self) -> float:
        """Waiting over all time since this was last asked, in [0, 1]; 0 is a loader that is never the limit."""
        now = time.perf_counter()
        waited, passed = self.waited, now - self.since
        self.waited, self.since = 0.0, now
        return min(waited / passed, 1.0) if passed > 0 else 0.0


def _check_compiler(device: torch.device) -> None:
    """A sentence now in place of a page of traceback at the first step."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise ValueError("training.compile_blocks on a GPU needs Triton: pip install triton.") from error
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "training.compile_blocks on a CPU needs a C++ compiler such as g++, and none was found."
        ) from error
