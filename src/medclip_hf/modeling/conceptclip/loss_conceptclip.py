"""ConceptCLIP's two pre-training losses as pure functions of tensors: image-text and patch-concept alignment.

Rows are local images, columns are the texts or concepts of the global batch. Every process adds up its own rows and
divides by the global number of columns: the sum over processes is the loss of one process that holds the whole batch.
No function keeps more than one chunk of its similarities; two constants bound a chunk.
"""

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .patch_search_triton import can_search, search_best_patches

# On a CPU a chunk of similarities should stay in cache, yet be so large that threads seldom wait for each other between
# chunks; on an accelerator it should be worth its kernel launches.
CPU_CHUNK_BYTES = 4 * 2**20
ACCELERATOR_CHUNK_BYTES = 128 * 2**20


def image_text_alignment_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    first_image_index: int = 0,
    captioned_images: slice | None = None,
    num_texts: int | None = None,
) -> Tensor:
    """Pairwise sigmoid loss of these images against all texts of the global batch (IT-Align), a float32 scalar.

        L = 1/B  sum_ij  softplus(-z_ij (s <v_i, t_j> + b)),    z_ij = 1 where text j is image i's caption, else -1

    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023, eq. 1. The gradients are worked out chunk by
    chunk beside the value, so no (b, B) tensor outlives its chunk; a second derivative does not exist.

    Args:
        image_embeds (b, D): L2-normalised; the images of this process.
        text_embeds (B, D): L2-normalised; the texts of all processes, or a block of them.
        logit_scale (1,): s, already exponentiated.
        logit_bias (1,): b.
        first_image_index: place among `text_embeds` of the first caption of `captioned_images`, whose captions follow
            each other; with the texts of all processes, the place of `image_embeds[0]` among the global images.
        captioned_images: those images whose captions are among `text_embeds`; None: all. The other images have only
            negatives here.
        num_texts: B, where `text_embeds` is but a block of them: the losses of all blocks add up to the whole.

    Raises:
        ValueError: where the shapes do not fit each other.
    """
    _check_embeds("image_embeds", image_embeds, "(b, D)")
    _check_embeds("text_embeds", text_embeds, "(B, D)")
    _check_same_width(image_embeds, text_embeds, "text_embeds")
    first, stop, _ = (captioned_images or slice(None)).indices(len(image_embeds))
    num_captioned = max(stop - first, 0)
    if first_image_index < 0 or first_image_index + num_captioned > len(text_embeds):
        raise ValueError(
            f"{num_captioned} images from index {first_image_index} on need as many captions, but text_embeds has "
            f"{len(text_embeds)} rows. Give the texts of all processes and the global index of the first local image."
        )
    dtype = _loss_dtype(image_embeds)
    tensors = [t.to(dtype) for t in (image_embeds, text_embeds, logit_scale, logit_bias)]
    needs_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    with torch.autocast(image_embeds.device.type, enabled=False):
        total = _SigmoidPairLossSum.apply(*tensors, first, num_captioned, first_image_index, needs_gradients)
    return total / max(len(text_embeds) if num_texts is None else num_texts, 1)


def pool_concepts(token_embeds: Tensor, concept_token_spans: Tensor, concept_mask: Tensor) -> Tensor:
    """Concept vectors (B, C, D), float32: the L2-normalised mean of each span's token embeddings, zero where masked.

    A span that is empty or leaves the text counts as masked: see `usable_concepts`.

    Args:
        token_embeds (B, T, D): projected text tokens, not normalised.
        concept_token_spans (B, C, 2): [start, end) token positions, [CLS] counted.
        concept_mask (B, C): True where a concept stands.

    Raises:
        ValueError: where the shapes do not fit each other.
    """
    if token_embeds.dim() != 3:
        raise ValueError(f"token_embeds should be (B, T, D), got {tuple(token_embeds.shape)}.")
    num_tokens = token_embeds.shape[1]
    usable = usable_concepts(concept_token_spans, concept_mask, num_tokens)
    if len(usable) != len(token_embeds):
        raise ValueError(f"{len(token_embeds)} texts in token_embeds, but {len(usable)} in concept_token_spans.")
    dtype = _loss_dtype(token_embeds)
    positions = torch.arange(num_tokens, device=token_embeds.device)
    start, end = concept_token_spans.unsqueeze(-1).unbind(2)  # (B, C, 1) each
    in_span = (start <= positions) & (positions < end) & usable.unsqueeze(-1)  # (B, C, T)
    num_in_span = in_span.sum(-1, keepdim=True).clamp(min=1)
    with torch.autocast(token_embeds.device.type, enabled=False):
        means = (in_span.to(dtype) / num_in_span) @ token_embeds.to(dtype)
    # The outer mask keeps the steep slope of a zero vector's normalisation away from the tokens.
    return F.normalize(means, dim=-1).masked_fill(~usable.unsqueeze(-1), 0.0)


