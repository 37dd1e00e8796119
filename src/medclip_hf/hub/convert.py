"""Official checkpoints to folders that `from_pretrained` loads, and back, with an account of every key.

A folder gets the model (configuration, weights, code), its processor and tokenizer, and two records:

    conversion_report.json   the source and its SHA-256; each key used (and as what), dropped (and why) or made up
    conversion_check.json    outputs for seeded inputs: see `hub.convert_check`

Weights stay mapped from the source until they are written, so one copy of them is all the memory a conversion takes.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf.hub import convert_conceptclip, convert_fvlm
from medclip_hf.hub.checkpoints import (
    Conversion,
    bare_name,
    check_fit,
    in_one_format,
    read_weights,
    weights_file,
    weights_files,
)
from medclip_hf.hub.convert_check import check_folder
from medclip_hf.hub.convert_configs import (
    Architecture,
    check_fields,
    conceptclip_config,
    configured,
    detect_architecture,
    fvlm_config,
    tower_fields,
    without_weights,
)
from medclip_hf.modeling.conceptclip import ConceptCLIPConfig, ConceptCLIPModel
from medclip_hf.modeling.fvlm import FVLMConfig, FVLMModel
from medclip_hf.processing.conceptclip import ConceptCLIPProcessor
from medclip_hf.processing.fvlm import FVLMImageProcessor, FVLMProcessor

logger = logging.getLogger(__name__)

REPORT_NAME = "conversion_report.json"
CHECK_NAME = "conversion_check.json"
PUBLISHED_TOKENIZERS: dict[Architecture, str] = {
    "conceptclip": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext",
    "fvlm": "microsoft/BiomedVLP-CXR-BERT-specialized",
}
_TEXT_TOWERS = ("bert", "cxr-bert")
_VISION_TOWERS = ("siglip", "siglip_vision_model")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
_PIECE = 2**22  # bytes read at once
_MAX_UNKNOWN_SHARE = 0.1  # of the text tower's vocabulary that the tokenizer may lack: padding to round numbers


def convert_checkpoint(
    path: str | Path,
    folder: str | Path,
    *,
    tokenizer: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    with_processor: bool = True,
) -> dict[str, Any]:
    """Writes the folder of an official checkpoint of either model and gives back its report.

    Args:
        path: ConceptCLIP's `model.safetensors` or training `.pt`, of either stage, or fVLM's `model.pth`; or a folder
            that holds one of them. Which model it is follows from its keys.
        folder: to write; must not exist, or be empty.
        tokenizer: folder or Hub name of the text tower's tokenizer; None: the one beside the checkpoint.
        config: fields of the model's configuration that shapes do not tell, such as the number of heads of a tower of
            an unpublished width.
        with_processor: False leaves processor and tokenizer out.

    Raises:
        ValueError: the file is no checkpoint of either model, does not fit the configuration, or there is no tokenizer
            that fits it. Nothing is written then.
    """
    source = weights_file(path)
    official = read_weights(source)
    try:
        architecture = detect_architecture(official)
        conversion, model = _plan(official, architecture, config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    processor = build_processor(model.config, tokenizer or _tokenizer_beside(source)) if with_processor else None
    report = _report(source, official, architecture, conversion)
    with _new_folder(folder) as partial:
        model.save_pretrained(partial, state_dict=dict(conversion.weights))  # it empties what it is given
        if processor is not None:
            processor.save_pretrained(partial)
        _check_written(partial, conversion.weights)
        del official, conversion
        _write_json(partial / REPORT_NAME, report)
        _write_json(partial / CHECK_NAME, check_folder(partial))
    return report


def convert_towers(
    folder: str | Path,
    *,
    architecture: Architecture,
    text: str | Path,
    vision: str | Path,
    config: Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    patch_embedding: Literal["random", "inflated"] = "random",
) -> dict[str, Any]:
    """Writes the folder of a model to start training from, with pre-trained towers, and gives back its report.

    Args:
        folder: to write; must not exist, or be empty.
        architecture: of the model.
        text: folder or Hub name of a BERT (PubMedBERT, CXR-BERT).
        vision: for ConceptCLIP folder or Hub name of a SigLIP; for fVLM the file of an MAE or ViT encoder.
        config: fields of the model's configuration. The towers' fields come from the towers.
        tokenizer: folder or Hub name; None: that of `text`.
        patch_embedding: of fVLM, see `convert_fvlm.initialize_from_mae`.

    Raises:
        ValueError: a tower is incomplete or does not fit.
    """
    check_fields(ConceptCLIPConfig if architecture == "conceptclip" else FVLMConfig, config)
    _check_type(text, _TEXT_TOWERS)
    if architecture == "conceptclip":
        _check_type(vision, _VISION_TOWERS)
    torch.manual_seed(0)  # what the towers do not hold starts from here: the same folder from the same towers
    if architecture == "conceptclip":
        values = dict(config or {})
        values["vision_config"] = {"hidden_act": "gelu"} | dict(values.get("vision_config", {}))
        model: PreTrainedModel = _conceptclip_from_towers(vision, text, values)
    else:
        fvlm = FVLMConfig.from_dict(dict(config or {}))
        model = convert_fvlm.from_towers(fvlm, mae_path=vision, text_path=text, patch_embedding=patch_embedding)
    processor = build_processor(model.config, tokenizer or text)
    fresh = sorted(key for key in model.state_dict() if not key.startswith(("vision_model.", "text_model.")))
    if architecture == "fvlm" and patch_embedding == "random":
        fresh += ["vision_model.embeddings.patch_embedding.weight", "vision_model.embeddings.patch_embedding.bias"]
    report = {
        "architecture": architecture,
        "towers": {"vision": _public_name(vision), "text": _public_name(text), "patch_embedding": patch_embedding},
        "used": {
            tower: sorted(key for key in model.state_dict() if key.startswith(f"{tower}.") and key not in fresh)
            for tower in ("vision_model", "text_model")
        },
        "made": dict.fromkeys(fresh, "starts from random or initial values: no tower holds it"),
        "versions": _versions(),
    }
    with _new_folder(folder) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        _write_json(partial / REPORT_NAME, report)
        _write_json(partial / CHECK_NAME, check_folder(partial))
    return report


def _check_type(tower: str | Path, known: tuple[str, ...]) -> None:
    """Refuse a tower of another kind: of RoBERTa every weight would find a place in a BERT, and mean something else."""
    values, _ = PreTrainedConfig.get_config_dict(tower)
    if values.get("model_type") not in known:
        raise ValueError(f"{tower} is of type {values.get('model_type')!r}; expected {' or '.join(known)}.")


def _conceptclip_from_towers(vision: str | Path, text: str | Path, values: dict[str, Any]) -> ConceptCLIPModel:
    """SigLIP's folder names the tanh GELU; the published model is trained with the exact one from the start."""
    towers = {name: values.pop(name, {}) for name in ("vision_config", "text_config")}
    model = ConceptCLIPModel.from_vision_text_pretrained(str(vision), str(text), **values)
    merged = model.config.to_dict()
    for name, own in towers.items():
        merged[name] = tower_fields(getattr(model.config, name)) | own
    other = ConceptCLIPModel(ConceptCLIPConfig.from_dict(merged))
    check_fit(other, model.state_dict(), f"{vision} and {text}")
    other.load_state_dict(model.state_dict())
    return other


