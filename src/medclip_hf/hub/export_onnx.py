"""The towers of both models as ONNX files, each checked against the network it came from.

    vision_model.onnx    ConceptCLIP: pixel_values -> image_embeds, patch_embeds
                         fVLM: pixel_values, anatomy_mask -> anatomy_embeds, anatomy_present
    text_model.onnx      input_ids, attention_mask -> text_embeds, and token_embeds of ConceptCLIP's second stage
    export.json          scales, biases, shapes, and the largest difference that the check found

Every batch size and text length is accepted; the size of pictures and volumes is fixed. A score is
logit_scale · cosine + logit_bias of what the towers give; embeddings are L2-normalised.
"""

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from medclip_hf.data.parquet import require_writable, write_text_atomically
from medclip_hf.modeling.conceptclip import ConceptCLIPModel
from medclip_hf.modeling.fvlm import FVLMModel

logger = logging.getLogger(__name__)

MAX_DIFFERENCE = 1e-3  # of normalised embeddings; float32 towers of the published size stay far below
_INSTALL = "ONNX export needs pip install 'medclip-hf[onnx]'"


@dataclass(frozen=True)
class Tower:
    """One network to export.

    Args:
        name: of the file.
        module: takes the inputs in their order and gives a tuple.
        inputs: an example of each, batch first.
        dynamic_axes: of each input, by name: axis to the name of its size.
        outputs: their names.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    dynamic_axes: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]


def export_towers(
    model: ConceptCLIPModel | FVLMModel, folder: Path | str, *, size_dhw: Sequence[int] | None = None
) -> dict[str, float]:
    """The largest difference of each exported file from the model, on inputs other than those it was traced with.

    Args:
        model: in float32 on the CPU; it is put into evaluation mode.
        folder: of the files; those of an earlier export are replaced.
        size_dhw: voxels of the volumes of an fVLM; default: its training crops.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ValueError: the model is of another kind, place or precision, the folder cannot be written, or an exported file
            does not give what the model gives.
    """
    require_onnx()
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        raise ValueError(f"export from float32 on the CPU; this model is {parameter.dtype} on {parameter.device}.")
    folder = Path(folder)
    require_writable(folder)
    model.eval()
    differences = {}
    for tower in towers_of(model, size_dhw):
        path = folder / f"{tower.name}.onnx"
        _export(tower, path)
        differences[tower.name] = largest_difference(tower, path)
        if not differences[tower.name] < MAX_DIFFERENCE:
            path.unlink()
            raise ValueError(
                f"{path} differs from the model by {differences[tower.name]:.2g}, more than {MAX_DIFFERENCE}, and "
                "was removed. Report it with the versions of torch, onnx and onnxruntime."
            )
    write_text_atomically(folder / "export.json", json.dumps(_facts(model, size_dhw, differences), indent=2) + "\n")
    return differences


def require_onnx() -> None:
    """Raises ImportError where a package that export or check need is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{_INSTALL}: {error}") from error


def towers_of(model: ConceptCLIPModel | FVLMModel, size_dhw: Sequence[int] | None = None) -> list[Tower]:
    """Vision and text tower of a model.

    Raises:
        ValueError: the model is of another kind, or the size does not fit it.
    """
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, ConceptCLIPModel):
        if size_dhw is not None:
            raise ValueError("size_dhw is of volumes; ConceptCLIP takes pictures of one size.")
        has_patches = bool(model.config.use_patch_concept_alignment)
        vision = model.config.vision_config
        pixels = torch.randn(2, vision.num_channels, vision.image_size, vision.image_size, generator=generator)
        images = Tower(
            "vision_model",
            _ConceptCLIPVision(model),
            {"pixel_values": pixels},
            {"pixel_values": {0: "batch"}},
            ("image_embeds", "patch_embeds") if has_patches else ("image_embeds",),
        )
        names = ("text_embeds", "token_embeds") if has_patches else ("text_embeds",)
        return [images, _text_tower(_ConceptCLIPText(model), model, names, generator)]
    if isinstance(model, FVLMModel):
        scans = _fvlm_vision_tower(model, size_dhw or _vision_config(model).image_size_dhw, generator)
        return [scans, _text_tower(_FVLMText(model), model, ("text_embeds",), generator)]
    raise ValueError(f"expected ConceptCLIPModel or FVLMModel, got {type(model).__name__}.")


def largest_difference(tower: Tower, path: Path) -> float:
    """Largest absolute difference of any output between file and network, for batches of 1 and 3, texts longer too."""
    worst = 0.0
    for batch in (1, 3):
        inputs = {name: _resized(value, tower.dynamic_axes[name], batch) for name, value in tower.inputs.items()}
        with torch.no_grad():
            expected = tower.module(*inputs.values())
        found = run_onnx(path, {name: value.numpy() for name, value in inputs.items()})
        for name, value in zip(tower.outputs, expected, strict=True):
            if found[name].shape != tuple(value.shape):
                return float("inf")
            worst = max(worst, float(np.abs(found[name].astype(np.float64) - value.double().numpy()).max()))
    return worst


