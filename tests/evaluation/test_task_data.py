"""Data sets in the documented layouts, and what becomes of rows and splits that are wrong."""

import csv
import io
import json
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from medclip_hf.data.images import UnreadableImage
from medclip_hf.evaluation.task_data import read_task_data, read_validation_data
from medclip_hf.evaluation.tasks import Task, read_task, task


def paint(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)
    return path


def write_csv(path, header, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def classification(**changes):
    values = {"name": "demo", "title": "demo", "task_type": "zero_shot_classification", "split": "test"}
    return Task(**(values | changes))


def retrieval(**changes):
    return classification(task_type="retrieval", layout="caption_lines", **changes)


def test_a_folder_of_classes_is_read_with_or_without_splits(tmp_path):
    for split in ("train", "test"):
        for number, name in enumerate(("cyst", "mass")):
            paint(tmp_path / "split" / split / name / "a.png", (number, len(split), 0))
            paint(tmp_path / "plain" / name / "a.png", (number, 0, 0))
    with_splits = read_task_data(classification(), tmp_path / "split")
    assert with_splits.class_names == ("cyst", "mass")
    assert with_splits.labels.tolist() == [0, 1]
    assert [item.item_id for item in with_splits.items] == ["test/cyst/a.png", "test/mass/a.png"]
    plain = read_task_data(classification(split="all"), tmp_path / "plain")
    assert plain.labels.tolist() == [0, 1]
    assert plain.patients is None


def test_a_table_names_images_labels_splits_and_patients(tmp_path):
    for name in ("1", "2", "3"):
        paint(tmp_path / "images" / f"{name}.png", (int(name), 0, 0))
    write_csv(
        tmp_path / "labels.csv",
        ["Path", "Label", "Split", "Patient_ID"],
        [["1.png", "mass", "test", "p1"], ["2.png", "cyst", "Testing", "p1"], ["3.png", "cyst", "train", "p2"]],
    )
    data = read_task_data(classification(class_names=("cyst", "mass")), tmp_path)
    assert data.labels.tolist() == [1, 0]
    assert data.patients.tolist() == ["p1", "p1"]


def test_labels_may_be_places_in_the_class_list(tmp_path):
    for name in "ab":
        paint(tmp_path / f"{name}.png", (ord(name), 0, 0))
    write_csv(tmp_path / "test.csv", ["image", "label"], [["a.png", "1"], ["b.png", "0"]])
    assert read_task_data(classification(class_names=("cyst", "mass")), tmp_path).labels.tolist() == [1, 0]


def test_a_table_may_have_a_column_for_each_class_and_cells_that_are_unknown(tmp_path):
    for name in "abc":
        paint(tmp_path / f"{name}.png", (ord(name), 0, 0))
    rows = [["a.png", "1.0", "-1.0"], ["b.png", "", "0"], ["c.png", "", ""]]
    write_csv(tmp_path / "test.csv", ["path", "edema", "mass"], rows)
    multi = classification(is_multi_label=True)
    data = read_task_data(multi, tmp_path)
    assert data.class_names == ("edema", "mass")
    assert data.labels.tolist() == [[True, False], [False, False]]
    assert data.known.tolist() == [[True, False], [False, True]]
    assert data.counts == {"in use": 2, "no label": 1}
    assert read_task_data(multi, tmp_path, uncertain="positive").labels.tolist()[0] == [True, True]


def test_several_labels_may_stand_in_one_cell(tmp_path):
    for name in "abc":
        paint(tmp_path / f"{name}.png", (ord(name), 0, 0))
    rows = [["a.png", "edema|mass"], ["b.png", "No Finding"], ["c.png", "fracture"]]
    write_csv(tmp_path / "test.csv", ["path", "label"], rows)
    data = read_task_data(classification(is_multi_label=True, class_names=("edema", "mass")), tmp_path)
    assert data.labels.tolist() == [[True, True], [False, False]]
    assert data.counts["label outside the class list"] == 1


def test_lines_of_one_image_are_one_image_with_several_captions(tmp_path):
    for name in "ab":
        paint(tmp_path / "images" / f"{name}.png", (ord(name), 0, 0))
    lines = [
        {"image": "a.png", "caption": "first", "split": "test"},
        {"image": "a.png", "captions": ["second", "first"], "split": "test"},
        {"image": "b.png", "text": "third", "split": "val"},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_task_data(retrieval(), tmp_path).captions == (("first", "second"),)
    assert read_task_data(retrieval(split="all"), tmp_path).captions == (("first", "second"), ("third",))


def make_dataset(shades, **columns):
    """A table of pictures, each of one shade of grey, with labels of two declared classes."""
    import datasets

    pictures = []
    for shade in shades:
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), (shade, shade, shade)).save(buffer, "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cyst", "mass"])}
    values = {"image": pictures, "label": [k % 2 for k in range(len(shades))], **columns}
    more = {name: datasets.Value("string") for name in columns if name not in features}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features | more))