def export_official(folder: str | Path, path: str | Path) -> dict[str, Any]:
    """Writes the weights of a folder under official names, for the original code, and gives back the report.

    Args:
        folder: of a `ConceptCLIPModel` or `FVLMModel`, as `save_pretrained` writes it.
        path: `.safetensors`, or `.pt` / `.pth` with the weights under "state_dict" (ConceptCLIP) or "model" (fVLM).

    Raises:
        ValueError: the folder holds another model, lacks weights, or the ending is unknown.
    """
    folder, path = Path(folder), Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"{path}: expected a name that ends in .safetensors, .pt or .pth.")
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{folder} holds no config.json: name the folder of a saved model.")
    values = read_object(config_file)
    architecture = values.get("model_type")
    if architecture not in ("conceptclip", "fvlm"):
        raise ValueError(f"{folder} holds a model of type {architecture!r}; conceptclip and fvlm have a way back.")
    classes: Any = (ConceptCLIPConfig, ConceptCLIPModel) if architecture == "conceptclip" else (FVLMConfig, FVLMModel)
    weights = read_weights(folder)
    try:
        check_fit(without_weights(classes[1], configured(classes[0], values)), weights, "it")
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    module = convert_conceptclip if architecture == "conceptclip" else convert_fvlm
    official = module.to_official_state_dict(weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix == ".safetensors":
            save_file(official, partial, metadata={"format": "pt"})
        else:
            torch.save({"state_dict" if architecture == "conceptclip" else "model": official}, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return {"architecture": architecture, "file": path.name, "sha256": _sha256(path), "keys": sorted(official)}


# Parts -----------------------------------------------------------------------------------------------------------


def _plan(
    official: Mapping[str, Tensor], architecture: Architecture, overrides: Mapping[str, Any] | None
) -> tuple[Conversion, PreTrainedModel]:
    """The renamed weights, and the model they are of on the meta device, in their number format."""
    if architecture == "conceptclip":
        conversion = convert_conceptclip.convert_official(official)
        config: Any = conceptclip_config(conversion.weights, overrides)
        model_class: type[PreTrainedModel] = ConceptCLIPModel
    else:
        conversion = convert_fvlm.convert_official(official)
        config = fvlm_config(conversion.weights, overrides)
        model_class = FVLMModel
    model = without_weights(model_class, config)
    check_fit(model, conversion.weights, "it")
    conversion.weights, conversion.widened = in_one_format(conversion.weights)
    model.to(dtype=next(iter(conversion.weights.values())).dtype)
    return conversion, model.eval()


def build_processor(config: Any, tokenizer: str | Path | None) -> ConceptCLIPProcessor | FVLMProcessor:
    """The processor of a converted model: published preprocessing at its size, and the tokenizer of its text tower.

    Args:
        config: of the model.
        tokenizer: folder or Hub name. It is read as BERT's; code that a repository brings is not run.

    Raises:
        ValueError: there is none, or it is not that of the text tower.
    """
    if tokenizer is None:
        raise ValueError(
            "there is no tokenizer beside the checkpoint: name the folder or repository of the text tower's with "
            f"--tokenizer. The published weights use {PUBLISHED_TOKENIZERS[config.model_type]}."
        )
    try:
        words = read_bert_tokenizer(tokenizer)
    except Exception as error:  # of a damaged file, any: tokenizers raises plain ones
        raise ValueError(f"{tokenizer} holds no tokenizer of BERT that can be read: {error}") from error
    num_rows = config.text_config.vocab_size
    if not num_rows * (1 - _MAX_UNKNOWN_SHARE) <= len(words) <= num_rows:
        raise ValueError(
            f"the tokenizer of {tokenizer} knows {len(words)} pieces, but the text tower has {num_rows}: it belongs to "
            "another model. Name that of the text tower with --tokenizer."
        )
    if config.model_type == "conceptclip":
        size = config.vision_config.image_size
        return ConceptCLIPProcessor(SiglipImageProcessorPil(size={"height": size, "width": size}), words)
    image_processor = FVLMImageProcessor(
        anatomies=config.anatomies,
        size_dhw=config.vision_config.image_size_dhw,
        patch_size_dhw=config.vision_config.patch_size_dhw,
    )
    return FVLMProcessor(image_processor, words)


def read_bert_tokenizer(name: str | Path) -> BertTokenizer:
    """The tokenizer of a folder or repository, read as BERT's: that of CXR-BERT brings code, which is not run.

    Raises:
        OSError: there is none.
    """
    words = BertTokenizer.from_pretrained(name)
    words.init_kwargs.pop("auto_map", None)  # it would be saved, and name code that does not travel along
    return words


def _tokenizer_beside(source: Path) -> Path | None:
    return source.parent if any((source.parent / name).is_file() for name in _TOKENIZER_FILES) else None


def _public_name(tower: str | Path) -> str:
    """Name of a repository as it is; of a file or folder its last part, as the report goes where the model goes."""
    return Path(tower).resolve().name if Path(tower).exists() else str(tower)


def _report(
    source: Path, official: Mapping[str, Tensor], architecture: Architecture, conversion: Conversion
) -> dict[str, Any]:
    used, dropped = conversion.used(), conversion.dropped
    lost = {bare_name(key) for key in official} - used.keys() - dropped.keys()
    assert not lost, lost  # the converters raise for what they do not know
    for key, reason in dropped.items():
        logger.info("dropped %s: %s", key, reason)
    return {
        "architecture": architecture,
        "source": [
            {"file": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)} for path in weights_files(source)
        ],
        "num_keys": {"came": len(official), "used": len(used), "dropped": len(dropped)},
        "num_weights": sum(value.numel() for value in conversion.weights.values()),
        "used": used,
        "dropped": dropped,
        "widened": conversion.widened,
        "made": {
            name: "zeros: the release adds no token types" for name, keys in conversion.sources.items() if not keys
        },
        "versions": _versions(),
    }


def _check_written(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Compare what lies on disk with what was meant, bit by bit; read in pieces, as a second mapping would count."""
    found: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size))
            for name in header.keys() - {"__metadata__"}:
                start, end = header[name]["data_offsets"]
                file.seek(8 + header_size + start)
                if name in weights and _holds(file, end - start, weights[name]):
                    found.add(name)
    if wrong := sorted(weights.keys() - found):
        raise ValueError(f"{folder}: the file does not hold what was written: {wrong[:5]}. Is the disk full?")


def _holds(file: BinaryIO, size: int, value: Tensor) -> bool:
    """Whether the next bytes of a file are those of a tensor."""
    array: Any = value.contiguous().flatten().view(torch.uint8).numpy()
    wanted = memoryview(array)
    if len(wanted) != size:
        return False
    return all(
        file.read(min(_PIECE, size - start)) == wanted[start : start + _PIECE] for start in range(0, size, _PIECE)
    )


@contextmanager
def _new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder beside the wanted one that takes its name when all is done, and goes when something fails."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already and is not empty. Choose another folder, or remove it first.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's 0700 is for secrets
        if folder.exists():
            folder.rmdir()
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it holds none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, but a {type(values).__name__} came.")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}
