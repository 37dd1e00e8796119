"""Images/s, MFU and peak memory of a ConceptCLIP training step at the published size, against the published procedure.

    python benchmarks/gpu_conceptclip.py --stage 1 --batches 64 128 256
    python benchmarks/gpu_conceptclip.py --stage 2 --batches 64 128 256
    python benchmarks/gpu_conceptclip.py --stage 2 --tiny --batches 8 --repeats 2      # on a CPU: tries the script

SO400M at 384 pixels and BERT base, bf16 autocast over float32 weights, one process, data at hand in pinned memory.
"published" is full checkpointing, float32 pixels, captions padded to 77 tokens, losses under autocast too, all
similarities of PC-Align kept, AdamW without a fused kernel; its image tower runs through the same attention (SDPA) as
ours, as timm's does. The others are the package's step: pixels as bytes, fused AdamW, captions padded to the longest,
PC-Align by blocks (or its Triton kernel), a share of the blocks that keeps activations, and compiled blocks.
"open_clip" is that package's own step in stage 1, where it is installed: its SigLIP loss and a text tower of BERT's
size. MFU counts the useful operations of towers and heads (three times forwards, no padding, no recomputation) against
the dense bf16 peak; "losses" is the share of the step that they take alone. A variant that does not fit is said to,
with the device's words.
"""

import argparse

import torch
from gpu_steps import NotMeasured, Prepared, Request, add_arguments, device_here, measure
from open_clip_step import open_clip_model, open_clip_step, why_not
from step_models import (
    TEXT_LIMIT,
    PlainConceptCLIPObjective,
    apply_blocks,
    conceptclip_batch,
    conceptclip_flops,
    conceptclip_model,
    make_losses,
    make_step,
    padded,
    whole_pixels,
)

from medclip_hf.training.objectives import ConceptCLIPObjective

VARIANTS: dict[str, Request] = {
    "published": {"published": True, "keep": 0.0},
    "open_clip, all recomputed": {"open_clip": True, "keep": 0.0},
    "open_clip, none recomputed": {"open_clip": True, "keep": None},
    "ours, all recomputed": {"keep": 0.0},
    "ours, half recomputed": {"keep": 0.5},
    "ours, none recomputed": {"keep": None},
    "ours, half, compiled": {"keep": 0.5, "compiled": True},
    "ours, none, compiled": {"keep": None, "compiled": True},
}


def prepare(request: Request) -> Prepared:
    """The step of one variant."""
    size, device, published = "tiny" if request["tiny"] else "published", device_here(), request.get("published", False)
    with device:  # half a billion random numbers take a CPU core 20 seconds
        model = conceptclip_model(size, stage=request["stage"])
    batch = conceptclip_batch(model.config, request["rows"], concepts=request["concepts"])
    flops = conceptclip_flops(model.config, batch)
    if request.get("open_clip"):
        if reason := "it has no second stage" if request["stage"] == 2 else why_not():
            raise NotMeasured(reason)
        limit = TEXT_LIMIT["conceptclip"]
        theirs = open_clip_model(model.config, limit, size)
        step, losses = open_clip_step(theirs, padded(batch, limit), device=device, recompute=request["keep"] == 0.0)
        return Prepared(step, losses, request["rows"], flops)
    apply_blocks(model.to(device), keep=request["keep"], compiled=request.get("compiled", False))
    batch = padded(batch, TEXT_LIMIT["conceptclip"]) if published else whole_pixels(batch, 255, torch.uint8)
    ours = ConceptCLIPObjective(search_dtype=torch.bfloat16)
    objective = PlainConceptCLIPObjective(bf16=True) if published else ours
    step = make_step(
        model,
        objective,
        batch,
        device=device,
        fused=not published,
        bf16=True,
        outputs_in_float32=not published,
        micro_batches=1 if published else request["micro_batches"],
    )
    return Prepared(step, make_losses(model, objective, batch, device=device), request["rows"], flops)


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2)
    parser.add_argument("--concepts", type=int, default=8, help="of each caption, in stage 2")
    add_arguments(parser, [64, 128, 256])
    measure(__file__, parser.parse_args(), VARIANTS, prepare)


if __name__ == "__main__":
    main()