def save_splits(folder, **tables):
    import datasets

    datasets.DatasetDict(tables).save_to_disk(folder)
    return f"datasets:{folder}"


def test_a_data_set_of_hugging_face_is_read_by_its_features(tmp_path):
    table = make_dataset([0, 1, 2], label=[1, 0, 1], patient_id=["x", "y", "y"])
    source = save_splits(tmp_path / "saved", val=table, train=make_dataset([3, 4]))
    data = read_task_data(classification(split="validation"), source)
    assert data.class_names == ("cyst", "mass")
    assert data.labels.tolist() == [1, 0, 1]
    assert data.patients.tolist() == ["x", "y", "y"]
    assert data.items[0].read()[1:4] == b"PNG"
    assert read_task_data(classification(split="val"), source).identity == data.identity
    assert len(read_task_data(classification(split="all"), source).items) == 5
    with pytest.raises(ValueError, match=r"no row of the split 'test'.*the splits there are train, validation"):
        read_task_data(classification(), source)


def test_a_class_that_a_data_set_declares_and_never_shows_is_named(tmp_path):
    data = read_task_data(classification(), save_splits(tmp_path / "saved", test=make_dataset([0, 1], label=[0, 0])))
    assert data.empty_classes == ("mass",)


def test_a_single_table_of_hugging_face_has_the_splits_of_its_column_or_none(tmp_path):
    make_dataset([0, 1, 2], split=["train", "test", "test"]).save_to_disk(tmp_path / "named")
    data = read_task_data(classification(), f"datasets:{tmp_path / 'named'}")
    assert data.labels.tolist() == [1, 0]
    make_dataset([0, 1, 2]).save_to_disk(tmp_path / "plain")
    source = f"datasets:{tmp_path / 'plain'}"
    assert read_task_data(classification(split="all"), source).labels.tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="its rows name no split"):
        read_task_data(classification(), source)


def test_an_image_in_two_splits_of_hugging_face_is_refused_by_its_bytes_or_its_identifier(tmp_path):
    source = save_splits(tmp_path / "bytes", test=make_dataset([0, 1]), train=make_dataset([2, 1]))
    with pytest.raises(ValueError, match="1 images of the split 'test' are in another split"):
        read_task_data(classification(), source)
    tables = {"test": make_dataset([0, 1], id=["a", "b"]), "train": make_dataset([2, 3], id=["b", "c"])}
    with pytest.raises(ValueError, match="1 images of the split 'test' are in another split"):
        read_task_data(classification(), save_splits(tmp_path / "ids", **tables))


# Wrong rows are named and counted.


def test_a_broken_row_counts_for_the_split_of_its_file_alone(tmp_path):
    for name in ("a", "b", "c"):
        paint(tmp_path / f"{name}.png", (ord(name), 0, 0))
    write_csv(tmp_path / "test.csv", ["image", "label"], [["a.png", "cyst"], ["b.png", "mass"], ["", "mass"]])
    write_csv(tmp_path / "validation.csv", ["image", "label"], [["c.png", "cyst"]])
    assert read_task_data(classification(layout="label_table"), tmp_path).counts == {"in use": 2, "names no image": 1}
    assert read_validation_data(classification(layout="label_table"), tmp_path).counts == {"in use": 1}


def test_rows_that_cannot_be_used_are_named_and_counted(tmp_path):
    for name in "ab":
        paint(tmp_path / f"{name}.png", (ord(name), 0, 0))
    rows = [
        ["a.png", "cyst"],
        ["b.png", "mass"],
        ["a.png", "mass"],
        ["absent.png", "cyst"],
        ["../outside.png", "cyst"],
        ["b.png", "unknown"],
        ["", "cyst"],
        ["a.png"],
        ["c.png", ""],
    ]
    write_csv(tmp_path / "test.csv", ["path", "label"], rows)
    data = read_task_data(classification(class_names=("cyst", "mass")), tmp_path)
    assert data.counts == {
        "in use": 2,
        "another number of cells than the header": 1,
        "duplicate id": 2,
        "image listed but absent": 2,
        "image path outside its folder": 1,
        "names no image": 1,
    }
    assert any(entry.where == "test.csv line 5" for entry in data.set_aside)