def usable_concepts(concept_token_spans: Tensor, concept_mask: Tensor, num_tokens: int) -> Tensor:
    """Which concepts have a vector, (B, C) bool: those not masked whose span holds tokens and lies inside the text.

    Args:
        concept_token_spans (B, C, 2): [start, end) token positions, [CLS] counted.
        concept_mask (B, C): True where a concept stands.
        num_tokens: T, the padded length of the texts.

    Raises:
        ValueError: where the shapes do not fit each other.
    """
    if concept_token_spans.dim() != 3 or concept_token_spans.shape[2] != 2:
        raise ValueError(f"concept_token_spans should be (B, C, 2), got {tuple(concept_token_spans.shape)}.")
    if concept_mask.shape != concept_token_spans.shape[:2]:
        raise ValueError(
            f"concept_mask should be {tuple(concept_token_spans.shape[:2])} as concept_token_spans tells, "
            f"got {tuple(concept_mask.shape)}."
        )
    start, end = concept_token_spans.unbind(-1)
    return concept_mask.bool() & (start >= 0) & (start < end) & (end <= num_tokens)


def patch_concept_alignment_loss(
    patch_embeds: Tensor,
    concept_embeds: Tensor,
    concept_to_image: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    first_image_index: int = 0,
    concept_ids: Tensor | None = None,
    caption_concepts: tuple[Tensor, Tensor] | None = None,
    num_concepts: int | None = None,
) -> Tensor:
    """Pairwise sigmoid loss of these images' best patches against all concepts of the global batch (PC-Align), float32.

        L = 1/N  sum_ic  w_ic softplus(-z_ic (s max_p <v_ip, c_c> + b)),    z_ic = 1 where c is of image i's caption

    Summed over images, averaged over concepts, as released (Nie et al., "ConceptCLIP", 2025), save that N counts the
    concepts of all processes. w_ic is 0 where c is of another caption and image i's own caption names the same concept
    (`concept_ids`), else 1.

    Args:
        patch_embeds (b, P, D): L2-normalised; the images of this process.
        concept_embeds (N, D): L2-normalised; the concepts of all processes, or a block of them.
        concept_to_image (N,): global index of the image each concept belongs to; -1 where a row is padding, which
            counts for nothing.
        logit_scale (1,): s, already exponentiated.
        logit_bias (1,): b.
        first_image_index: place of `patch_embeds[0]` among the global images.
        concept_ids (N,): identity of each concept. A concept is then no negative of an image whose own caption names
            the same one; without ids, as in the release, it is.
        caption_concepts: `concept_to_image` and `concept_ids` (n,) of the concepts that these images' own captions
            name, where `concept_embeds` is a block that need not hold them.
        num_concepts: N, where `concept_embeds` is but a block of them: the losses of all blocks add up to the whole.

    Raises:
        ValueError: where the shapes do not fit each other.
    """
    for name, indices in (("concept_to_image", concept_to_image), ("concept_ids", concept_ids)):
        if indices is not None and indices.shape != concept_embeds.shape[:1]:
            raise ValueError(f"{name} should be ({len(concept_embeds)},) as concept_embeds tells, got {indices.shape}.")
    similarity, _ = best_patch_similarity(patch_embeds, concept_embeds)  # (b, N)
    num_images = len(patch_embeds)
    images = torch.arange(first_image_index, first_image_index + num_images, device=concept_to_image.device)
    is_own = images.unsqueeze(1) == concept_to_image
    logits = logit_scale.to(similarity.dtype) * similarity + logit_bias.to(similarity.dtype)
    is_concept = concept_to_image >= 0
    losses = F.softplus(torch.where(is_own, -logits, logits)).masked_fill(~is_concept, 0.0)
    if concept_ids is not None:
        owner, named_ids = caption_concepts or (concept_to_image, concept_ids)
        is_named = _named_in_caption(concept_ids, named_ids, owner - first_image_index, num_images)
        losses = losses.masked_fill(is_named & ~is_own, 0.0)
    return losses.sum() / (is_concept.sum().clamp(min=1) if num_concepts is None else max(num_concepts, 1))


