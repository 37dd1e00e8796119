"""Stages: drops, tallies and the ordered map over processes."""

import itertools
from collections import Counter

import pytest

from medclip_hf.data.stages import Drop, Tally, map_in_order, run_stages


def test_a_record_passes_all_stages_in_order():
    assert run_stages(1, [lambda x: x + 1, lambda x: x * 10]) == 20


def test_the_first_drop_ends_the_stages():
    def never(record):
        raise AssertionError("a dropped record must not reach a later stage")

    assert run_stages(1, [lambda x: Drop("too small", "1"), never]) == Drop("too small", "1")


def test_a_tally_survives_json_and_addition():
    tally = Tally(3, Counter({"image missing": 2, "caption empty": 1}))
    again = Tally.from_dict(tally.as_dict())
    again.add(Tally(1, Counter({"caption empty": 4})))
    assert (again.kept, again.dropped) == (4, {"caption empty": 5, "image missing": 2})
    assert tally.kept_share == 0.5


def test_an_empty_tally_divides_by_nothing():
    assert Tally().kept_share == 0.0
    assert "0.00%" in Tally().table("rows")


def test_the_table_names_every_reason_with_its_count():
    table = Tally(3, Counter({"image missing": 1})).table("rows")
    assert "image missing" in table
    assert "25.00%" in table


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_come_in_the_order_of_the_items(num_workers):
    assert list(map_in_order(abs, range(-100, 100), num_workers, chunk_size=7)) == [abs(i) for i in range(-100, 100)]


def test_an_endless_source_is_read_only_as_far_as_needed():
    source = itertools.count()
    assert list(itertools.islice(map_in_order(abs, source, num_workers=1, chunk_size=2), 3)) == [0, 1, 2]
    assert next(source) < 20


def test_an_error_in_a_worker_reaches_the_caller():
    with pytest.raises(ValueError, match="invalid literal"):
        list(map_in_order(int, ["1", "x"], num_workers=1))