def test_lines_that_are_no_rows_are_named_and_counted(tmp_path):
    paint(tmp_path / "a.png", (1, 0, 0))
    lines = ['{"image": "a.png", "caption": "text"}', "{broken", "[1]", '{"image": "a.png"}', '{"caption": "no image"}']
    (tmp_path / "test.jsonl").write_text("\n".join([*lines, '{"image": "a.png", "caption": " "}']))
    assert read_task_data(retrieval(), tmp_path).counts == {
        "in use": 1,
        "has no caption": 1,
        "names no image": 1,
        "no caption": 1,
        "not JSON": 1,
        "not a JSON object": 1,
    }


def test_an_empty_class_is_named(tmp_path):
    for name in "ab":
        paint(tmp_path / f"{name}.png", (ord(name), 0, 0))
    write_csv(tmp_path / "test.csv", ["path", "label"], [["a.png", "cyst"], ["b.png", "mass"]])
    data = read_task_data(classification(class_names=("cyst", "edema", "mass")), tmp_path)
    assert data.empty_classes == ("edema",)
    assert data.warnings == ("classes without an image: edema",)


# What would make the figures wrong is refused.


def test_a_class_that_the_tested_split_lacks_is_a_class_and_an_empty_folder_is_named(tmp_path):
    for split, names in (("train", ("cyst", "mass", "scar")), ("test", ("cyst", "mass"))):
        for number, name in enumerate(names):
            paint(tmp_path / split / name / "a.png", (number, len(split), 0))
    (tmp_path / "test" / "empty").mkdir()
    data = read_task_data(classification(), tmp_path)
    assert data.class_names == ("cyst", "mass", "scar")
    assert data.empty_classes == ("scar",)
    assert data.counts == {"in use": 2, "class folder without a file": 1}


def test_one_wrong_label_among_places_is_set_aside_and_spoils_no_other(tmp_path):
    for k in range(5):
        paint(tmp_path / f"{k}.png", (k, 0, 0))
    write_csv(tmp_path / "t.csv", ["image", "label"], [["0.png", "0"], ["1.png", "1"], ["2.png", "7"], ["3.png", ""]])
    data = read_task_data(classification(split="all", class_names=("cyst", "mass")), tmp_path)
    assert data.labels.tolist() == [0, 1]
    assert data.counts == {"in use": 2, "label outside the class list": 1, "no label": 1}


def test_the_validation_split_is_read_where_there_is_one_beside_the_tested_split(tmp_path):
    for split in ("val", "test"):
        for number, name in enumerate(("cyst", "mass")):
            paint(tmp_path / split / name / "a.png", (number, len(split), 0))
    found = read_validation_data(classification(), tmp_path)
    assert found is not None
    assert (found.split, len(found.items)) == ("validation", 2)
    assert read_validation_data(classification(split="all"), tmp_path) is None
    (tmp_path / "val").rename(tmp_path / "train")
    assert read_validation_data(classification(), tmp_path) is None


