"""Recall at k between images and texts, both ways: embeddings in, floats out.

Galleries of any size: similarities are computed block by block and only counted, each block once for both ways, so that
memory does not grow with images × texts.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from medclip_hf.evaluation.intervals import Interval, means_with_intervals

TIE_TOLERANCE = 1e-6  # of a cosine: what a matrix product leaves between equal rows in float32
_CHUNK_SIZE = 1024  # rows and columns of a block: 4 MB of float32, which stay near the processor
_BYTE_SUM = 128  # comparisons that are summed in one byte


@dataclass(frozen=True)
class RetrievalHits:
    """For each query, the chance that a partner is among the first k, see `retrieval_recall`.

    Args:
        ks: cut-offs.
        image_to_text: (N, len(ks)), float64, on the CPU.
        text_to_image: (M, len(ks)).
        text_to_image_row: (M,) image of each text.
    """

    ks: tuple[int, ...]
    image_to_text: Tensor
    text_to_image: Tensor
    text_to_image_row: Tensor

    def recall(self) -> dict[str, float]:
        """Mean over queries, keys as in `retrieval_recall`."""
        return {
            f"{way}_recall@{k}": value
            for way, hits in (("image_to_text", self.image_to_text), ("text_to_image", self.text_to_image))
            for k, value in zip(self.ks, hits.mean(dim=0).tolist(), strict=True)
        }

    def recall_with_intervals(
        self, *, groups: ArrayLike | None = None, num_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
    ) -> dict[str, Interval]:
        """The same with intervals, the queries being resampled and the gallery left as it is.

        Resampling pairs, as the release does, puts copies of a pair into the gallery, and a copy takes the place of the
        true partner.

        Args:
            groups: (N,) patient of each image; None: each image is its own. Texts go with their image.
            num_resamples: 0: no intervals.
            confidence: share of resamples inside an interval.
            seed: of the resampling.

        Raises:
            ValueError: as `intervals.mean_with_interval`.
        """
        group_of_image = np.arange(len(self.image_to_text)) if groups is None else np.asarray(groups)
        figures: dict[str, Interval] = {}
        for way, hits, owners in (
            ("image_to_text", self.image_to_text, group_of_image),
            ("text_to_image", self.text_to_image, group_of_image[self.text_to_image_row.numpy()]),
        ):
            intervals = means_with_intervals(
                hits.numpy(), groups=owners, num_resamples=num_resamples, confidence=confidence, seed=seed
            )
            figures |= {f"{way}_recall@{k}": found for k, found in zip(self.ks, intervals, strict=True)}
        return figures


def retrieval_recall(
    image_embeds: Tensor,
    text_embeds: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    *,
    text_to_image: Tensor | None = None,
    chunk_size: int = _CHUNK_SIZE,
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
        chunk_size: images and texts compared at a time; memory is its square.

    Raises:
        ValueError: shapes that do not fit, nothing to retrieve, values that are not finite, a text without its image,
            an image without a text, a k below 1.
    """
    return retrieval_hits(image_embeds, text_embeds, ks, text_to_image=text_to_image, chunk_size=chunk_size).recall()


def retrieval_hits(
    image_embeds: Tensor,
    text_embeds: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    *,
    text_to_image: Tensor | None = None,
    chunk_size: int = _CHUNK_SIZE,
) -> RetrievalHits:
    """What `retrieval_recall` averages, query by query; arguments and errors are the same."""
    owner = _checked_owner(image_embeds, text_embeds, text_to_image)
    if not ks or min(ks) < 1 or chunk_size < 1:
        raise ValueError(f"ks and chunk_size must be at least 1, got {list(ks)} and {chunk_size}")
    images = torch.nn.functional.normalize(image_embeds.detach().float(), dim=-1)
    texts = torch.nn.functional.normalize(text_embeds.detach().float(), dim=-1)
    of_pairs = _pair_similarity(images, texts, owner, chunk_size)  # (M,)
    best = of_pairs.new_full((len(images),), -torch.inf).scatter_reduce(0, owner, of_pairs, "amax")
    for_images, for_texts = _count_rivals(images, texts, owner, best, of_pairs, chunk_size)
    num_level = torch.zeros_like(best).index_add(0, owner, (of_pairs >= best[owner] - TIE_TOLERANCE).to(best))
    return RetrievalHits(
        tuple(ks),
        _hit_chance(for_images, num_level, len(texts), ks).cpu(),
        _hit_chance(for_texts, torch.ones_like(of_pairs), len(images), ks).cpu(),
        owner.cpu(),
    )


