"""Volumes/s, MFU and peak memory of one fVLM training step at the published size, against the published procedure.

    python benchmarks/gpu_fvlm.py --batches 4 8 14
    python benchmarks/gpu_fvlm.py --tiny --batches 2 --repeats 2      # on a CPU: tries the script

ViT-B on crops of 112 × 256 × 352 and BERT base, one process, data at hand, a text of its own for every anatomy.
"published" is float32 (with TensorFloat-32 products), every text padded to 384 tokens, AdamW without a fused kernel;
its masks and pooling are the package's, so what those save is left out here (benchmarks/fvlm_step.py has it). The
others are the package's step: bf16 autocast, texts padded to the longest, fused AdamW, recomputed or compiled blocks as
named. MFU counts useful operations (three times forwards, no padding, no recomputation) against the dense bf16 peak,
for float32 too; "losses" is the share of the step that they take alone.
"""

import argparse

import torch
from gpu_steps import Prepared, Request, add_arguments, device_here, measure
from step_models import (
    TEXT_LIMIT,
    apply_blocks,
    fvlm_batch,
    fvlm_flops,
    fvlm_model,
    make_losses,
    make_step,
    padded,
    whole_pixels,
)

from medclip_hf.training.objectives import FVLMObjective

VARIANTS: dict[str, Request] = {
    "published": {"published": True, "keep": None},
    "ours, float32": {"keep": None, "bf16": False},
    "ours, bf16": {"keep": None},
    "ours, bf16, half recomputed": {"keep": 0.5},
    "ours, bf16, compiled": {"keep": None, "compiled": True},
}


def prepare(request: Request) -> Prepared:
    """The step of one variant."""
    published = request.get("published", False)
    device = device_here()
    with device:
        model = fvlm_model("tiny" if request["tiny"] else "published")
    batch = fvlm_batch(model.config, request["rows"])
    flops = fvlm_flops(model.config, batch)
    apply_blocks(model.to(device), keep=request["keep"], compiled=request.get("compiled", False))
    batch = padded(batch, TEXT_LIMIT["fvlm"]) if published else whole_pixels(batch, 1000, torch.int16)
    objective, bf16 = FVLMObjective(model.config.anatomies), request.get("bf16", not published)
    micro = 1 if published else request["micro_batches"]
    step = make_step(model, objective, batch, device=device, fused=not published, bf16=bf16, micro_batches=micro)
    return Prepared(step, make_losses(model, objective, batch, device=device), request["rows"], flops)


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, [4, 8, 14])
    measure(__file__, parser.parse_args(), VARIANTS, prepare)


if __name__ == "__main__":
    main()