def test_a_dicom_picture_is_read_as_its_window_shows_it_and_a_damaged_one_has_a_reason(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    header = pydicom.dataset.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.SOPClassUID, header.SOPInstanceUID = pydicom.uid.SecondaryCaptureImageStorage, "1.2.3"
    header.Modality, header.PhotometricInterpretation, header.SamplesPerPixel = "DX", "MONOCHROME2", 1
    header.Rows, header.Columns, header.BitsAllocated, header.BitsStored, header.HighBit = 2, 2, 16, 16, 15
    header.PixelRepresentation, header.WindowCenter, header.WindowWidth = 0, 100, 200
    header.PixelData = np.array([[0, 0], [4000, 4000]], dtype=np.uint16).tobytes()
    (tmp_path / "cyst").mkdir()
    (tmp_path / "mass").mkdir()
    header.save_as(tmp_path / "cyst" / "a.dcm", enforce_file_format=True)
    content = (tmp_path / "cyst" / "a.dcm").read_bytes()
    (tmp_path / "mass" / "b.dcm").write_bytes(content[:-6])
    whole, damaged = read_task_data(classification(split="all"), tmp_path).items
    assert np.asarray(Image.open(io.BytesIO(whole.read()))).tolist() == [[0, 0], [255, 255]]
    with pytest.raises(UnreadableImage, match="DICOM"):
        damaged.read()


def test_a_split_that_is_missing_is_refused_with_those_there_are(tmp_path):
    paint(tmp_path / "a.png", (1, 0, 0))
    write_csv(tmp_path / "t.csv", ["path", "label", "split"], [["a.png", "cyst", "train"]])
    with pytest.raises(ValueError, match=r"no row of the split 'test'.*splits there are train"):
        read_task_data(classification(), tmp_path)


def test_an_image_in_two_splits_is_refused_by_name_and_by_content(tmp_path):
    for name in "ab":
        paint(tmp_path / f"{name}.png", (ord(name), 0, 0))
    rows = [["a.png", "cyst", "test"], ["b.png", "mass", "test"], ["a.png", "cyst", "train"]]
    write_csv(tmp_path / "t.csv", ["path", "label", "split"], rows)
    with pytest.raises(ValueError, match=r"1 images of the split 'test' are in another split.*a\.png"):
        read_task_data(classification(), tmp_path)
    paint(tmp_path / "images" / "copy.png", (ord("a"), 0, 0))
    write_csv(tmp_path / "t.csv", ["path", "label", "split"], [*rows[:2], ["copy.png", "cyst", "train"]])
    with pytest.raises(ValueError, match="in another split"):
        read_task_data(classification(), tmp_path)


def write_nothing(folder):
    pass


def write_absent_images(folder):
    write_csv(folder / "test.csv", ["path", "label"], [["a.png", "cyst"], ["b.png", "mass"]])


def write_without_label_column(folder):
    write_csv(folder / "test.csv", ["path", "note"], [["a.png", "cyst"]])


def write_without_image_column(folder):
    write_csv(folder / "test.csv", ["name", "label"], [["a.png", "cyst"]])


def write_one_class(folder):
    paint(folder / "cyst" / "a.png", (1, 0, 0))


def write_two_tables(folder):
    write_csv(folder / "one.csv", ["path", "label"], [["a.png", "cyst"]])
    write_csv(folder / "two.csv", ["path", "label"], [["a.png", "cyst"]])


def write_in_latin_1(folder):
    (folder / "test.csv").write_bytes("path,label\na.png,tumeur bénigne\n".encode("latin-1"))


def write_an_endless_cell(folder):
    (folder / "test.csv").write_text("path,label\n" + "x" * 200_000 + ",cyst\n")


def write_two_columns_of_one_name(folder):
    write_csv(folder / "test.csv", ["path", "label", "label"], [["a.png", "cyst", "mass"]])


def write_nothing_but_a_header(folder):
    write_csv(folder / "test.csv", ["path", "label"], [])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_nothing, "cannot tell the layout"),
        (write_absent_images, "none of 2 rows can be used"),
        (write_without_label_column, "no column for labels"),
        (write_without_image_column, "no column for images"),
        (write_one_class, "at least two classes"),
        (write_two_tables, "holds 2 files"),
        (write_in_latin_1, r"test\.csv is no CSV in UTF-8"),
        (write_an_endless_cell, r"test\.csv is no CSV in UTF-8"),
        (write_two_columns_of_one_name, "several columns named 'label'"),
        (write_nothing_but_a_header, "has no row that can be used"),
    ],
)
def test_data_that_cannot_be_read_are_refused(tmp_path, write: Callable, message):
    write(tmp_path)
    split = "all" if write is write_one_class else "test"
    with pytest.raises(ValueError, match=message):
        read_task_data(classification(split=split), tmp_path)


def test_a_folder_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        read_task_data(classification(), tmp_path / "absent")


def test_columns_of_other_names_are_mapped(tmp_path):
    paint(tmp_path / "a.png", (1, 0, 0))
    write_csv(tmp_path / "test.csv", ["fichier", "dx"], [["a.png", "cyst"]])
    names = classification(class_names=("cyst", "mass"))
    assert read_task_data(names, tmp_path, columns={"image": "fichier", "label": "dx"}).labels.tolist() == [0]
    with pytest.raises(ValueError, match="not \\['nowhere'\\]"):
        read_task_data(names, tmp_path, columns={"image": "nowhere"})