def best_patch_similarity(patch_embeds: Tensor, concept_embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Each image's best cosine similarity to each concept, (b, N) float32, and the patch that has it, (b, N) int64.

    Equal to `(patch_embeds @ concept_embeds.T).max(dim=1)` in value and gradient, at the cost of one matrix product:
    the (b, P, N) similarities exist a chunk at a time, and the backward pass visits the best patches alone. With
    bfloat16 inputs or under autocast the patch is chosen in that precision and its similarity computed in float32.
    A second derivative does not exist.

    Args:
        patch_embeds (b, P, D): L2-normalised patches.
        concept_embeds (N, D): L2-normalised concepts.

    Raises:
        ValueError: where the shapes do not fit each other, or there is no patch to choose.
    """
    _check_embeds("concept_embeds", concept_embeds, "(N, D)")
    if patch_embeds.dim() != 3 or patch_embeds.shape[1] == 0:
        raise ValueError(f"patch_embeds should be (b, P, D) with at least one patch, got {tuple(patch_embeds.shape)}.")
    _check_same_width(patch_embeds, concept_embeds, "concept_embeds")
    return _BestPatchSimilarity.apply(patch_embeds, concept_embeds)


class _SigmoidPairLossSum(torch.autograd.Function):
    """Sum over all pairs of softplus(-z logit), with its gradients computed alongside, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor,
        first_captioned: int,
        num_captioned: int,
        first_caption: int,
        gradients: bool,
    ) -> Tensor:
        total = images.new_zeros(())
        slope_images, slope_texts = torch.zeros_like(images), torch.zeros_like(texts)
        slope_bias = torch.zeros_like(bias)
        # Nearly square chunks: a chunk of few rows would reread all texts and their gradients for little arithmetic.
        rows = min(math.isqrt(_chunk_entries(images)), max(len(images), 1))
        columns = _chunk_entries(images) // rows
        for row, column in product(range(0, len(images), rows), range(0, len(texts), columns)):
            some_images, some_texts = images[row : row + rows], texts[column : column + columns]
            logits = (some_images @ some_texts.T).mul_(scale).add_(bias)
            # Of the rows that have a caption, the diagonal on which they meet it, if it is inside.
            top = min(max(first_captioned - row, 0), len(logits))
            captioned = slice(top, max(first_captioned + num_captioned - row, 0))
            own = first_caption + (row + top - first_captioned) - column
            logits[captioned].diagonal(own).neg_()  # now each entry is -z logit
            total += F.softplus(logits).sum()
            if gradients:
                slopes = logits.sigmoid_()
                slopes[captioned].diagonal(own).neg_()  # now each entry is d loss / d logit
                slope_images[row : row + rows].addmm_(slopes, some_texts)
                slope_texts[column : column + columns].addmm_(slopes.T, some_images)
                slope_bias += slopes.sum()
        if gradients:
            slope_scale = torch.linalg.vecdot(slope_images, images).sum().reshape(scale.shape)
            ctx.save_for_backward(slope_images.mul_(scale), slope_texts.mul_(scale), slope_scale, slope_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad_total * slope for slope in ctx.saved_tensors), None, None, None, None


class _BestPatchSimilarity(torch.autograd.Function):
    """Maximum over patches of the patch-concept product; the gradient is a weighted sum of rows each way."""

    @staticmethod
    def forward(ctx: Any, patches: Tensor, concepts: Tensor) -> tuple[Tensor, Tensor]:
        product_dtype = _product_dtype(patches)
        search = search_best_patches if can_search(patches) else _search_by_chunks
        values, indices = search(patches, concepts, product_dtype)
        ctx.save_for_backward(patches, concepts, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None]:
        patches, concepts, indices = ctx.saved_tensors
        num_images, num_patches, _ = patches.shape
        first_rows = torch.arange(num_images, device=indices.device).unsqueeze(1) * num_patches
        best_rows = indices + first_rows  # (b, N): where each best patch stands among the b * P
        grad_patches = grad_concepts = None
        if ctx.needs_input_grad[0]:
            grad_patches = _sum_concepts_by_patch(concepts, best_rows, grad_values, num_images * num_patches)
            grad_patches = grad_patches.view_as(patches).to(patches.dtype)
        if ctx.needs_input_grad[1]:
            grad_concepts = _weighted_row_sums(patches.flatten(0, 1), best_rows.T, grad_values.T).to(concepts.dtype)
        return grad_patches, grad_concepts


