"""Models, batches, procedures and measures that the benchmarks of whole training steps share.

"published" restates what the releases do, on the package's own weights and inputs: full checkpointing, every text
padded to its limit, similarities of all patches with all concepts kept for the backward pass (ConceptCLIP), float32 and
texts of 384 tokens (fVLM), AdamW without a fused kernel, pixels sent as float32.
"""

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import Tensor
from torch.nn import functional as F

from medclip_hf.modeling.conceptclip import ConceptCLIPConfig, ConceptCLIPModel
from medclip_hf.modeling.fvlm import FVLMConfig, FVLMModel
from medclip_hf.processing.pixels import SCALING
from medclip_hf.training.acceleration import compile_blocks, recompute_blocks
from medclip_hf.training.gradients import backward
from medclip_hf.training.objectives import ConceptCLIPObjective

Batch = dict[str, Any]
SIZES = ("published", "small", "tiny")
TEXT_LIMIT = {"conceptclip": 77, "fvlm": 384}
TYPICAL_TOKENS = (12, 70)  # of a caption or of an anatomy's text, drawn evenly in between


def conceptclip_model(size: str, *, stage: int = 2, dropout: float = 0.1) -> ConceptCLIPModel:
    """Random weights; "published" is SO400M at 384 pixels with BERT base."""
    text: dict[str, Any] = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    vision: dict[str, Any] | None = None  # an empty one would mean SigLIP base at 224 pixels
    if size != "published":
        width, layers, side = (192, 6, 112) if size == "small" else (32, 2, 32)
        text |= {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4}
        text |= {"num_hidden_layers": layers, "vocab_size": 2000}
        vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4}
        vision |= {"num_hidden_layers": layers, "image_size": side, "patch_size": 16}
    torch.manual_seed(0)
    config = ConceptCLIPConfig(text_config=text, vision_config=vision, use_patch_concept_alignment=stage == 2)
    return ConceptCLIPModel(config).train()


def conceptclip_batch(
    config: ConceptCLIPConfig, rows: int, *, concepts: int = 8, tokens: tuple[int, int] = TYPICAL_TOKENS
) -> Batch:
    """Random pixels, and captions of random lengths with the longest first, as the collator gives them."""
    generator = torch.Generator().manual_seed(1)
    side, vocabulary = config.vision_config.image_size, config.text_config.vocab_size
    lengths = torch.randint(tokens[0], tokens[1] + 1, (rows,), generator=generator).sort(descending=True).values
    mask = (torch.arange(int(lengths[0])) < lengths[:, None]).long()
    starts = torch.randint(1, tokens[0] - 3, (rows, concepts), generator=generator)
    return {
        "pixel_values": torch.rand(rows, 3, side, side, generator=generator),
        "input_ids": torch.randint(5, vocabulary, mask.shape, generator=generator) * mask,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(mask),
        "concept_token_spans": torch.stack([starts, starts + 2], dim=-1),
        "concept_mask": torch.ones(rows, concepts, dtype=torch.bool),
        "concept_ids": torch.randint(100_000, (rows, concepts), generator=generator),
        "text_lengths": lengths.tolist(),
        "row_ids": [str(row) for row in range(rows)],
        "set_aside": [],
    }


def fvlm_model(size: str, *, dropout: float = 0.1, anatomies: int | None = None) -> FVLMModel:
    """Random weights; "published" is ViT-B on crops of 112 × 256 × 352 with BERT base."""
    text: dict[str, Any] = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    vision: dict[str, Any] = {"hidden_dropout": dropout, "attention_dropout": dropout}
    if size != "published":
        width, layers, crop = (192, 4, (64, 128, 192)) if size == "small" else (32, 2, (32, 64, 64))
        text |= {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4}
        text |= {"num_hidden_layers": layers, "vocab_size": 2000}
        vision |= {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4}
        vision |= {"num_hidden_layers": layers, "image_size_dhw": crop}
    torch.manual_seed(0)
    others: dict[str, Any] = {"pooling_dropout": dropout}
    if size != "published":
        others["feature_layers"] = (0, 1)
    if anatomies is not None:
        others["anatomies"] = [f"anatomy {number}" for number in range(anatomies)]
    return FVLMModel(FVLMConfig(text_config=text, vision_config=vision, **others)).train()


