"""The best patch of every image for every concept in one Triton kernel: no similarity leaves the chip but the best.

Triton is optional; without it, or on other devices, `loss_conceptclip.py` searches chunk by chunk with the same result.
"""

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

SEARCHABLE = (torch.float32, torch.bfloat16, torch.float16)
PRODUCTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
BLOCK_PATCHES, BLOCK_CONCEPTS = 64, 64
BLOCK_WIDTH = {"fp32": 32, "bf16": 64, "fp16": 64}  # 64 of float32 would not fit into the registers


def can_search(patch_embeds: Tensor) -> bool:
    """Whether the kernel runs where these patches are; on a CPU only in Triton's interpreter, which is for tests."""
    runs = patch_embeds.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return triton is not None and runs and patch_embeds.dtype in SEARCHABLE


def search_best_patches(
    patch_embeds: Tensor, concept_embeds: Tensor, product_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Each image's best similarity to each concept (b, N) float32, and the patch that has it (b, N) int64.

    Patches are compared in `product_dtype`, sums kept in float32; the similarity of the best one is then computed in
    float32. Float32 is multiplied on tensor cores: as three TF32 products, whose error is near float32's own, or as one
    where `torch.set_float32_matmul_precision` allows it. Of equal patches the first wins. Memory: the (b, N) results,
    against (b, P, N) similarities.

    Args:
        patch_embeds (b, P, D): at least one patch.
        concept_embeds (N, D): what is searched for.
        product_dtype: float32, bfloat16 or float16.
    """
    num_images, num_patches, width = patch_embeds.shape
    num_concepts = len(concept_embeds)
    values = patch_embeds.new_empty((num_images, num_concepts), dtype=torch.float32)
    indices = patch_embeds.new_empty((num_images, num_concepts), dtype=torch.int64)
    if values.numel() == 0:
        return values, indices
    product = PRODUCTS[product_dtype]
    num_blocks = triton.cdiv(num_concepts, BLOCK_CONCEPTS)
    with torch.cuda.device_of(patch_embeds):  # Triton launches on the current device, whoever owns the tensors
        _search[(num_images * num_blocks,)](
            patch_embeds.contiguous(),
            concept_embeds.contiguous(),
            values,
            indices,
            num_patches,
            num_concepts,
            width,
            num_blocks,
            PRODUCT=product,
            PRECISION="tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32",
            BLOCK_P=BLOCK_PATCHES,
            BLOCK_N=BLOCK_CONCEPTS,
            BLOCK_D=BLOCK_WIDTH[product],
        )
    return values, indices


if triton is not None:

    @triton.jit
    def _lowered(tile, PRODUCT: tl.constexpr):  # type: ignore[no-untyped-def]
        if PRODUCT == "bf16":
            return tile.to(tl.bfloat16)
        elif PRODUCT == "fp16":
            return tile.to(tl.float16)
        else:
            return tile.to(tl.float32)

    @triton.jit
    def _search(  # type: ignore[no-untyped-def]
        patches,
        concepts,
        values,
        indices,
        num_patches,
        num_concepts,
        width,
        num_blocks,
        PRODUCT: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """One image against a block of concepts: all its patches go by, the best of each concept stays."""
        # Programs that run at the same time share an image: its patches are then read from memory about once.
        image = (tl.program_id(0) // num_blocks).to(tl.int64)
        concept = (tl.program_id(0) % num_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_concept = concept < num_concepts
        own_patches = patches + image * num_patches * width
        best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        where = tl.zeros((BLOCK_N,), tl.int64)
        for first in range(0, num_patches, BLOCK_P):
            patch = first + tl.arange(0, BLOCK_P)
            is_patch = patch < num_patches
            similarity = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
            for start in range(0, width, BLOCK_D):
                column = start + tl.arange(0, BLOCK_D)
                inside = column < width
                some_patches = tl.load(
                    own_patches + patch[:, None] * width + column[None, :],
                    mask=is_patch[:, None] & inside[None, :],
                    other=0.0,
                )
                some_concepts = tl.load(
                    concepts + concept[None, :] * width + column[:, None],
                    mask=is_concept[None, :] & inside[:, None],
                    other=0.0,
                )
                similarity = tl.dot(
                    _lowered(some_patches, PRODUCT),
                    _lowered(some_concepts, PRODUCT),
                    similarity,
                    input_precision=PRECISION,
                )
            similarity = tl.where(is_patch[:, None], similarity, float("-inf"))
            top = tl.max(similarity, axis=0)
            is_better = top > best
            where = tl.where(is_better, first + tl.argmax(similarity, axis=0), where)
            best = tl.where(is_better, top, best)
        exact = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, width, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            mask = is_concept[:, None] & (column < width)[None, :]
            best_rows = tl.load(own_patches + where[:, None] * width + column[None, :], mask=mask, other=0.0)
            concept_rows = tl.load(concepts + concept[:, None] * width + column[None, :], mask=mask, other=0.0)
            exact += tl.sum(best_rows.to(tl.float32) * concept_rows.to(tl.float32), axis=1)
        place = image * num_concepts + concept
        tl.store(values + place, exact, mask=is_concept)
        tl.store(indices + place, where, mask=is_concept)
