"""Pipelines for commands."""

import sys
from typing import Any

from medclip_hf.hub.loading import load_saved
from medclip_hf.modeling.loading import beginning

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_pipeline(
    task: str, model: str, *, revision: str | None = None, device: str | None = None, dtype: str = "auto"
) -> Any:
    """A pipeline with model and processor, see `load_saved`.

    Args:
        task: of `transformers.pipeline`.
        model: folder or Hub name.
        revision: of a repository on the Hub.
        device: such as "cpu" or "cuda:0"; None: the accelerator if there is one.
        dtype: "auto" is that of the file.

    Raises:
        ValueError: as `load_saved`, or the device cannot be used.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype is {', '.join(_DTYPES)}, but {dtype!r} came.")
    import torch
    from transformers import pipeline
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    network, processor = load_saved(model, revision=revision, dtype=dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        network = network.to(device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise ValueError(f"--device {device} cannot be used: {beginning(error)}") from error
    make: Any = pipeline  # annotated for the tasks of transformers alone
    return make(
        task,
        model=network,
        processor=processor,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        device=torch.device(device),
    )