def fvlm_batch(config: FVLMConfig, scans: int, *, tokens: tuple[int, int] = TYPICAL_TOKENS) -> Batch:
    """Random voxels, boxes as anatomies, and a text of its own for every anatomy of every scan, the longest first."""
    generator = torch.Generator().manual_seed(1)
    size_dhw, anatomies = tuple(config.vision_config.image_size_dhw), config.num_anatomies
    num_texts, vocabulary = scans * anatomies, config.text_config.vocab_size
    lengths = torch.randint(tokens[0], tokens[1] + 1, (num_texts,), generator=generator).sort(descending=True).values
    token_mask = (torch.arange(int(lengths[0])) < lengths[:, None]).long()
    mask = torch.zeros(scans, *size_dhw, dtype=torch.uint8)
    edges = torch.linspace(8, size_dhw[2] - 8, anatomies + 1).int().tolist()
    for anatomy in range(anatomies):
        mask[:, 4:-4, 8:-8, edges[anatomy] : edges[anatomy + 1]] = anatomy + 1
    flags = torch.rand(scans, anatomies, generator=generator) < 0.5
    return {
        "pixel_values": torch.rand(scans, 1, *size_dhw, generator=generator),
        "anatomy_mask": mask,
        "input_ids": torch.randint(5, vocabulary, token_mask.shape, generator=generator) * token_mask,
        "attention_mask": token_mask,
        "text_lengths": lengths.tolist(),
        "text_ids": torch.arange(num_texts),
        "text_index": torch.randperm(num_texts, generator=generator).view(scans, anatomies),
        "is_complete": torch.ones(scans, anatomies, dtype=torch.bool),
        "is_abnormal": flags,
        "row_ids": [str(row) for row in range(scans)],
        "set_aside": [],
    }


def padded(batch: Batch, limit: int) -> Batch:
    """The batch with every text padded to the limit and its lengths unknown, as the releases have it."""
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch]
    wide = {name: F.pad(batch[name], (0, limit - batch[name].shape[1])) for name in names}
    return {name: values for name, values in (batch | wide).items() if name != "text_lengths"}


def whole_pixels(batch: Batch, scale: float, dtype: torch.dtype) -> Batch:
    """The batch with pixels from 0 to `scale` in whole numbers, as the collators send them; the model scales them."""
    pixel_values = batch["pixel_values"]
    rows, channels = pixel_values.shape[:2]
    scaling = torch.tensor([0.0, scale]).view(1, 2, 1).repeat(rows, 1, channels)
    return batch | {"pixel_values": (scale * pixel_values).to(dtype), SCALING: scaling}


