"""A saved model and its processor, complete or not at all: what is wrong is told in a sentence, and no code is run.

PyTorch and transformers are imported when a model is read: a wrong name is told before.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from medclip_hf.hub.errors import HubError, hub_errors

MODEL_TYPES = ("conceptclip", "fvlm")
_PICKLES = ("*.pkl", "*.pickle", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.joblib")
_OFFICIAL = ("visual.", "visual_encoder.")  # of keys of the releases


def model_type_of(model: str, revision: str | None = None) -> str:
    """Which of the two models a folder or repository holds.

    Raises:
        ValueError: with what is wrong with the name, the folder or the configuration, and what to do.
    """
    check_place(model)
    from transformers import PreTrainedConfig

    try:
        with _asking_the_hub(model):
            values, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
        if not isinstance(values, dict):
            raise ValueError(f"it is a {type(values).__name__} and no object")
    except (OSError, ValueError) as error:
        if isinstance(error, HubError):
            raise
        raise ValueError(f"{model}: its configuration cannot be read: {beginning(error)}") from error
    model_type = str(values.get("model_type", ""))
    if model_type in MODEL_TYPES:
        return model_type
    if "auto_map" in values or "custom_pipelines" in values:
        raise ValueError(
            f"{model} asks for code of its own to be run (auto_map of its config.json), and no such code is run here. "
            f"Name a model of type {' or '.join(MODEL_TYPES)}."
        )
    raise ValueError(f"{model} is of type {model_type or 'unknown'!r}; this command takes {' and '.join(MODEL_TYPES)}.")


def load_saved(model: str | Path, *, revision: str | None = None, dtype: Any = "auto") -> tuple[Any, Any]:
    """A model in evaluation mode and its processor: from safetensors alone, without a gap, and no code of its own.

    Args:
        model: folder or Hub name.
        revision: of a repository on the Hub.
        dtype: of the weights; "auto" is that of the file.

    Raises:
        ValueError: as `model_type_of`, or weights or processor cannot be used.
    """
    model = str(model)
    check_place(model)
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what does not fit is told below
    try:
        with _asking_the_hub(model):
            loaded: Any = AutoModel.from_pretrained(
                model,
                revision=revision,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are among the gaps
            )
            _check_gaps(loaded[1])
            processor = AutoProcessor.from_pretrained(model, revision=revision)
    except HubError:
        raise
    except Exception as error:  # of a damaged file, any: tokenizers raises plain ones
        reason = beginning(error)
        if "use_safetensors" in reason:  # transformers would tell to read pickles
            reason = "there is no model.safetensors, or it could not be fetched, and other formats are not read."
        raise ValueError(f"{model} cannot be used: {reason}{_cure(model)}") from error
    finally:
        logging.set_verbosity(verbosity)
    return loaded[0].eval(), processor


def _check_gaps(info: dict[str, Any]) -> None:
    """Refuse a model that was not filled with exactly the weights of its folder."""
    gaps = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if any(key.startswith(_OFFICIAL) for key in gaps.get("unexpected_keys", ())):
        raise ValueError("its weights have the names of the release: scripts/convert_checkpoint.py converts them")
    if gaps:
        some = {name: keys[:3] for name, keys in gaps.items()}
        raise ValueError(f"its weights are not those of its configuration: {some}")


def check_place(model: str) -> None:
    """Refuse what can be no model, before anything is loaded.

    Raises:
        ValueError: it is a file, a folder without a model, or the path of no folder.
    """
    path = Path(model).expanduser()
    if path.is_file():
        kind = "pickles are never read" if path.match("*.pkl") or path.match("*.pickle") else "it is a file"
        raise ValueError(
            f"{model} is no model: {kind}. Name the folder of a model; scripts/convert_checkpoint.py makes one of an "
            "official checkpoint."
        )
    if path.is_dir():
        if (path / "config.json").is_file():
            return
        if (path / "adapter_config.json").is_file():
            raise ValueError(f"{model} holds an adapter alone: merge it into its base first.")
        raise ValueError(f"{model} holds no config.json: name the folder that save_pretrained wrote.")
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith("/"):
        raise ValueError(f"there is no folder {model}.")


def _asking_the_hub(model: str) -> AbstractContextManager[None]:
    """What the Hub refuses is told in a sentence; a folder on this disk has nothing to do with it."""
    return nullcontext() if Path(model).is_dir() else hub_errors(model)


def _cure(model: str) -> str:
    """What to do about a folder whose weights lie there in another format."""
    path = Path(model)
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return ""
    found = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    there = f" ({', '.join(found)} is not read: only safetensors are)" if found else ""
    return f" The folder holds no *.safetensors{there}."


def beginning(error: BaseException) -> str:
    """The sentence of an error, which may go on in a second line; a `KeyError` alone would be a word without sense."""
    lines = [line.strip() for line in str(error).strip().splitlines()[:2]]
    return " ".join(lines) if lines and not isinstance(error, KeyError) else f"{type(error).__name__} {error}".strip()