def test_labels_that_count_from_1_are_refused_since_each_would_name_the_next_class(tmp_path):
    names = classification(class_names=("normal", "torn"))
    write_csv(tmp_path / "test.csv", ["path", "label"], [["a.png", "1"], ["b.png", "2"]])
    with pytest.raises(ValueError, match="count the classes from 1 to 2"):
        read_task_data(names, tmp_path)


def test_one_column_of_labels_names_the_classes_of_several_findings(tmp_path):
    for name in "abcd":
        paint(tmp_path / f"{name}.png", (ord(name), 0, 0))
    cells = [["a.png", "mass|cyst"], ["b.png", "No Finding"], ["c.png", ""], ["d.png", "cyst"], ["./d.png", "mass"]]
    write_csv(tmp_path / "test.csv", ["path", "labels"], cells)
    data = read_task_data(classification(is_multi_label=True), tmp_path)
    assert data.class_names == ("cyst", "mass")
    assert data.labels.tolist() == [[True, True], [False, False], [True, False]]
    assert data.counts == {"in use": 3, "duplicate id": 1, "no label": 1}


def test_the_identity_follows_the_files_and_the_labels(tmp_path):
    for name in "ab":
        paint(tmp_path / f"{name}.png", (ord(name), 0, 0))
    write_csv(tmp_path / "test.csv", ["path", "label"], [["a.png", "cyst"], ["b.png", "mass"]])
    names = classification(class_names=("cyst", "mass"))
    first = read_task_data(names, tmp_path)
    write_csv(tmp_path / "test.csv", ["path", "label"], [["a.png", "mass"], ["b.png", "mass"]])
    relabelled = read_task_data(names, tmp_path)
    assert relabelled.identity == first.identity
    assert relabelled.label_identity != first.label_identity
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "a.png")
    assert read_task_data(names, tmp_path).identity != first.identity


# Task files.


def test_a_task_file_describes_another_data_set(tmp_path):
    path = tmp_path / "knees" / "task.json"
    path.parent.mkdir()
    values = {
        "task_type": "zero_shot_classification",
        "class_names": ["normal", "torn"],
        "templates": ["MRI of a {} knee"],
    }
    path.write_text(json.dumps(values))
    found = read_task(path)
    assert (found.name, found.class_names) == ("knees", ("normal", "torn"))
    assert found.prompts() == (("normal", "torn"), ("MRI of a {} knee",))
    path.write_text(json.dumps(found.as_dict()))
    assert read_task(path) == found


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1], "JSON object"),
        ({"task_type": "retrieval", "colour": 1}, "unknown fields"),
        ({"task_type": "guessing"}, "task_type is one of"),
        ({"task_type": "retrieval", "layout": "heap"}, "layout"),
        ({"task_type": "retrieval", "class_names": "one string"}, "list of strings"),
        ({"task_type": "zero_shot_classification", "class_names": ["a", "a"]}, "class names must be different"),
        (
            {"task_type": "zero_shot_classification", "class_names": ["a", "b"], "templates": ["no slot"]},
            "exactly once",
        ),
        ({"task_type": "zero_shot_classification", "class_names": ["a", "b"], "prompt_names": ["a"]}, "prompt_names"),
        ({"task_type": "retrieval", "name": "../up"}, "must be of letters"),
        ({"task_type": "retrieval", "published": [{"figure": 1}]}, "published figure"),
        ({"task_type": "retrieval", "is_multi_label": "false"}, "must be a bool"),
        ({"task_type": "retrieval", "split": 5}, "must be a str"),
        ({"task_type": "retrieval", "label_file": ["a.csv"]}, "must be a string"),
    ],
)
def test_a_task_file_that_is_wrong_is_refused(tmp_path, values, message):
    path = tmp_path / "task.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        read_task(path)


def test_the_table_s_rows_have_prompts_where_their_classes_are_published():
    assert task("siim_acr").prompts() == (("No Finding", "Pneumothorax"), ("a chest radiology presents {}",))
    assert len(task("ct_rate").class_names) == 16
    assert len(task("rad_chestct").class_names) == 15
    with pytest.raises(ValueError, match="not published"):
        task("derm7pt").prompts()
    with pytest.raises(ValueError, match="there is no task"):
        task("absent")
