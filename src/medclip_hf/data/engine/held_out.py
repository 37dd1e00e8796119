"""Which figures are held out: whole articles, the same share of every modality, whatever order they were found in."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

TRAIN, VALIDATION, TEST = 0, 1, 2  # indices into data.parquet.SPLITS
_ODD = np.uint64(0xBF58476D1CE4E5B9)


def assign_splits(
    groups: NDArray[np.uint64],
    strata: NDArray[Any],
    shares: tuple[float, float],
    seed: int = 0,
) -> NDArray[np.uint8]:
    """The split of every figure, as an index into `data.parquet.SPLITS`.

    Articles are put in an order that depends on their name and the seed alone. Within each stratum (an article belongs
    to that of most of its figures) the first ones are the test set, up to its share of the stratum's figures, the next
    the validation set.

    Args:
        groups: (num_figures,), a digest of each figure's article.
        strata: (num_figures,), the modality of each figure as a small number.
        shares: of validation and test.
        seed: of the order.
    """
    splits = np.zeros(len(groups), np.uint8)
    if not len(groups) or not any(shares):
        return splits
    articles, article_of = np.unique(groups, return_inverse=True)
    sizes = np.bincount(article_of)
    stratum_of = _commonest(article_of, np.asarray(strata, np.int64), len(articles))
    order = np.lexsort((articles, _mixed(articles, seed)))
    split_of_article = np.zeros(len(articles), np.uint8)
    for stratum in np.unique(stratum_of):
        members = order[stratum_of[order] == stratum]
        before = np.cumsum(sizes[members]) - sizes[members]
        total = int(sizes[members].sum())
        test_end, validation_end = total * shares[1], total * (shares[0] + shares[1])
        split_of_article[members[before < validation_end]] = VALIDATION
        split_of_article[members[before < test_end]] = TEST
        if total == sizes[members[0]]:  # a modality of one article stays in training
            split_of_article[members] = TRAIN
    return split_of_article[article_of]


def _commonest(article_of: NDArray[np.int64], strata: NDArray[np.int64], num_articles: int) -> NDArray[np.int64]:
    """The stratum of most figures of each article, the smallest where several are equal."""
    pairs, counts = np.unique(np.stack([article_of, strata], axis=1), axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], -counts, pairs[:, 0]))
    _, first = np.unique(pairs[order, 0], return_index=True)
    result = np.zeros(num_articles, np.int64)
    result[pairs[order[first], 0]] = pairs[order[first], 1]
    return result


def _mixed(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """The values shuffled by a hash of 64 bits (the finaliser of splitmix64)."""
    mixed = values ^ np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    for shift in (30, 27):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * _ODD
    return mixed ^ (mixed >> np.uint64(31))
