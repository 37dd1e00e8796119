"""The index of a prepared CT data set."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medclip_hf.data.ct.scan_index import index_path, read_scan_rows, write_scan_rows
from medclip_hf.data.records import AnatomyText, ScanRow


def row(scan_id="b", **more):
    return ScanRow(scan_id, "study", "P1", f"volumes/{scan_id}.zarr", (1, 2, 3), (3.0, 1.0, 1.0), ("lung",), **more)


def test_rows_are_read_as_written_in_the_order_of_their_names(tmp_path):
    texts = (AnatomyText("lung", "Clear.", "", False), AnatomyText("heart", "", "", True))
    full = row(anatomy_texts=texts, labels=(("Nodule", True), ("Mass", False)))
    write_scan_rows([full, row("a")], tmp_path, "train")
    assert read_scan_rows(tmp_path, "train") == [row("a"), full]


def test_an_index_without_rows_is_an_index(tmp_path):
    write_scan_rows([], tmp_path, "train")
    assert read_scan_rows(tmp_path, "train") == []


def test_the_datasets_library_reads_the_index(tmp_path):
    from datasets import Dataset

    path = write_scan_rows([row(labels=(("Nodule", True),))], tmp_path, "train")
    record = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))[0]
    assert record["shape_dhw"] == [1, 2, 3]
    assert record["labels"] == [{"finding": "Nodule", "is_present": True}]


def test_a_missing_or_foreign_index_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"prepare_ct\.py"):
        read_scan_rows(tmp_path, "train")
    write_scan_rows([], tmp_path, "validation")
    with pytest.raises(ValueError, match=r"the splits \['validation'\]"):
        read_scan_rows(tmp_path, "train")
    pq.write_table(pa.table({"row_id": ["x"]}), index_path(tmp_path, "train"))
    with pytest.raises(ValueError, match="is no index of scans"):
        read_scan_rows(tmp_path, "train")
    index_path(tmp_path, "train").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is no index of scans"):
        read_scan_rows(tmp_path, "train")
