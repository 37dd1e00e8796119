import numpy as np
import pytest

from medclip_hf.training.sampling import EpochBatchSampler, permuted, steps_per_epoch


@pytest.mark.parametrize("num_rows", [1, 2, 7, 70, 1024, 1025, 5000])
def test_each_epoch_is_a_permutation_of_the_rows(num_rows):
    for epoch in range(3):
        rows = permuted(np.arange(num_rows), num_rows, seed=3, epoch=epoch)
        assert sorted(rows.tolist()) == list(range(num_rows))


def test_epochs_and_seeds_have_their_own_order():
    orders = [permuted(np.arange(100), 100, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert all((orders[i] != orders[j]).mean() > 0.9 for i, j in [(0, 1), (0, 2), (1, 2)])


def test_every_row_is_equally_likely_at_every_place():
    counts = np.zeros((20, 20))
    for epoch in range(2000):
        counts[np.arange(20), permuted(np.arange(20), 20, 7, epoch)] += 1
    chi_square = ((counts - 100) ** 2 / 100).sum()
    assert chi_square < 361 + 5 * np.sqrt(2 * 361)  # 19 × 19 degrees of freedom


def test_neighbours_do_not_stay_neighbours():
    rows = permuted(np.arange(100_000), 100_000, seed=0, epoch=0)
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.02
    assert (np.diff(rows) == 1).mean() < 1e-3


def test_a_place_deep_in_a_huge_data_set_is_reached_without_walking_there():
    sampler = EpochBatchSampler(10**12, 4, seed=0, max_steps=10**9, first_step=10**9 - 1)
    (batch,) = list(sampler)
    assert len({row for _, row in batch}) == 4


def test_processes_share_no_row_and_together_read_what_one_process_reads():
    one = list(EpochBatchSampler(30, 6, 5, max_steps=10))
    of_two = [list(EpochBatchSampler(30, 3, 5, max_steps=10, rank=rank, num_processes=2)) for rank in range(2)]
    assert [left + right for left, right in zip(*of_two, strict=True)] == one
    first_epoch = [key for batches in of_two for batch in batches[:5] for key in batch]
    assert len(set(first_epoch)) == 30


def test_starting_in_the_middle_gives_the_rest():
    whole = list(EpochBatchSampler(10, 3, 0, max_steps=8))
    assert list(EpochBatchSampler(10, 3, 0, max_steps=8, first_step=5)) == whole[5:]


def test_the_epoch_is_part_of_the_key():
    epochs = [{epoch for epoch, _ in batch} for batch in EpochBatchSampler(10, 3, 0, max_steps=7)]
    assert epochs == [{0}, {0}, {0}, {1}, {1}, {1}, {2}]


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match=r"7 rows, but one global batch takes 8 \(4 × 2 processes\)"):
        steps_per_epoch(7, 4, 2)
