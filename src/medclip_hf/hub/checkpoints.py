"""Weights from files of any origin: read without running their code, renamed by tables, loaded without a gap."""

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

RenamingTable = Sequence[tuple[str, str]]  # (pattern of a whole key, its replacement or the reason to drop it)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name of a `.safetensors` file, or of a PyTorch file directly or under "model" or "state_dict".

    Raises:
        ValueError: where the file is missing, damaged, or holds anything but tensors; its code is never run.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file. Give the path of a checkpoint.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint of plain tensors: {error}") from error
    for key in ("model", "state_dict"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    if not isinstance(checkpoint, Mapping) or not all(isinstance(value, Tensor) for value in checkpoint.values()):
        raise ValueError(f"{path} holds no dict of tensors, neither directly nor under 'model' or 'state_dict'.")
    return dict(checkpoint)


def without_wrapper_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights without the `module.` of a distributed wrapper."""
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def first_match(table: RenamingTable, key: str) -> tuple[re.Match[str], str] | None:
    """The match and the other column of the first row whose pattern is the whole key, or None."""
    return next(((match, text) for pattern, text in table if (match := re.fullmatch(pattern, key))), None)


def load_without_gap(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load all weights into the module.

    Raises:
        ValueError: naming every key that is missing, superfluous or of another shape.
    """
    own = module.state_dict()
    problems = {
        "missing": sorted(own.keys() - weights.keys()),
        "superfluous": sorted(weights.keys() - own.keys()),
        "of another shape": [
            f"{key}: {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
            for key in sorted(own.keys() & weights.keys())
            if weights[key].shape != own[key].shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{problem}: {keys}" for problem, keys in problems.items() if keys)
        raise ValueError(f"{source} does not fit the configuration. {found}. Pass that checkpoint's configuration.")
    module.load_state_dict(dict(weights))
