"""Texts grouped by length: fewest tokens, none lost, none reordered."""

from itertools import combinations, pairwise

import pytest

from medclip_hf.training.text_lengths import bucket_sizes, without_padding


def tokens_computed(lengths, sizes):
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return sum(-(-lengths[start] // 8) * 8 * size for start, size in zip(starts, sizes, strict=True))


def test_two_groups_pad_the_few_long_texts_alone():
    assert bucket_sizes([90, 20, 17, 9, 9, 9], 2) == [1, 5]
    assert bucket_sizes([90, 20, 17, 9, 9, 9], 1) == [6]
    assert bucket_sizes([90, 20, 17, 9, 9, 9], 9) == [1, 2, 3]
    assert bucket_sizes([], 4) == []


@pytest.mark.parametrize("num_buckets", [1, 2, 3, 4])
def test_no_other_groups_compute_fewer_tokens(num_buckets):
    lengths = [120, 64, 40, 40, 33, 24, 20, 16, 9, 8, 3]
    sizes = bucket_sizes(lengths, num_buckets)
    assert sum(sizes) == len(lengths)
    assert len(sizes) == num_buckets
    cuts = combinations(range(1, len(lengths)), num_buckets - 1)
    best = min(tokens_computed(lengths, [b - a for a, b in pairwise((0, *cut, len(lengths)))]) for cut in cuts)
    assert tokens_computed(lengths, sizes) == best


def test_texts_in_another_order_are_refused():
    with pytest.raises(ValueError, match="the longest first"):
        bucket_sizes([3, 9], 2)


def test_a_batch_that_says_no_lengths_stays_as_it_is():
    batch = {"input_ids": object()}
    assert without_padding(batch) is batch
