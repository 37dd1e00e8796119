"""Recall at k between images and texts, both ways: embeddings in, floats out."""

from collections.abc import Sequence

import torch
from torch import Tensor

TIE_TOLERANCE = 1e-6  # of a cosine: what a matrix product leaves between equal rows in float32


def retrieval_recall(
    image_embeds: Tensor,
    text_embeds: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    *,
    text_to_image: Tensor | None = None,
    chunk_size: int = 1024,
) -> dict[str, float]:
    """Recall at every k, keys ``image_to_text_recall@1`` … ``text_to_image_recall@10``.

    Recall at k of a query is the chance that one of its partners is among the first k of the gallery when equal scores
    are put in random order. So it does not depend on the order of the rows, and embeddings that have all collapsed to
    one point get k / N, not 1. An image with several texts needs one of them. A k beyond the gallery is the whole
    gallery.

    Args:
        image_embeds: (N, D); normalised here.
        text_embeds: (M, D).
        ks: cut-offs, at least 1.
        text_to_image: (M,) row of the image of each text; None: M = N and they belong together in order.
        chunk_size: queries compared at a time; memory is chunk_size × gallery.

    Raises:
        ValueError: shapes that do not fit, nothing to retrieve, values that are not finite, a text without its image,
            an image without a text, a k below 1.
    """
    owner = _checked_owner(image_embeds, text_embeds, text_to_image)
    if not ks or min(ks) < 1 or chunk_size < 1:
        raise ValueError(f"ks and chunk_size must be at least 1, got {list(ks)} and {chunk_size}")
    images = torch.nn.functional.normalize(image_embeds.detach().float(), dim=-1)
    texts = torch.nn.functional.normalize(text_embeds.detach().float(), dim=-1)
    image_ids = torch.arange(len(images), device=images.device)
    recalls = {
        "image_to_text": _mean_recall(images, image_ids, texts, owner, ks, chunk_size),
        "text_to_image": _mean_recall(texts, owner, images, image_ids, ks, chunk_size),
    }
    return {f"{way}_recall@{k}": value for way, values in recalls.items() for k, value in zip(ks, values, strict=True)}


def hit_probability(similarity: Tensor, is_partner: Tensor, ks: Sequence[int]) -> Tensor:
    """Chance (Q, len(ks)) that a partner is among the first k of each row, equal scores being in random order.

    With g rivals above the best partner, t rivals and p partners level with it, the first k hold no partner with chance
    C(t, k − g) / C(t + p, k − g) for k > g, and 1 otherwise.

    Args:
        similarity: (Q, N).
        is_partner: (Q, N) bool, at least one per row.
        ks: cut-offs, at least 1.
    """
    best = similarity.masked_fill(~is_partner, -torch.inf).amax(dim=1, keepdim=True)
    is_level = (similarity - best).abs() <= TIE_TOLERANCE
    above = ((similarity > best) & ~is_level & ~is_partner).sum(dim=1)
    level_rivals = (is_level & ~is_partner).sum(dim=1).double()
    level_partners = (is_level & is_partner).sum(dim=1).double()
    columns = []
    for k in ks:
        places = (min(k, similarity.shape[1]) - above).clamp(min=0).double()
        misses = _log_choose(level_rivals, places) - _log_choose(level_rivals + level_partners, places)
        can_miss = places <= level_rivals
        columns.append(torch.where(can_miss, 1.0 - misses.exp(), torch.ones_like(misses)))
    return torch.stack(columns, dim=1)


def _mean_recall(
    queries: Tensor, query_ids: Tensor, gallery: Tensor, gallery_ids: Tensor, ks: Sequence[int], chunk_size: int
) -> list[float]:
    total = torch.zeros(len(ks), dtype=torch.float64, device=queries.device)
    for first in range(0, len(queries), chunk_size):
        chunk = slice(first, first + chunk_size)
        similarity = queries[chunk] @ gallery.T
        is_partner = query_ids[chunk, None] == gallery_ids[None, :]
        total += hit_probability(similarity, is_partner, ks).sum(dim=0)
    return (total / len(queries)).tolist()


def _log_choose(of: Tensor, take: Tensor) -> Tensor:
    take = torch.minimum(take, of)  # the caller replaces the rows where more is taken than there is
    return torch.lgamma(of + 1) - torch.lgamma(take + 1) - torch.lgamma(of - take + 1)


def _checked_owner(image_embeds: Tensor, text_embeds: Tensor, text_to_image: Tensor | None) -> Tensor:
    if image_embeds.ndim != 2 or text_embeds.ndim != 2 or image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(
            "image_embeds (N, D) and text_embeds (M, D) must share D, got "
            f"{tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}"
        )
    num_images, num_texts = len(image_embeds), len(text_embeds)
    if not num_images or not num_texts:
        raise ValueError(f"nothing to retrieve: {num_images} images and {num_texts} texts")
    if not (torch.isfinite(image_embeds).all() and torch.isfinite(text_embeds).all()):
        raise ValueError("embeddings hold values that are not finite")
    if text_to_image is None:
        if num_images != num_texts:
            raise ValueError(f"{num_images} images and {num_texts} texts: say in text_to_image which belong together")
        return torch.arange(num_images, device=image_embeds.device)
    owner = torch.as_tensor(text_to_image, device=image_embeds.device)
    if owner.shape != (num_texts,) or owner.dtype.is_floating_point:
        raise ValueError(f"text_to_image must be {num_texts} integers, got {owner.dtype} of shape {tuple(owner.shape)}")
    if owner.min() < 0 or owner.max() >= num_images:
        raise ValueError(f"text_to_image names images {int(owner.min())}..{int(owner.max())}, there are {num_images}")
    num_without = int((torch.bincount(owner, minlength=num_images) == 0).sum())
    if num_without:
        raise ValueError(f"{num_without} of {num_images} images have no text: leave them out of the gallery")
    return owner
