"""A saved model and its processor, complete or not at all: what is wrong is told in a sentence, and no code is run.

PyTorch and transformers are imported when a model is read, so that a command can refuse a wrong name at once.
"""

from pathlib import Path
from typing import Any

from medclip_hf import register

_PICKLES = ("*.pkl", "*.pickle", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.joblib")
_OFFICIAL = ("visual.", "visual_encoder.")  # of keys of the releases


def load_complete(model: str, *, revision: str | None = None, dtype: Any = "auto") -> tuple[Any, Any]:
    """A model in evaluation mode and its processor: from safetensors alone, without a gap, and no code of its own.

    Args:
        model: folder or Hub name, of any model that the Auto classes know.
        revision: of a repository on the Hub.
        dtype: of the weights; "auto" is that of the file.

    Raises:
        ValueError: there is none, or weights or processor cannot be used; what failed is its cause.
    """
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging

    register()  # left out when a command or a worker of `data` imported the package
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what does not fit is told below
    try:
        loaded: Any = AutoModel.from_pretrained(
            model,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,  # and not None, for which transformers asks at a terminal
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are among the gaps
        )
        _check_gaps(loaded[1])
        processor = AutoProcessor.from_pretrained(model, revision=revision, trust_remote_code=False)
    except Exception as error:  # of a damaged file, any: tokenizers raises plain ones
        reason = beginning(error)
        if "use_safetensors" in reason:  # transformers would tell to read pickles
            reason = "there is no model.safetensors, or it could not be fetched, and other formats are not read."
        raise ValueError(f"{model} cannot be used: {reason}{_cure(model)}") from error
    finally:
        logging.set_verbosity(verbosity)
    return loaded[0].eval(), processor


def is_path(model: str) -> bool:
    """Whether a name can only be meant as a path: the Hub names repositories owner/name."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith("/")


def beginning(error: BaseException) -> str:
    """The sentence of an error, which may go on in a second line; a `KeyError` alone would be a word without sense."""
    lines = [line.strip() for line in str(error).strip().splitlines()[:2]]
    return " ".join(lines) if lines and not isinstance(error, KeyError) else f"{type(error).__name__} {error}".strip()


def _check_gaps(info: dict[str, Any]) -> None:
    """Refuse a model that was not filled with exactly the weights of its folder."""
    gaps = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if any(key.startswith(_OFFICIAL) for key in gaps.get("unexpected_keys", ())):
        raise ValueError("its weights have the names of the release: scripts/convert_checkpoint.py converts them")
    if gaps:
        some = {name: keys[:3] for name, keys in gaps.items()}
        raise ValueError(f"its weights are not those of its configuration: {some}")


def _cure(model: str) -> str:
    """What to do about a folder whose weights lie there in another format."""
    path = Path(model)
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return ""
    found = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    there = f" ({', '.join(found)} is not read: only safetensors are)" if found else ""
    return f" The folder holds no *.safetensors{there}."