def hit_probability(similarity: Tensor, is_partner: Tensor, ks: Sequence[int]) -> Tensor:
    """Chance (Q, len(ks)) that a partner is among the first k of each row, equal scores being in random order.

    Args:
        similarity: (Q, N).
        is_partner: (Q, N) bool, at least one per row.
        ks: cut-offs, at least 1.
    """
    best = similarity.masked_fill(~is_partner, -torch.inf).amax(dim=1)
    level_partners = (is_partner & (similarity >= best[:, None] - TIE_TOLERANCE)).sum(dim=1)
    rivals = _Rivals(similarity.new_zeros(len(similarity)), similarity.new_zeros(len(similarity)))
    rivals.add(slice(None), similarity.masked_fill(is_partner, -torch.inf), best)
    return _hit_chance(rivals, level_partners, similarity.shape[1], ks)


@dataclass
class _Rivals:
    """How many of the gallery that are no partners stand above each query's best partner, and level with it."""

    above: Tensor
    level: Tensor

    def add(self, queries: slice, similarity: Tensor, best: Tensor, gallery_dim: int = 1) -> None:
        """Count a block of queries and of the gallery, which lies along `gallery_dim`; partners are −inf in it."""
        limits = best.unsqueeze(gallery_dim)
        at_least = _count(operator.ge, similarity, limits - TIE_TOLERANCE, gallery_dim)
        if not at_least.any():
            return  # no rival reaches any of them, as in most blocks of a good model
        above = _count(operator.gt, similarity, limits + TIE_TOLERANCE, gallery_dim)
        self.above[queries] += above
        self.level[queries] += at_least - above


def _count(compare: Callable[[Any, Any], Any], similarity: Tensor, limits: Tensor, dim: int) -> Tensor:
    """How many similarities stand so to their limits along a dimension, int32.

    On a CPU numpy compares in a third of torch's time; and sums in bytes first are many times as fast as sums of bool.
    """
    if similarity.device.type == "cpu":
        mask = torch.from_numpy(compare(similarity.numpy(), limits.numpy()))
    else:
        mask = compare(similarity, limits)
    whole = mask.shape[dim] // _BYTE_SUM
    head, rest = mask.view(torch.uint8).split([whole * _BYTE_SUM, mask.shape[dim] - whole * _BYTE_SUM], dim)
    in_bytes = head.unflatten(dim, (whole, _BYTE_SUM)).sum(dim + 1, dtype=torch.uint8)
    return in_bytes.sum(dim, dtype=torch.int32) + rest.sum(dim, dtype=torch.int32)


def _count_rivals(
    images: Tensor, texts: Tensor, owner: Tensor, best: Tensor, of_pairs: Tensor, chunk_size: int
) -> tuple[_Rivals, _Rivals]:
    """Rivals of each image's best text, and of each text's image."""
    for_images = _Rivals(*(torch.zeros(len(images), dtype=torch.float64, device=images.device) for _ in range(2)))
    for_texts = _Rivals(*(torch.zeros(len(texts), dtype=torch.float64, device=images.device) for _ in range(2)))
    for columns in _chunks(len(texts), chunk_size):
        some_texts, owners = texts[columns], owner[columns]
        for rows in _chunks(len(images), chunk_size):
            similarity = images[rows] @ some_texts.T
            is_inside = (owners >= rows.start) & (owners < rows.stop)
            similarity[owners[is_inside] - rows.start, is_inside.nonzero()[:, 0]] = -torch.inf
            for_images.add(rows, similarity, best[rows])
            for_texts.add(columns, similarity, of_pairs[columns], gallery_dim=0)
    return for_images, for_texts


def _pair_similarity(images: Tensor, texts: Tensor, owner: Tensor, chunk_size: int) -> Tensor:
    """Cosine of each text with its own image, (M,)."""
    return torch.cat([(images[owner[part]] * texts[part]).sum(dim=1) for part in _chunks(len(texts), chunk_size)])


def _chunks(length: int, chunk_size: int) -> Iterator[slice]:
    for first in range(0, length, chunk_size):
        yield slice(first, min(first + chunk_size, length))


def _hit_chance(rivals: _Rivals, level_partners: Tensor, gallery_size: int, ks: Sequence[int]) -> Tensor:
    """Chance (Q, len(ks)) of a hit among the first k.

    With g rivals above the best partner, t rivals and p partners level with it, the first k hold no partner with chance
    C(t, k − g) / C(t + p, k − g) for k > g, and 1 otherwise.
    """
    level_rivals, partners = rivals.level.double(), level_partners.double()
    columns = []
    for k in ks:
        places = (min(k, gallery_size) - rivals.above).clamp(min=0).double()
        misses = _log_choose(level_rivals, places) - _log_choose(level_rivals + partners, places)
        columns.append(torch.where(places <= level_rivals, 1.0 - misses.exp(), torch.ones_like(misses)))
    return torch.stack(columns, dim=1)


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
