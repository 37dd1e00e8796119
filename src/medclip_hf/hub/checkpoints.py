"""Weights from files of any origin: read without running their code, renamed by tables, loaded without a gap.

Files are mapped into memory, not copied: a conversion holds views of the file, and what it writes is read from there.
"""

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # of distributed training, of torch.compile
_FOREIGN_OBJECT = re.compile(r"\bGLOBAL ([\w.]+)")  # as the unpickler of PyTorch names it

RenamingTable = Sequence[tuple[str, str]]  # (pattern of a whole key, its replacement or the reason to drop it)

_INDEX = "model.safetensors.index.json"
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth", "model.pt")
# Formats that are not tensors under names, or that cannot be read without running what they hold.
_REFUSED_SUFFIXES = {
    ".pkl": "a pickle runs code when it is read",
    ".pickle": "a pickle runs code when it is read",
    ".joblib": "a pickle runs code when it is read",
    ".npy": "an array without names",
    ".npz": "arrays of NumPy",
    ".h5": "weights of Keras",
    ".msgpack": "weights of Flax",
    ".onnx": "a graph and not weights by name",
}
# All that the unpickler of `torch.load(weights_only=True)` was seen to raise on damaged or foreign files.
_READ_ERRORS = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    struct.error,
    zipfile.BadZipFile,
)