def run_onnx(path: Path, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The outputs of an exported file by name, computed by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def quantize_onnx(path: Path, target: Path) -> None:
    """Write a file whose matrix products compute in int8, with activations rounded batch by batch.

    How much it loses must be measured on one's own data; `benchmarks/inference.py` does so on the phantoms.

    Raises:
        ImportError: onnxruntime is missing.
        ValueError: there is no such file.
    """
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ImportError(f"{_INSTALL}: {error}") from error
    if not path.is_file():
        raise ValueError(f"{path} does not exist: export the model first.")
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        quantize_dynamic(
            path, temporary, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"]
        )
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


# Towers ----------------------------------------------------------------------------------------------------------


class _ConceptCLIPVision(nn.Module):
    def __init__(self, model: ConceptCLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(pixel_values=pixel_values, return_logits=False)
        return tuple(value for value in (outputs.image_embeds, outputs.patch_embeds) if value is not None)


class _ConceptCLIPText(nn.Module):
    """Texts, and in the second stage their tokens in the space of patches, not pooled: a concept is the mean of its."""

    def __init__(self, model: ConceptCLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model.get_text_features(input_ids, attention_mask)
        text_embeds = F.normalize(outputs.pooler_output, dim=-1)
        if not self.model.config.use_patch_concept_alignment:
            return (text_embeds,)
        return text_embeds, self.model.token_projection(outputs.last_hidden_state)


class _FVLMVision(nn.Module):
    """fVLM's vision tower with its pooling; the patches of each anatomy are found by operations that ONNX has."""

    def __init__(self, model: FVLMModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, anatomy_mask: Tensor) -> tuple[Tensor, ...]:
        patches = anatomy_mask.to(torch.int32)
        for dim, size in zip((1, 3, 5), _vision_config(self.model).patch_size_dhw, strict=True):
            patches = patches.unflatten(dim, (-1, size))  # (batch, d, patch_d, h, patch_h, w, patch_w)
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)  # (batch, num_patches, voxels)
        ids = range(1, self.model.config.num_anatomies + 1)
        token_mask = torch.stack([(patches == number).to(torch.int32).amax(dim=-1) for number in ids], dim=1) > 0
        outputs = self.model(pixel_values=pixel_values, anatomy_token_mask=token_mask, return_logits=False)
        return outputs.anatomy_embeds, outputs.anatomy_present


class _FVLMText(nn.Module):
    def __init__(self, model: FVLMModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return (F.normalize(self.model.get_text_features(input_ids, attention_mask).pooler_output, dim=-1),)


def _fvlm_vision_tower(model: FVLMModel, size_dhw: Sequence[int], generator: torch.Generator) -> Tower:
    depth, height, width = size_dhw
    patch_size_dhw = _vision_config(model).patch_size_dhw
    if any(size < 1 or size % patch for size, patch in zip(size_dhw, patch_size_dhw, strict=True)):
        raise ValueError(f"size_dhw {tuple(size_dhw)} must be whole patches of {tuple(patch_size_dhw)} voxels.")
    pixels = torch.rand(2, _vision_config(model).num_channels, depth, height, width, generator=generator)
    mask = torch.zeros(2, depth, height, width, dtype=torch.uint8)
    for number in range(model.config.num_anatomies):  # slabs, the first anatomy missing from the second volume
        mask[number == 0 :, :, number % height :: model.config.num_anatomies] = number + 1
    mask[1][mask[1] == 1] = 0
    return Tower(
        "vision_model",
        _FVLMVision(model),
        {"pixel_values": pixels, "anatomy_mask": mask},
        {"pixel_values": {0: "batch"}, "anatomy_mask": {0: "batch"}},
        ("anatomy_embeds", "anatomy_present"),
    )


def _vision_config(model: FVLMModel) -> Any:
    return model.config.vision_config


def _text_tower(
    module: nn.Module, model: ConceptCLIPModel | FVLMModel, outputs: tuple[str, ...], generator: torch.Generator
) -> Tower:
    config = model.text_model.config
    ids = torch.randint(1, config.vocab_size, (2, min(9, config.max_position_embeddings - 1)), generator=generator)
    attention_mask = torch.ones_like(ids)
    attention_mask[1, -3:] = 0
    axes = {0: "batch", 1: "length"}
    return Tower(
        "text_model",
        module,
        {"input_ids": ids, "attention_mask": attention_mask},
        {"input_ids": axes, "attention_mask": axes},
        outputs,
    )


def _export(tower: Tower, path: Path) -> None:
    sizes = {name: torch.export.Dim.DYNAMIC for axes in tower.dynamic_axes.values() for name in axes.values()}
    dynamic_shapes = {
        name: {axis: sizes[size] for axis, size in axes.items()} for name, axes in tower.dynamic_axes.items()
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            tower.module,
            tuple(tower.inputs.values()),
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            input_names=list(tower.inputs),
            output_names=list(tower.outputs),
            verbose=False,
        )
        assert program is not None
        program.save(path)


def _resized(value: Tensor, axes: Mapping[int, str], batch: int) -> Tensor:
    """The example repeated to another batch size, and to a text one token longer."""
    value = torch.cat([value, value])[1 : 1 + batch]
    if "length" in axes.values():
        value = torch.cat([value[:, :1], value], dim=1)
    return value


def _facts(
    model: ConceptCLIPModel | FVLMModel, size_dhw: Sequence[int] | None, differences: Mapping[str, float]
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "model_type": model.config.model_type,
        "logit_scale": float(model.logit_scale.detach().exp()),
        "logit_bias": 0.0,
        "largest_difference": dict(differences),
        "torch": str(torch.__version__),
    }
    if isinstance(model, FVLMModel):
        size = size_dhw or _vision_config(model).image_size_dhw
        return facts | {"anatomies": list(model.config.anatomies), "size_dhw": list(size)}
    facts["logit_bias"] = float(model.logit_bias.detach())
    facts["image_size"] = model.config.vision_config.image_size
    if model.config.use_patch_concept_alignment:
        facts["concept_logit_scale"] = float(model.concept_logit_scale.detach().exp())
        facts["concept_logit_bias"] = float(model.concept_logit_bias.detach())
    return facts
