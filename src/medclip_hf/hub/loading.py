"""What a folder or a repository of the Hub holds, and its model, with what is wrong told in a sentence.

PyTorch and transformers are imported when a model is read: a wrong name is told before.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from medclip_hf.hub.errors import HubError, explain, hub_errors
from medclip_hf.modeling.loading import beginning, is_path, load_complete

MODEL_TYPES = ("conceptclip", "fvlm")


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
    except (OSError, ValueError, RecursionError) as error:
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
    """A model in evaluation mode and its processor; see `load_complete`.

    Args:
        model: folder or Hub name.
        revision: of a repository on the Hub.
        dtype: of the weights; "auto" is that of the file.

    Raises:
        ValueError: as `check_place` and `load_complete`; `HubError` with what the Hub refused.
    """
    model = str(model)
    check_place(model)
    try:
        return load_complete(model, revision=revision, dtype=dtype)
    except ValueError as error:
        refused = None if Path(model).is_dir() or error.__cause__ is None else explain(error.__cause__, model)
        raise refused or error from error.__cause__


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
    if is_path(model):
        raise ValueError(f"there is no folder {model}.")


def _asking_the_hub(model: str) -> AbstractContextManager[None]:
    """What the Hub refuses is told in a sentence; a folder on this disk has nothing to do with it."""
    return nullcontext() if Path(model).is_dir() else hub_errors(model)