@dataclass
class Conversion:
    """Weights under new names, and what became of every key that came.

    Args:
        weights: by new name; views of the source where the values are its own.
        sources: new name -> the keys whose values it holds; empty for what has no source.
        dropped: key -> the reason why it has no place.
        widened: number format that came -> the new names that were in it, where it is not the one of `weights`.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    widened: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, value: Tensor, *sources: str) -> None:
        """Take up a weight."""
        self.weights[name] = value
        self.sources[name] = sources

    def used(self) -> dict[str, list[str]]:
        """Key that came -> the new names that hold its values."""
        places: dict[str, list[str]] = {}
        for name, keys in self.sources.items():
            for key in keys:
                places.setdefault(key, []).append(name)
        return places


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name of a `.safetensors` file, or of a PyTorch file directly or under "model" or "state_dict".

    The tensors are mapped from the file, which must stay as it is while they are used. Only PyTorch files older than
    version 1.6 are read into memory.

    Args:
        path: a file, or a folder that holds `model.safetensors` (or its shards and their index), `pytorch_model.bin`,
            `model.pth` or `model.pt`.

    Raises:
        ValueError: where the file is missing, damaged, or holds anything but tensors; its code is never run.
    """
    path = weights_file(path)
    try:
        if path.name.endswith(".index.json"):
            return _read_shards(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _refuse_compressed(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except _READ_ERRORS as error:
        raise ValueError(f"{path} cannot be read as a checkpoint of plain tensors. {_what_to_do(error)}") from error
    for key in ("model", "state_dict"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    if not isinstance(checkpoint, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in checkpoint.items()
    ):
        raise ValueError(f"{path} holds no dict of tensors, neither directly nor under 'model' or 'state_dict'.")
    if odd := sorted(key for key, value in checkpoint.items() if value.is_meta or value.layout != torch.strided):
        raise ValueError(f"{path} holds tensors without values, or sparse ones: {odd[:5]}. Save them as dense tensors.")
    return dict(checkpoint)


def _what_to_do(error: Exception) -> str:
    """A sentence for what a reader raised. PyTorch's own tells how to run the file all the same, and is left out."""
    if found := _FOREIGN_OBJECT.search(str(error)):
        return (
            f"It holds an object of {found[1]}, which would have to be run, and nothing of it was. Where you trust the "
            "file, save its tensors alone, as safetensors."
        )
    reason = ""
    if not isinstance(error, pickle.UnpicklingError | RuntimeError):
        reason = f" ({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__})"
    return f"It is truncated or of another format{reason}; nothing of it was run. Download it again."


def _refuse_compressed(path: Path) -> None:
    """PyTorch never compresses, and a few bytes may unpack to more than there is memory."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("its parts are compressed, which PyTorch never does")


def weights_file(path: str | Path) -> Path:
    """The file that holds the weights: the path itself, or the known name in a folder.

    Raises:
        ValueError: there is none, or its kind is refused.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (_INDEX, *_FOLDER_FILES) if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path} holds no weights: expected one of {', '.join((_INDEX, *_FOLDER_FILES))}.")
        return found[0]
    if not path.is_file():
        raise ValueError(f"{path} is not a file. Give the path of a checkpoint.")
    if reason := _REFUSED_SUFFIXES.get(path.suffix.lower()):
        raise ValueError(f"{path} is refused: {reason}. Give weights as .safetensors, or as .pt or .pth of PyTorch.")
    return path


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The weights of an index, each from the shard that it names."""
    weights: dict[str, Tensor] = {}
    places = _shards_of(index)
    for name in sorted(set(places.values())):
        shard = load_file(index.parent / name)
        if wrong := sorted(shard.keys() ^ {key for key, place in places.items() if place == name}):
            raise ValueError(f"the index and {name} do not name the same weights: {wrong[:5]}")
        weights |= shard
    return weights


def _shards_of(index: Path) -> dict[str, str]:
    """Key -> name of the shard that holds it."""
    values = json.loads(index.read_text(encoding="utf-8"))
    places = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError("an index has a weight_map that names the shard of each weight")
    names = set(places.values())
    if strange := sorted(name for name in names if Path(name).name != name or not name.endswith(".safetensors")):
        raise ValueError(f"its shards {strange} are no safetensors beside it")
    return places


def weights_files(path: Path) -> list[Path]:
    """The files that a weights file consists of: itself, or an index and its shards."""
    if not path.name.endswith(".index.json"):
        return [path]
    return [path, *(path.parent / name for name in sorted(set(_shards_of(path).values())))]


def bare_name(key: str) -> str:
    """A key without the prefixes of a distributed wrapper or of `torch.compile`."""
    return _WRAPPERS.sub("", key)


def without_wrapper_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights without the `module.` of a distributed wrapper and the `_orig_mod.` of `torch.compile`.

    Raises:
        ValueError: a key comes with and without it.
    """
    weights = {bare_name(key): value for key, value in state_dict.items()}
    if len(weights) < len(state_dict):
        names = [bare_name(key) for key in state_dict]
        twice = sorted(key for key in weights if names.count(key) > 1)
        raise ValueError(f"these weights come twice, with and without 'module.': {twice}. Keep one of each.")
    return weights


def thirds(key: str, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of query, key and value out of a fused projection.

    Raises:
        ValueError: its rows do not fall into three parts.
    """
    if fused.ndim == 0 or fused.shape[0] % 3:
        raise ValueError(f"{key} has shape {tuple(fused.shape)}, which is no fused query, key and value.")
    query, keys, value = fused.chunk(3)
    return query, keys, value


def single(key: str, value: Tensor) -> Tensor:
    """A scalar of any shape as (1,).

    Raises:
        ValueError: it holds more or less than one number.
    """
    if value.numel() != 1:
        raise ValueError(f"{key} has shape {tuple(value.shape)}; expected one number.")
    return value.reshape(1)


def in_one_format(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The weights in the widest floating format among them, which loses nothing, and what came in each other one.

    Half-precision training leaves norms and scalars in float32.

    Raises:
        ValueError: a weight is no floating number.
    """
    odd = sorted(key for key, value in weights.items() if not value.is_floating_point() or value.itemsize < 2)
    if odd:
        raise ValueError(
            f"it holds weights of {sorted({str(weights[key].dtype) for key in odd})}: {odd[:5]}; expected floating "
            "numbers of 16 bits or more. Undo the quantisation first."
        )
    wide = reduce(torch.promote_types, (value.dtype for value in weights.values()))
    widened: dict[str, list[str]] = {}
    for key, value in weights.items():
        if value.dtype != wide:
            widened.setdefault(str(value.dtype), []).append(key)
    return _with_memory_of_their_own({key: value.to(wide) for key, value in weights.items()}), widened


def _with_memory_of_their_own(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of weights that begin where another one does: a file may hold one tensor under two names."""
    taken: set[int] = set()
    own = {}
    for key, value in weights.items():
        own[key] = value.clone() if value.data_ptr() in taken else value
        taken.add(value.data_ptr())
    return own


def first_match(table: RenamingTable, key: str) -> tuple[re.Match[str], str] | None:
    """The match and the other column of the first row whose pattern is the whole key, or None."""
    return next(((match, text) for pattern, text in table if (match := re.fullmatch(pattern, key))), None)


def load_without_gap(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load all weights into the module.

    Raises:
        ValueError: naming every key that is missing, superfluous or of another shape.
    """
    check_fit(module, weights, source)
    module.load_state_dict(dict(weights))


def check_fit(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are not exactly those of the module, which may lie on the meta device.

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
