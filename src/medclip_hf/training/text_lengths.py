"""Texts of a batch by their lengths, so that short ones are not computed as if they were long."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from medclip_hf.training.gradients import Batch

_TOKENS_PER_BUCKET = 8  # texts are padded to a multiple: fewer shapes to compile, and what tensor cores like
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def without_padding(batch: Batch) -> Batch:
    """The same texts, padded to a multiple of a few tokens beyond the longest of them; `text_lengths` says its length.

    The lengths are numbers of the host: reading them from a mask on the device would stop it.
    """
    lengths = batch.get("text_lengths")
    if not lengths:
        return batch
    longest = _rounded(max(lengths))
    return {name: values[:, :longest] if name in _TEXT_INPUTS else values for name, values in batch.items()}


def bucket_sizes(lengths: Sequence[int], num_buckets: int) -> list[int]:
    """How many texts, from the longest on, to pad alike, so that fewest tokens are computed in so many buckets or less.

    Found exactly, by dynamic programming over the distinct padded lengths, of which there are few.

    Args:
        lengths: of the texts in tokens, the longest first.
        num_buckets: at most; 1 pads all to the longest.

    Raises:
        ValueError: the lengths do not fall.
    """
    if any(before < after for before, after in pairwise(lengths)):
        raise ValueError("texts have to come by length, the longest first, as the collators give them.")
    counts = Counter(_rounded(length) for length in lengths)
    padded = sorted(counts, reverse=True)
    # best[n]: (tokens computed, where each bucket ends) for the n longest distinct lengths in the buckets so far
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    num_texts = 0
    for length in padded:
        num_texts += counts[length]
        best.append((padded[0] * num_texts, (len(best),)))
    for _ in range(1, num_buckets):
        best = [min([best[end], *_with_one_more(best, padded, counts, end)]) for end in range(len(best))]
    ends = best[-1][1]
    return [sum(counts[length] for length in padded[start:end]) for start, end in pairwise((0, *ends))]


def _with_one_more(
    best: list[tuple[int, tuple[int, ...]]], padded: list[int], counts: Counter[int], end: int
) -> list[tuple[int, tuple[int, ...]]]:
    """The ways to let another bucket end at the distinct length `end`, by where it starts."""
    ways, num_texts = [], 0
    for start in range(end - 1, 0, -1):
        num_texts += counts[padded[start]]
        tokens, ends = best[start]
        ways.append((tokens + padded[start] * num_texts, (*ends, end)))
    return ways


def _rounded(length: int) -> int:
    return -(-length // _TOKENS_PER_BUCKET) * _TOKENS_PER_BUCKET
