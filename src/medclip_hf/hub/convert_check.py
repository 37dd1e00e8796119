"""A numeric self-check of a converted folder: what the model answers to inputs that anyone can make again."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from medclip_hf.modeling.conceptclip import ConceptCLIPModel
from medclip_hf.modeling.fvlm import FVLMModel

SEED = 0
_NUM_IMAGES, _NUM_TEXTS, _NUM_TOKENS = 2, 3, 12
_OUTPUTS = (
    "image_embeds",
    "text_embeds",
    "patch_embeds",
    "concept_embeds",
    "anatomy_embeds",
    "logits_per_image",
    "concept_logits",
    "logits_per_anatomy",
)
_STATISTICS = ("mean", "std", "min", "max", "first")
# Between machines: other kernels and thread counts sum in another order.
_TOLERANCE = 1e-3


def check_folder(folder: str | Path) -> dict[str, Any]:
    """Statistics and SHA-256 of the outputs for seeded inputs, of the model loaded afresh from a folder.

    The model is loaded twice; both must answer with the same bits. The hash is that of this machine, the statistics
    hold on any (see `compare_checks`).

    Raises:
        ValueError: loading left a weight out or made one up, outputs are not finite, or the two loads disagree.
    """
    first, second = (_run(_load(folder)) for _ in range(2))
    outputs = {name: _statistics(name, value) for name, value in first.items()}
    if differing := [name for name, value in first.items() if not torch.equal(value, second[name])]:
        raise ValueError(f"the model answers otherwise when it is loaded again: {differing} differ.")
    return {
        "seed": SEED,
        "torch": torch.__version__,
        "outputs": outputs,
        "loaded_again": "equal bits",
    }


def compare_checks(found: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """What differs between a check and a recorded one by more than rounding; empty where they agree.

    Raises:
        ValueError: the record is none of `check_folder`.
    """
    problems = []
    kept = recorded.get("outputs")
    if not isinstance(kept, dict) or not all(
        isinstance(values, dict) and {"shape", *_STATISTICS} <= values.keys() for values in kept.values()
    ):
        raise ValueError("the record holds no outputs with their statistics. Convert again.")
    for name, values in kept.items():
        own = found["outputs"].get(name)
        if own is None or own["shape"] != values["shape"]:
            problems.append(f"{name} has shape {own and own['shape']} instead of {values['shape']}")
            continue
        for statistic in _STATISTICS:
            if abs(own[statistic] - values[statistic]) > _TOLERANCE * max(1.0, abs(values[statistic])):
                problems.append(f"{statistic} of {name} is {own[statistic]:.6g} instead of {values[statistic]:.6g}")
    return problems


def _load(folder: str | Path) -> PreTrainedModel:
    loaded: Any = AutoModel.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    model, info = loaded
    gaps = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if gaps:
        raise ValueError(f"the folder does not load without a gap: {gaps}")
    return model.eval()


def _run(model: PreTrainedModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        outputs = model(**_inputs(model, generator))
    return {name: outputs[name].float() for name in _OUTPUTS if outputs.get(name) is not None}


def _inputs(model: PreTrainedModel, generator: torch.Generator) -> dict[str, Tensor]:
    text = model.config.text_config
    num_tokens = min(_NUM_TOKENS, text.max_position_embeddings)
    lowest = min(5, text.vocab_size - 1)  # behind the special tokens
    ids = torch.randint(lowest, text.vocab_size, (_NUM_TEXTS, num_tokens), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    vision = model.config.vision_config
    if isinstance(model, ConceptCLIPModel):
        size = (_NUM_IMAGES, vision.num_channels, vision.image_size, vision.image_size)
        inputs["pixel_values"] = torch.randn(size, generator=generator)
        if model.config.use_patch_concept_alignment:
            inputs["concept_token_spans"] = torch.tensor([[[1, 3], [2, num_tokens]]]).repeat(_NUM_TEXTS, 1, 1)
        return inputs
    if not isinstance(model, FVLMModel):
        raise ValueError(f"there is no self-check for {type(model).__name__}.")
    size_dhw = tuple(vision.image_size_dhw)
    inputs["pixel_values"] = torch.rand((1, 1, *size_dhw), generator=generator)
    depths = torch.arange(size_dhw[0]) * model.config.num_anatomies // size_dhw[0] + 1  # one slab an anatomy
    inputs["anatomy_mask"] = depths[None, :, None, None].expand(1, *size_dhw).to(torch.uint8)
    return inputs


def _statistics(name: str, value: Tensor) -> dict[str, Any]:
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} holds values that are not finite: the weights are damaged.")
    return {
        "shape": list(value.shape),
        "mean": value.double().mean().item(),
        "std": value.double().std().item(),
        "min": value.min().item(),
        "max": value.max().item(),
        "first": value.flatten()[0].item(),
        "sha256": hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest(),
    }