class PlainConceptCLIPObjective(ConceptCLIPObjective):
    """The losses as one would write them down: all logits at once, all similarities kept.

    Args:
        bf16: under autocast, as the release has them.
    """

    def __init__(self, *, bf16: bool = False) -> None:
        super().__init__()
        self.bf16 = bf16

    def compare(self, embeddings: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """IT-Align, and PC-Align where there are patches; one process."""
        device_type = embeddings["image_embeds"].device.type
        with torch.autocast(device_type, torch.bfloat16) if self.bf16 else nullcontext():
            return self._compare(embeddings, batch)

    def _compare(self, embeddings: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        images, texts = embeddings["image_embeds"], embeddings["text_embeds"]
        logits = embeddings["logit_scale"].mean() * images @ texts.T + embeddings["logit_bias"].mean()
        signs = 2 * torch.eye(len(images), device=logits.device) - 1
        loss = F.softplus(-signs * logits).sum() / len(texts)
        if "patch_embeds" in embeddings:
            concepts, usable = embeddings["concept_embeds"], batch["concept_mask"]
            to_image = usable.nonzero()[:, 0]
            patches = embeddings["patch_embeds"]
            similarity = (patches @ concepts[usable].to(patches.dtype).T).amax(dim=1)
            logits = embeddings["concept_logit_scale"].mean() * similarity + embeddings["concept_logit_bias"].mean()
            signs = torch.where(torch.arange(len(images), device=logits.device)[:, None] == to_image, 1.0, -1.0)
            loss = loss + self.patch_concept_loss_weight * F.softplus(-signs * logits).sum() / len(to_image)
        return {"loss": loss}


def make_step(
    model: torch.nn.Module,
    objective: Any,
    batch: Batch,
    *,
    device: torch.device,
    fused: bool = True,
    bf16: bool = False,
    outputs_in_float32: bool = True,
    micro_batches: int = 1,
) -> Callable[[], Tensor]:
    """One whole optimiser step as a function: transfer, forward, loss, backward, clipping, update.

    Args:
        model: computes under autocast from here on, with `bf16`.
        objective: of the training loop.
        batch: on the CPU; from pinned memory where the device is a GPU.
        device: of the step.
        fused: AdamW in one kernel.
        bf16: as the loop has it: the model alone under autocast, its embeddings in float32.
        outputs_in_float32: False leaves the embeddings as autocast gives them.
        micro_batches: see `gradients.backward`.
    """
    model.to(device)
    if bf16:
        forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
        model.forward = convert_outputs_to_fp32(forward) if outputs_in_float32 else forward
    if device.type == "cuda":
        batch = {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in batch.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused)
    accelerator = Accelerator(cpu=device.type == "cpu")

    def step() -> Tensor:
        here = _moved(batch, device)
        loss = backward(model, objective, here, micro_batches, accelerator)["loss"]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def make_losses(model: torch.nn.Module, objective: Any, batch: Batch, *, device: torch.device) -> Callable[[], Tensor]:
    """The losses of a step of `make_step` with the gradients of the embeddings, alone, as a function."""
    leaves: dict[str, Tensor] = {}
    here: Batch = {}

    def losses() -> Tensor:
        if not leaves:
            here.update(_moved(batch, device))
            with torch.no_grad():
                found = objective.embed(model, here)
            leaves.update({name: value.requires_grad_(value.is_floating_point()) for name, value in found.items()})
        loss = objective.compare(leaves, here)["loss"]
        loss.backward()
        return loss.detach()

    return losses


def apply_blocks(model: torch.nn.Module, *, keep: float | None, compiled: bool) -> None:
    """Recompute all blocks but a share `keep` of them (None: none recomputes), and compile them."""
    if keep is not None:
        recompute_blocks(model, keep)
    if compiled:
        compile_blocks(model)


def seconds_of(step: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
    """Of every repeat, after two steps to warm up."""
    times = []
    for repeat in range(repeats + 2):
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        if repeat > 1:
            times.append(time.perf_counter() - start)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """The most that the device held so far; on a CPU the whole process, libraries and all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_own_process(script: str, request: dict[str, Any]) -> dict[str, Any]:
    """What `script --one REQUEST` prints as its last line, JSON; {"error": ...} where it fails, of memory say."""
    command = [sys.executable, script, "--one", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        # Libraries may still have something to say after the error.
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)] or lines
        return {"error": errors[-1][:160] if errors else f"ended by signal {-done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


# Floating-point operations -------------------------------------------------------------------------------------------


def transformer_flops(tokens: int, width: int, inner: int, layers: int) -> float:
    """Of one sequence forwards: projections, attention and MLP; a multiplication and an addition are two."""
    return layers * (2 * tokens * (4 * width * width + 2 * width * inner) + 4 * tokens * tokens * width)


def conceptclip_flops(config: ConceptCLIPConfig, batch: Batch) -> float:
    """Of the towers and heads in one step: three times forwards. Padding and recomputation are no useful work."""
    vision, text = config.vision_config, config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    image = transformer_flops(patches, vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers)
    image += 2 * patches * 3 * vision.patch_size**2 * vision.hidden_size
    image += 2 * patches * 2 * vision.hidden_size**2  # keys and values of the pooling head
    texts = sum(
        transformer_flops(length, text.hidden_size, text.intermediate_size, text.num_hidden_layers)
        for length in batch["attention_mask"].sum(1).tolist()
    )
    if config.use_patch_concept_alignment:
        image += 2 * patches * 2 * vision.hidden_size**2
    return 3 * (len(batch["pixel_values"]) * image + texts)


def fvlm_flops(config: FVLMConfig, batch: Batch) -> float:
    """Of the towers in one step: three times forwards; padding and recomputation do not count.

    Pooling is left out: with its queries carried back to the tokens it is a thousandth of the tower.
    """
    vision, text = config.vision_config, config.text_config
    patches = 1
    for size, patch in zip(vision.image_size_dhw, vision.patch_size_dhw, strict=True):
        patches *= size // patch
    scan = transformer_flops(patches, vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers)
    voxels = 2 * patches * vision.hidden_size * torch.tensor(vision.patch_size_dhw).prod().item()
    texts = sum(
        transformer_flops(length, text.hidden_size, text.intermediate_size, text.num_hidden_layers)
        for length in batch["attention_mask"].sum(1).tolist()
    )
    return 3 * (len(batch["pixel_values"]) * (scan + voxels) + texts)
