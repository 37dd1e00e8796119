"""Questions and studies from files of several layouts; what is bad in them is set aside with its reason."""

import json

import pytest
from PIL import Image

from medclip_hf.data.image_reports import read_studies
from medclip_hf.data.question_answers import (
    build_answers,
    normalize_answer,
    read_answers,
    read_questions,
    write_answers,
)


def put_image(folder, name):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def put_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def question(**changes):
    return {"image": "a.png", "question": "Is it?", "answer": "Yes.", "answer_type": "CLOSED"} | changes


def test_json_lines_are_read_and_answers_normalised(tmp_path):
    put_image(tmp_path, "a.png")
    put_lines(tmp_path / "train.jsonl", [question(id="q1", patient_id="p7"), question(answer=3, answer_type="open ")])
    rows, drops = read_questions(tmp_path, "train")
    assert [(row.row_id, row.answer, row.answer_type, row.group) for row in rows] == [
        ("q1", "yes", "closed", "p7"),
        ("1", "3", "open", "a.png"),
    ]
    assert drops == []


def test_a_line_separator_inside_of_a_text_ends_no_line(tmp_path):
    put_image(tmp_path, "a.png")
    record = json.dumps(question(question="Is it\u2028there?"), ensure_ascii=False)
    (tmp_path / "train.jsonl").write_text(record + "\n", encoding="utf-8")
    rows, _ = read_questions(tmp_path, "train")
    assert [row.question for row in rows] == ["Is it\u2028there?"]


@pytest.mark.parametrize(("content", "message"), [(b"\xff", "cannot be read as text"), (b"[" * 5000, "is not JSON")])
@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_what_is_no_text_or_nests_without_end_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        read_questions(tmp_path, "train")


def test_every_bad_question_is_set_aside_with_its_reason(tmp_path):
    put_image(tmp_path, "a.png")
    bad = {
        "question empty": question(question="  "),
        "answer empty": question(answer=" . "),
        "answer type unknown": question(answer_type="maybe"),
        "image not named": question(image=None),
        "image missing": question(image="b.png"),
        "image path outside its folder": question(image="../a.png"),
        "not an object": ["no", "object"],
        "id repeated": question(id="good"),
    }
    put_lines(tmp_path / "test.jsonl", [question(id="good"), *bad.values()])
    rows, drops = read_questions(tmp_path, "test")
    assert [row.row_id for row in rows] == ["good"]
    assert [drop.reason for drop in drops] == list(bad)


def test_slake_is_read_in_english(tmp_path):
    put_image(tmp_path, "imgs/xmlab1/source.jpg")
    record = {"img_name": "xmlab1/source.jpg", "question": "What?", "answer": "CT", "answer_type": "OPEN", "qid": 5}
    (tmp_path / "validate.json").write_text(json.dumps([record | {"q_lang": "en"}, record | {"q_lang": "zh"}]))
    rows, drops = read_questions(tmp_path, "validation")
    assert [(row.row_id, row.image_path) for row in rows] == [("5", "imgs/xmlab1/source.jpg")]
    assert drops == []


def test_vqa_rad_gets_a_validation_split_of_whole_images_and_keeps_its_test_questions(tmp_path):
    records = []
    for number in range(200):
        name = f"{number % 40}.jpg"
        put_image(tmp_path, f"VQA_RAD Image Folder/{name}")
        phrase = "test_freeform" if number % 5 == 0 else "freeform"
        records.append(
            {"qid": number, "image_name": name, "question": "Q", "answer": "a", "answer_type": "OPEN "}
            | {"phrase_type": phrase}
        )
    (tmp_path / "VQA_RAD Dataset Public.json").write_text(json.dumps(records))
    splits = {split: read_questions(tmp_path, split)[0] for split in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) == 200
    assert len(splits["test"]) == 40
    assert not {row.image_path for row in splits["train"]} & {row.image_path for row in splits["validation"]}


def test_the_vocabulary_is_in_the_same_order_whatever_the_order_of_the_rows(tmp_path):
    put_image(tmp_path, "a.png")
    answers = ["no", "yes", "lung", "yes", "no", "heart"]
    put_lines(tmp_path / "train.jsonl", [question(answer=answer, answer_type="open") for answer in answers])
    rows, _ = read_questions(tmp_path, "train")
    assert build_answers(rows) == build_answers(rows[::-1]) == ["no", "yes", "heart", "lung"]
    assert build_answers(rows, min_count=2) == ["no", "yes"]
    write_answers(tmp_path / "answers.json", build_answers(rows))
    assert read_answers(tmp_path / "answers.json") == ["no", "yes", "heart", "lung"]


def test_answers_differ_only_in_more_than_case_space_and_a_final_stop():
    assert normalize_answer("  Left   Lung. ") == normalize_answer("left lung") == "left lung"


@pytest.mark.parametrize("text", ["{}", "[]", '["Yes", "yes."]', '["a", ""]', "[1]", "[", ""])
def test_a_vocabulary_that_cannot_serve_is_refused(tmp_path, text):
    (tmp_path / "answers.json").write_text(text)
    with pytest.raises(ValueError, match=r"answers\.json"):
        read_answers(tmp_path / "answers.json")


def test_a_missing_split_and_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"neither train\.jsonl nor train\.json"):
        read_questions(tmp_path, "train")
    (tmp_path / "train.jsonl").write_text('{"question": \n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_questions(tmp_path, "train")
    put_lines(tmp_path / "test.jsonl", [question(image="gone.png")])
    with pytest.raises(ValueError, match="no question of the split 'test' that can be used: image missing"):
        read_questions(tmp_path, "test")
    with pytest.raises(ValueError, match="split must be one of"):
        read_questions(tmp_path, "val")


def test_studies_are_read_from_json_lines_and_from_an_annotation_file(tmp_path):
    for name in ("a.png", "b.png", "images/c.png"):
        put_image(tmp_path, name)
    put_lines(tmp_path / "train.jsonl", [{"id": "s1", "images": ["a.png", "b.png"], "report": " Clear. "}])
    entry = {"id": "s2", "image_path": ["c.png"], "report": "Normal."}
    (tmp_path / "annotation.json").write_text(json.dumps({"train": [], "val": [entry], "test": []}))
    (study,), _ = read_studies(tmp_path, "train")
    assert (study.row_id, study.image_paths, study.report) == ("s1", ("a.png", "b.png"), "Clear.")
    (study,), _ = read_studies(tmp_path, "validation")
    assert (study.row_id, study.image_paths, study.patient_id) == ("s2", ("images/c.png",), "s2")


def test_every_bad_study_is_set_aside_with_its_reason(tmp_path):
    put_image(tmp_path, "a.png")
    good = {"id": "good", "images": ["a.png"], "report": "Clear."}
    bad = {
        "report empty": good | {"report": " "},
        "image not named": good | {"images": []},
        "image missing": good | {"images": ["a.png", "b.png"]},
        "image path outside its folder": good | {"images": ["/etc/passwd"]},
        "id repeated": good,
        "not an object": "text",
    }
    put_lines(tmp_path / "test.jsonl", [good, *bad.values()])
    rows, drops = read_studies(tmp_path, "test")
    assert [row.row_id for row in rows] == ["good"]
    assert [drop.reason for drop in drops] == list(bad)
    with pytest.raises(ValueError, match="neither"):
        read_studies(tmp_path, "train")
