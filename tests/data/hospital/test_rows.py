"""The format of prepared hospital data: what is written is what is read, by our readers and by the trainers'."""

import io

import numpy as np
import pytest
from PIL import Image

from medclip_hf.data.hospital.rows import (
    DatasetFacts,
    HospitalRow,
    PatientGroups,
    label_vector,
    read_dataset_facts,
    read_hospital_rows,
    read_labels,
    read_subgroups,
    write_dataset_facts,
    write_hospital_rows,
)
from medclip_hf.data.records import FigureRow
from medclip_hf.training.datasets import FigureDataset


def png(level: int = 128) -> bytes:
    sink = io.BytesIO()
    Image.new("L", (16, 12), level).save(sink, "PNG")
    return sink.getvalue()


def rows(count: int) -> list[HospitalRow]:
    return [
        HospitalRow(
            FigureRow(row_id=f"r{i}", caption="No effusion.", image_bytes=png(i), modality="DX"),
            patient_id=f"p{i // 2}",
            study_id=f"s{i}",
            labels=(("effusion", i % 2 == 0),) if i else (),
            groups=PatientGroups(sex="F", age_band="60-69", modality="DX"),
        )
        for i in range(count)
    ]


def facts(kind: str = "figures") -> DatasetFacts:
    return DatasetFacts(kind, "multi_label", ("effusion",), {"train": {"rows": 3}}, {}, {}, {})


def test_rows_read_back_equal_over_several_shards(tmp_path):
    written = rows(25)
    assert write_hospital_rows(written, tmp_path, "train", rows_per_shard=10) == 25
    assert len(list(tmp_path.glob("train-*.parquet"))) == 3
    assert list(read_hospital_rows(tmp_path, "train")) == written


def test_a_second_writing_leaves_no_shard_of_the_first(tmp_path):
    write_hospital_rows(rows(25), tmp_path, "train", rows_per_shard=10)
    write_hospital_rows(rows(4), tmp_path, "train", rows_per_shard=10)
    assert len(list(read_hospital_rows(tmp_path, "train"))) == 4


def test_the_trainers_data_set_reads_the_rows(tmp_path):
    write_hospital_rows(rows(3), tmp_path, "train")
    example = FigureDataset(tmp_path, "train", image_size=8, crop_scale=None)[1]
    assert (example.row_id, example.caption, example.image.size) == ("r1", "No effusion.", (8, 8))


def test_labels_and_groups_are_read_without_pictures(tmp_path):
    write_hospital_rows(rows(3), tmp_path, "train")
    write_dataset_facts(facts(), tmp_path)
    assert read_labels(tmp_path, "train")["r1"] == ("p0", (("effusion", False),))
    assert read_subgroups(tmp_path, "train")["r1"].age_band == "60-69"


def test_an_unknown_label_is_nan():
    np.testing.assert_array_equal(label_vector((("b", True), ("c", False)), ("a", "b", "c")), [np.nan, 1, 0])


def test_the_facts_read_back_equal_and_a_missing_file_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match=r"prepare_hospital\.py"):
        read_dataset_facts(tmp_path)
    write_dataset_facts(facts(), tmp_path)
    assert read_dataset_facts(tmp_path) == facts()


def test_facts_of_another_version_are_refused(tmp_path):
    path = write_dataset_facts(facts(), tmp_path)
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(ValueError, match="version 99"):
        read_dataset_facts(tmp_path)


def test_shards_of_other_writers_are_refused_as_hospital_rows(tmp_path):
    from medclip_hf.data.parquet import write_figure_rows

    write_figure_rows([rows(1)[0].figure], tmp_path, "train")
    with pytest.raises(ValueError, match="lacks the columns"):
        list(read_hospital_rows(tmp_path, "train"))
