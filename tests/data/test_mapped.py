"""Random access to Parquet rows through memory-mapped Arrow files."""

import os
import pickle
from concurrent.futures import ProcessPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medclip_hf.data import mapped
from medclip_hf.data.mapped import MappedRows, cache_folder


def write_shards(folder, sizes, row_group_size=4):
    shards, start = [], 0
    for number, size in enumerate(sizes):
        table = pa.table({"x": list(range(start, start + size)), "y": [f"r{i}" for i in range(start, start + size)]})
        shards.append(folder / f"train-{number:05d}.parquet")
        pq.write_table(table, shards[-1], row_group_size=row_group_size)
        start += size
    return shards


def test_every_row_is_found_across_shards_row_groups_and_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "MAX_ROWS_PER_BATCH", 3)  # batches of 3 out of row groups of 4
    rows = MappedRows(write_shards(tmp_path, [10, 1, 7]), ["x", "y"], tmp_path / "cache")
    assert len(rows) == 18
    assert [rows[index] for index in (17, 0, 9, 10, 11)] == [{"x": i, "y": f"r{i}"} for i in (17, 0, 9, 10, 11)]
    assert [rows[index]["x"] for index in range(18)] == list(range(18))


def test_only_the_columns_asked_for_are_copied(tmp_path):
    rows = MappedRows(write_shards(tmp_path, [2]), ["y"], tmp_path / "cache")
    assert rows[1] == {"y": "r1"}


def test_large_rows_make_small_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "TARGET_BATCH_BYTES", 1)
    rows = MappedRows(write_shards(tmp_path, [5]), ["x"], tmp_path / "cache")
    assert [rows[index]["x"] for index in range(5)] == list(range(5))


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "MAX_OPEN_FILES", 2)
    rows = MappedRows(write_shards(tmp_path, [1] * 5), ["x"], tmp_path / "cache")
    assert [rows[index]["x"] for index in (0, 1, 2, 3, 4, 0)] == [0, 1, 2, 3, 4, 0]
    assert len(rows._open_files) == 2


@pytest.mark.parametrize("index", [-1, 3])
def test_a_row_beyond_the_end_is_an_index_error(tmp_path, index):
    with pytest.raises(IndexError, match="3 rows"):
        MappedRows(write_shards(tmp_path, [3]), ["x"], tmp_path / "cache")[index]


def test_a_second_opening_converts_nothing(tmp_path, monkeypatch):
    shards = write_shards(tmp_path, [3])
    MappedRows(shards, ["x"], tmp_path / "cache")
    monkeypatch.setattr(mapped, "_convert", lambda *arguments: pytest.fail("converted again"))
    assert MappedRows(shards, ["x"], tmp_path / "cache")[2] == {"x": 2}


def test_only_a_shard_that_changed_is_converted_again(tmp_path):
    shards = write_shards(tmp_path, [3, 3])
    MappedRows(shards, ["x"], tmp_path / "cache")
    untouched = (tmp_path / "cache" / "train-00000.arrow").stat().st_mtime_ns
    pq.write_table(pa.table({"x": [70, 71]}), shards[1])
    rows = MappedRows(shards, ["x"], tmp_path / "cache")
    assert [rows[index]["x"] for index in range(len(rows))] == [0, 1, 2, 70, 71]
    assert (tmp_path / "cache" / "train-00000.arrow").stat().st_mtime_ns == untouched


def test_a_cache_in_part_deleted_is_built_again(tmp_path):
    shards = write_shards(tmp_path, [3])
    MappedRows(shards, ["x"], tmp_path / "cache")
    (tmp_path / "cache" / "train-00000.arrow").unlink()
    assert MappedRows(shards, ["x"], tmp_path / "cache")[1] == {"x": 1}


def sum_of_rows(shards, cache):
    rows = MappedRows(shards, ["x"], cache)
    return sum(rows[index]["x"] for index in range(len(rows)))


def test_processes_that_start_together_share_one_conversion(tmp_path):
    shards = write_shards(tmp_path, [20, 20])
    with ProcessPoolExecutor(3) as pool:
        sums = list(pool.map(sum_of_rows, [shards] * 3, [tmp_path / "cache"] * 3))
    assert sums == [sum(range(40))] * 3
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_rows_can_be_sent_to_a_worker(tmp_path):
    rows = MappedRows(write_shards(tmp_path, [3]), ["x"], tmp_path / "cache")
    rows[0]
    assert pickle.loads(pickle.dumps(rows))[2] == {"x": 2}


def test_a_missing_column_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"train-00000.parquet lacks the columns \['caption'\]"):
        MappedRows(write_shards(tmp_path, [3]), ["x", "caption"], tmp_path / "cache")


def test_a_damaged_shard_is_named(tmp_path):
    (tmp_path / "train-00000.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match=r"train-00000.parquet is no readable Parquet file"):
        MappedRows([tmp_path / "train-00000.parquet"], ["x"], tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write the cache .*file/cache"):
        MappedRows(write_shards(tmp_path, [3]), ["x"], tmp_path / "file" / "cache")


def test_the_cache_lies_beside_the_data_unless_a_folder_is_named(tmp_path):
    assert cache_folder(tmp_path, None) == tmp_path / ".cache"
    one, other = cache_folder(tmp_path / "a" / "set", tmp_path), cache_folder(tmp_path / "b" / "set", tmp_path)
    assert one != other
    assert os.path.commonpath([one, other]) == str(tmp_path)
