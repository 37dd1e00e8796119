"""The held-out splits: whole articles, the same share of every modality."""

import numpy as np

from medclip_hf.data.engine.held_out import TEST, TRAIN, VALIDATION, assign_splits

RNG = np.random.default_rng(0)
ARTICLE = RNG.integers(0, 2000, 8000)  # number of each figure's article
DIGESTS = RNG.integers(0, 2**64, 2000, dtype=np.uint64)
MODALITY_OF_ARTICLE = RNG.choice(4, 2000, p=[0.6, 0.3, 0.08, 0.02])
GROUPS, STRATA = DIGESTS[ARTICLE], MODALITY_OF_ARTICLE[ARTICLE]


def test_no_article_is_in_two_splits():
    splits = assign_splits(GROUPS, STRATA, (0.05, 0.1))
    assert all(len(set(splits[article == ARTICLE])) == 1 for article in np.unique(ARTICLE))


def test_every_modality_gives_its_share():
    splits = assign_splits(GROUPS, STRATA, (0.05, 0.1))
    for stratum in range(4):
        shares = np.bincount(splits[stratum == STRATA], minlength=3) / (stratum == STRATA).sum()
        assert abs(shares[TEST] - 0.1) < 0.04
        assert abs(shares[VALIDATION] - 0.05) < 0.04


def test_the_order_of_the_figures_does_not_matter():
    order = RNG.permutation(len(GROUPS))
    splits = assign_splits(GROUPS, STRATA, (0.05, 0.1))
    assert np.array_equal(assign_splits(GROUPS[order], STRATA[order], (0.05, 0.1)), splits[order])


def test_another_seed_holds_out_other_articles():
    one, other = (assign_splits(GROUPS, STRATA, (0.0, 0.1), seed) for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_an_article_of_two_modalities_belongs_to_the_commoner():
    groups = np.array([1, 1, 1, 2, 3, 4], np.uint64)
    splits = assign_splits(groups, np.array([0, 1, 1, 1, 1, 0]), (0.0, 0.5))
    assert len(set(splits[:3])) == 1


def test_a_modality_of_one_article_stays_in_training():
    splits = assign_splits(np.array([5, 5], np.uint64), np.array([0, 0]), (0.3, 0.3))
    assert splits.tolist() == [TRAIN, TRAIN]


def test_nothing_is_held_out_where_nothing_is_asked_for():
    assert not assign_splits(GROUPS, STRATA, (0.0, 0.0)).any()
    assert len(assign_splits(GROUPS[:0], STRATA[:0], (0.1, 0.1))) == 0