def _search_by_chunks(patches: Tensor, concepts: Tensor, product_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The best similarity and its patch, (b, N) each, one chunk of the (b, P, N) products at a time."""
    num_images, num_patches, _ = patches.shape
    values = patches.new_empty((num_images, len(concepts)), dtype=_loss_dtype(patches))
    indices = patches.new_empty((num_images, len(concepts)), dtype=torch.int64)
    columns = max(min(_chunk_entries(patches) // num_patches, len(concepts)), 1)
    rows = max(_chunk_entries(patches) // (num_patches * columns), 1)
    for first in range(0, len(concepts), columns):
        some_concepts = concepts[first : first + columns]
        transposed = some_concepts.to(product_dtype).T
        for start in range(0, num_images, rows):
            some_patches = patches[start : start + rows]
            best = (some_patches.to(product_dtype) @ transposed).max(dim=1)
            where = (slice(start, start + rows), slice(first, first + columns))
            indices[where] = best.indices
            is_exact = product_dtype == values.dtype
            values[where] = best.values if is_exact else _similarity_at(some_patches, some_concepts, best.indices)
    return values, indices


def _sum_concepts_by_patch(concepts: Tensor, best_rows: Tensor, weights: Tensor, num_rows: int) -> Tensor:
    """For each of `num_rows` patches the weighted sum of the concepts it is best for, (num_rows, D)."""
    order = best_rows.flatten().argsort(stable=True)
    bag_ends = torch.bincount(best_rows.flatten(), minlength=num_rows).cumsum(0)
    return _sum_rows_in_bags(concepts, order % max(len(concepts), 1), weights.flatten()[order], F.pad(bag_ends, (1, 0)))


def _weighted_row_sums(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """For each of the N lines of `rows` (N, b) the weighted sum of the rows of `table` it names, (N, D)."""
    bag_ends = torch.arange(len(rows) + 1, device=rows.device) * rows.shape[1]
    return _sum_rows_in_bags(table, rows.flatten(), weights.flatten(), bag_ends)


def _sum_rows_in_bags(table: Tensor, rows: Tensor, weights: Tensor, bag_ends: Tensor) -> Tensor:
    """Sums of `weights[k] * table[rows[k]]` over consecutive bags of k: one pass, no copy of the rows, no atomics."""
    if rows.numel() == 0:
        return table.new_zeros((len(bag_ends) - 1, table.shape[1]))
    return F.embedding_bag(
        rows, table, bag_ends, mode="sum", per_sample_weights=weights.to(table.dtype), include_last_offset=True
    )


def _similarity_at(patches: Tensor, concepts: Tensor, best: Tensor) -> Tensor:
    """Float32 products (k, n) of each concept (n, D) with its best patch, `best` (k, n), of each image (k, P, D)."""
    chosen = patches.gather(1, best.unsqueeze(-1).expand(-1, -1, patches.shape[2]))  # (k, n, D)
    return (chosen.float() * concepts.float()).sum(-1)  # vecdot would obey autocast


def _named_in_caption(concept_ids: Tensor, named_ids: Tensor, named_rows: Tensor, num_rows: int) -> Tensor:
    """Which captions name which concept, (num_rows, N) bool.

    Args:
        concept_ids (N,): what is asked for.
        named_ids (n,): concepts that captions name.
        named_rows (n,): the caption of each; those outside [0, num_rows) count for nothing.
        num_rows: captions there are.
    """
    if len(named_ids) == 0:
        return torch.zeros((num_rows, len(concept_ids)), dtype=torch.bool, device=concept_ids.device)
    sorted_ids = named_ids.sort().values
    key = torch.searchsorted(sorted_ids, torch.cat([named_ids, concept_ids]))  # the same for the same identity
    named_key, asked_key = key.clamp(max=len(sorted_ids) - 1).split([len(named_ids), len(concept_ids)])
    outside = (named_rows < 0) | (named_rows >= num_rows)
    row = named_rows.masked_fill(outside, num_rows)  # one spare row for them all
    named = torch.zeros((num_rows + 1, len(named_ids)), dtype=torch.bool, device=concept_ids.device)
    named[row, named_key] = True
    return named[:num_rows, asked_key] & (sorted_ids[asked_key] == concept_ids)


def _chunk_entries(like: Tensor) -> int:
    """How many similarities of the tensor's precision fill one chunk on its device."""
    budget = CPU_CHUNK_BYTES if like.device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    return max(budget // like.element_size(), 1)


def _loss_dtype(tensor: Tensor) -> torch.dtype:
    """Precision of what is summed up: float32, or the tensor's own if that is higher."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _product_dtype(tensor: Tensor) -> torch.dtype:
    """Precision in which patches are compared: that of autocast where it is on, else the tensor's own."""
    device_type = tensor.device.type
    is_lowered = torch.is_autocast_enabled(device_type) and tensor.dtype == torch.float32
    return torch.get_autocast_dtype(device_type) if is_lowered else tensor.dtype


def _check_embeds(name: str, embeds: Tensor, expected: str) -> None:
    if embeds.dim() != 2:
        raise ValueError(f"{name} should be {expected}, got {tuple(embeds.shape)}.")


def _check_same_width(embeds: Tensor, others: Tensor, name: str) -> None:
    if embeds.shape[-1] != others.shape[-1]:
        raise ValueError(
            f"{name} are {others.shape[-1]} wide, the images {embeds.shape[-1]}: project both alike first."
        )
