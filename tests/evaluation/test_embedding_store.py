"""Shards of embeddings appear whole, belong to one run, and are read back as they were written."""

import json

import numpy as np
import pytest

from medclip_hf.data.stages import Drop
from medclip_hf.evaluation import embedding_store
from medclip_hf.evaluation.embedding_store import EmbeddingStore, Shard, read_shards


def store_in(folder, num_rows=5, rows_per_shard=2, store_format="parquet", **settings):
    store = EmbeddingStore(
        folder,
        {"model": "m", **settings},
        num_rows=num_rows,
        rows_per_shard=rows_per_shard,
        store_format=store_format,
    )
    store.open()
    return store


def shard_of(*names):
    values = np.arange(len(names) * 6).reshape(len(names), 2, 3)
    return Shard(
        names, {"patch_embeds": values.astype(np.float16), "image_norms": np.arange(len(names), dtype=np.float32)}
    )


@pytest.mark.parametrize("store_format", ["parquet", "safetensors"])
def test_shards_are_read_back_with_shapes_and_types(tmp_path, store_format):
    store = store_in(tmp_path, 5, 2, store_format)
    assert [list(store.rows_of(unit)) for unit in range(store.num_units)] == [[0, 1], [2, 3], [4]]
    store.write(1, Shard((), {}), [Drop("image damaged", "x", "c"), Drop("image damaged", "x", "d")])
    store.write(0, shard_of("a", "ü"), [])
    assert store.finish() is None  # one is missing
    store.write(2, shard_of("e"), [])
    assert store.finish().as_dict() == {"kept": 3, "dropped": {"image damaged": 2}}
    first, last = read_shards(tmp_path)
    assert first.row_ids == ("a", "ü")
    for name, values in shard_of("a", "ü").arrays.items():
        np.testing.assert_array_equal(first.arrays[name], values)
        assert first.arrays[name].dtype == values.dtype
    (only,) = [shard for shard in read_shards(tmp_path, ["image_norms"]) if shard.row_ids == last.row_ids]
    assert set(only.arrays) == {"image_norms"}
    aside = [json.loads(line) for line in (tmp_path / "set_aside" / "00001.jsonl").read_text().splitlines()]
    assert [row["row_id"] for row in aside] == ["c", "d"]


def test_a_folder_of_another_run_is_refused_and_named(tmp_path):
    store_in(tmp_path).write(0, shard_of("a", "b"), [])
    with pytest.raises(ValueError, match="model was 'm' and is 'other'"):
        store_in(tmp_path, model="other")
    with pytest.raises(ValueError, match="rows_per_shard was 2 and is 3"):
        store_in(tmp_path, rows_per_shard=3)
    assert store_in(tmp_path).is_done(0)


def test_a_full_disk_leaves_finished_shards_and_no_half_ones(tmp_path, monkeypatch):
    store = store_in(tmp_path)
    store.write(0, shard_of("a", "b"), [])
    before = store.shard_path(0).read_bytes()

    def fill(path, shard, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedding_store, "_write_parquet", fill)
    with pytest.raises(ValueError, match=r"shard 1 cannot be written .* No space left"):
        store.write(1, shard_of("c", "d"), [])
    assert store.shard_path(0).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "embeddings-00000.parquet",
        "set_aside",
        "settings.json",
    ]


def test_what_a_killed_process_left_is_cleared_at_the_end(tmp_path):
    store = store_in(tmp_path, 1, 1)
    (tmp_path / ".embeddings-00000.parquet.host-1.tmp").write_bytes(b"half")
    store.write(0, shard_of("a"), [])
    store.finish()
    assert not list(tmp_path.glob(".*"))


def test_unfinished_damaged_and_unknown_are_told_apart(tmp_path):
    store = store_in(tmp_path, 1, 1)
    with pytest.raises(ValueError, match="no finished embeddings"):
        next(read_shards(tmp_path))
    store.write(0, shard_of("a"), [])
    store.finish()
    with pytest.raises(ValueError, match="text_embeds"):
        next(read_shards(tmp_path, ["text_embeds"]))
    store.shard_path(0).write_bytes(store.shard_path(0).read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged"):
        next(read_shards(tmp_path))
    with pytest.raises(ValueError, match="damaged"):
        store.finish()
    with pytest.raises(ValueError, match="at least 1 row"):
        store_in(tmp_path / "none", num_rows=0)
