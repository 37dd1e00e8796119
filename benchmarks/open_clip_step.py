"""open_clip's own training step at the size of ConceptCLIP's first stage, where open_clip is installed."""

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from step_models import Batch
from torch import Tensor

from medclip_hf.modeling.conceptclip import ConceptCLIPConfig


def why_not() -> str | None:
    """Why it cannot be measured here; None where it can."""
    missing = [name for name in ("open_clip", "timm", "torchvision") if find_spec(name) is None]
    return f"not measured: {', '.join(missing)} not installed (pip install open_clip_torch)" if missing else None


def open_clip_model(config: ConceptCLIPConfig, text_limit: int, size: str) -> Any:
    """Random weights of open_clip's SigLIP with a text tower of BERT's size.

    BERT itself would be fetched from the Hub by open_clip; its own transformer of the same width, depth and vocabulary
    costs the same.
    """
    from open_clip import CustomTextCLIP

    vision, text = config.vision_config, config.text_config
    image: dict[str, Any] = {"image_size": vision.image_size}
    if size == "published":
        image |= {"timm_model_name": "vit_so400m_patch14_siglip_384", "timm_pool": "map", "timm_proj": "none"}
    else:
        image |= {"patch_size": vision.patch_size, "width": vision.hidden_size, "layers": vision.num_hidden_layers}
        image |= {"head_width": vision.hidden_size // vision.num_attention_heads}
    texts = {
        "context_length": text_limit,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        "mlp_ratio": text.intermediate_size / text.hidden_size,
        "no_causal_mask": True,
        "pool_type": "last",
    }
    torch.manual_seed(0)
    return CustomTextCLIP(
        vision.hidden_size, image, texts, init_logit_scale=math.log(10), init_logit_bias=-10.0, output_dict=True
    ).train()


def open_clip_step(
    model: Any, batch: Batch, *, device: torch.device, recompute: bool
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """One optimiser step as open_clip trains in bf16 with its SigLIP loss, and the loss with its gradients alone."""
    from open_clip.loss import SigLipLoss

    model.to(device)
    model.set_grad_checkpointing(recompute)
    if device.type == "cuda":
        batch = {name: batch[name].pin_memory() for name in ("pixel_values", "input_ids")}
    compare = SigLipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def embed() -> dict[str, Tensor]:
        images = batch["pixel_values"].to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            return model(images, batch["input_ids"].to(device, non_blocking=True))

    def step() -> Tensor:
        found = embed()
        with torch.autocast(device.type, torch.bfloat16):
            loss = compare(**found)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss.detach()

    leaves: dict[str, Tensor] = {}

    def losses() -> Tensor:
        if not leaves:
            with torch.no_grad():
                leaves.update({name: value.detach().requires_grad_() for name, value in embed().items()})
        with torch.autocast(device.type, torch.bfloat16):
            loss = compare(**leaves)
        loss.backward()
        return loss.detach()

    return step, losses
