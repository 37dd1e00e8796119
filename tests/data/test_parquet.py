"""Figure rows in Parquet shards: round trip, atomic writing, completeness."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medclip_hf.data.parquet import (
    FigureShardWriter,
    find_shards,
    import_lock,
    read_figure_rows,
    read_shard_metadata,
    require_writable,
    shard_path,
    write_figure_rows,
)
from medclip_hf.data.records import ConceptMention, FigureRow


def make_row(number):
    mention = ConceptMention("C0000005", "mass", 2, 6, 0.5, "T047", True)
    return FigureRow(
        f"row{number}", "a mass", (mention,) if number % 2 else (), image_bytes=b"bytes%d" % number, pmid="7"
    )


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [make_row(number) for number in range(7)]
    shards = write_figure_rows(rows, tmp_path, "train", rows_per_shard=3)
    assert [shard.name for shard in shards] == ["train-00000.parquet", "train-00001.parquet", "train-00002.parquet"]
    assert list(read_figure_rows(find_shards(tmp_path, "train"))) == rows


def test_a_row_may_keep_a_path_instead_of_bytes(tmp_path):
    row = FigureRow("a", "text", image_path="images/a.jpg")
    write_figure_rows([row], tmp_path, "test")
    assert list(read_figure_rows(find_shards(tmp_path, "test"))) == [row]


def test_the_image_column_is_an_image_for_datasets(tmp_path):
    shards = write_figure_rows([make_row(0)], tmp_path, "train")
    features = datasets.Features.from_arrow_schema(pq.read_schema(shards[0]))
    assert isinstance(features["image"], datasets.Image)


@pytest.mark.parametrize("row", [FigureRow("a", "b"), FigureRow("a", "b", image_path="c", image_bytes=b"d")])
def test_a_row_needs_exactly_one_image(tmp_path, row):
    with pytest.raises(ValueError, match="exactly one of image_path and image_bytes"):
        write_figure_rows([row], tmp_path, "train")
    assert list(tmp_path.glob("*.parquet")) == []


def test_a_shard_appears_only_when_committed(tmp_path):
    writer = FigureShardWriter(shard_path(tmp_path, "train", 0))
    writer.write(make_row(0))
    assert not writer.path.exists()
    writer.commit({"note": "ä"})
    assert read_shard_metadata(writer.path) == {"note": "ä"}
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000.parquet"]


def test_a_discarded_shard_leaves_no_trace(tmp_path):
    writer = FigureShardWriter(shard_path(tmp_path, "train", 0))
    writer.write(make_row(0))
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_rows_come_leaves_no_half_shard(tmp_path):
    def rows():
        yield make_row(0)
        raise RuntimeError("source lost")

    with pytest.raises(RuntimeError, match="source lost"):
        write_figure_rows(rows(), tmp_path, "train")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_split_is_not_overwritten(tmp_path):
    write_figure_rows([make_row(0)], tmp_path, "train")
    with pytest.raises(ValueError, match="already holds shards of the split 'train'"):
        write_figure_rows([make_row(1)], tmp_path, "train")


def test_a_missing_split_is_named_with_those_that_are_there(tmp_path):
    write_figure_rows([make_row(0)], tmp_path, "train")
    with pytest.raises(ValueError, match=r"no shard test-\*.parquet .* it holds the splits \['train'\]"):
        find_shards(tmp_path, "test")
    with pytest.raises(ValueError, match="the folder does not exist"):
        find_shards(tmp_path / "nowhere", "train")


def test_counted_names_tell_which_shard_is_missing(tmp_path):
    (shard,) = write_figure_rows([make_row(0)], tmp_path, "train")
    (tmp_path / "train.manifest.json").unlink()
    shard.rename(tmp_path / "train-00000-of-00003.parquet")
    with pytest.raises(ValueError, match=r"lacks the shards \[1, 2\]"):
        find_shards(tmp_path, "train")


def test_counted_names_that_are_all_there_are_read(tmp_path):
    shards = write_figure_rows([make_row(0), make_row(1)], tmp_path, "train", rows_per_shard=1)
    (tmp_path / "train.manifest.json").unlink()
    for number, shard in enumerate(shards):
        shard.rename(tmp_path / f"train-{number:05d}-of-00002.parquet")
    assert [row.row_id for row in read_figure_rows(find_shards(tmp_path, "train"))] == ["row0", "row1"]


def test_two_versions_of_a_split_are_not_mixed(tmp_path):
    (shard,) = write_figure_rows([make_row(0)], tmp_path, "train")
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(shard.read_bytes())
    with pytest.raises(ValueError, match="mixes shards"):
        find_shards(tmp_path, "train")


def test_a_shard_that_the_manifest_lists_must_be_there(tmp_path):
    shards = write_figure_rows([make_row(0), make_row(1)], tmp_path, "train", rows_per_shard=1)
    shards[1].unlink()
    with pytest.raises(ValueError, match=r"missing \['train-00001.parquet'\]"):
        find_shards(tmp_path, "train")


def test_the_manifest_counts_the_rows_of_each_shard(tmp_path):
    write_figure_rows([make_row(number) for number in range(5)], tmp_path, "train", rows_per_shard=3)
    manifest = json.loads((tmp_path / "train.manifest.json").read_text())
    assert manifest["num_rows"] == 5
    assert manifest["shards"] == {"train-00000.parquet": 3, "train-00001.parquet": 2}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to the folder .*file/out"):
        require_writable(tmp_path / "file" / "out")


def test_a_split_is_written_by_one_process_at_a_time(tmp_path):
    with (
        import_lock(tmp_path, "train"),
        pytest.raises(ValueError, match="another process"),
        import_lock(tmp_path, "train"),
    ):
        pass
    with import_lock(tmp_path, "train"):
        pass


@pytest.mark.parametrize("content", [b"", b"PAR1 and then something else"])
def test_a_shard_that_is_no_parquet_file_is_named(tmp_path, content):
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet is no readable Parquet file"):
        find_shards(tmp_path, "train")


def test_a_shard_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "train-00000-of-00001.parquet"
    pq.write_table(pa.table({"caption": ["x"]}), path)
    with pytest.raises(ValueError, match=r"lacks the columns \['concepts', 'image', 'row_id'\]"):
        list(read_figure_rows([path]))
