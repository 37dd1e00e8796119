"""The published JSON lines become Parquet shards: spans repaired, drops counted, runs resumable."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from medclip_hf.data import medconcept
from medclip_hf.data.medconcept import ImportPlan, import_medconcept, iter_lines
from medclip_hf.data.parquet import find_shards, read_figure_rows


def jpeg(seed=0):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def record(caption="T1-weighted (a) Breast Mass.", image="x.jpg", **more):
    mention = {
        "umls_cui": "C0024103",
        "umls_similarity": 0.9999999403953552,
        "start_char": 20,
        "end_char": 31,
        "tokens": ["breast", "mass"],
        "start_token": 6,
        "end_token": 8,
    }
    row = {"pmid": "1", "pmc": "2", "fig_id": "F1", "caption": caption, "image": image, "umls_meta_info": [mention]}
    return row | more


@pytest.fixture
def make_plan(tmp_path):
    """A plan over the given lines (bytes, or objects to be written as JSON) with one good image, x.jpg."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "x.jpg").write_bytes(jpeg())
    (images / "cut.jpg").write_bytes(jpeg()[:-100])
    (images / "empty.jpg").write_bytes(b"")

    def make(lines, output="out", **options):
        source = tmp_path / "rows.jsonl"
        source.write_bytes(b"".join(x if isinstance(x, bytes) else json.dumps(x).encode() + b"\n" for x in lines))
        return ImportPlan(source, images, tmp_path / output, **options)

    return make


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_a_line_becomes_a_row_with_its_concept_on_the_raw_caption(make_plan):
    plan = make_plan([record()])
    state = import_medconcept(plan)
    (row,) = read_figure_rows(find_shards(plan.output, "train"))
    (concept,) = row.concepts
    assert (row.row_id, row.pmcid, row.pmid, row.figure_id) == ("rows:1", "PMC2", "1", "F1")
    assert row.caption[concept.start_char : concept.end_char] == concept.name == "Breast Mass"
    assert concept.cui == "C0024103"
    assert row.image_bytes == jpeg()
    assert (state.rows.kept, state.concepts.kept) == (1, 1)


def test_the_pairs_of_the_training_files_are_read_as_well(make_plan):
    plan = make_plan([record(umls_meta_info=[[20, 31]])])
    import_medconcept(plan)
    (row,) = read_figure_rows(find_shards(plan.output, "train"))
    assert [(concept.cui, concept.name) for concept in row.concepts] == [("", "Breast Mass")]


BAD_LINES = {
    "line not UTF-8": b'{"caption": "\xff"}\n',
    "line not JSON": b'{"caption": \n',
    "line empty": b"\n",
    "line not a JSON object": [1, 2],
    "key missing": {"image": "x.jpg", "umls_meta_info": []},
    "value of the wrong type": record(caption=7),
    "caption empty": record(caption=" \n"),
    "text not valid Unicode": record(caption="mass \ud800"),
    "image missing": record(image="nowhere.jpg"),
    "image path outside its folder": record(image="../rows.jsonl"),
    "image damaged": record(image="cut.jpg"),
    "image file empty": record(image="empty.jpg"),
    "line too long": b'{"caption": "' + b"a" * 3000 + b'"}\n',
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_bad_line_is_dropped_with_its_reason_and_the_next_is_kept(make_plan, monkeypatch, reason):
    monkeypatch.setattr(medconcept, "MAX_LINE_BYTES", 2000)
    plan = make_plan([BAD_LINES[reason], record()])
    state = import_medconcept(plan)
    assert (state.rows.kept, state.rows.dropped) == (1, {reason: 1})
    (dropped,) = map(json.loads, (plan.output / "train.dropped.jsonl").read_text().splitlines())
    assert (dropped["row_id"], dropped["dropped"], dropped["reason"]) == ("rows:1", "row", reason)


def test_deeply_nested_json_is_dropped(make_plan):
    state = import_medconcept(make_plan([b"[" * 100_000 + b"\n"]))
    assert state.rows.dropped == {"line not JSON": 1}


@pytest.mark.parametrize(
    ("mention", "reason"),
    [
        ({"start_char": 0, "end_char": 9999}, "concept span outside the caption"),
        ({"tokens": ["lung"]}, "concept not found in the caption"),
        ({"umls_cui": None}, "concept malformed"),
        ({"start_char": "20"}, "concept malformed"),
        ({"start_char": True}, "concept malformed"),
        ({"umls_similarity": float("nan")}, "concept malformed"),
        ({"umls_similarity": 10**400}, "concept malformed"),
        ({"tokens": "breast"}, "concept malformed"),
    ],
)
def test_a_bad_concept_is_set_aside_and_its_row_kept(make_plan, mention, reason):
    row = record()
    row["umls_meta_info"] = [row["umls_meta_info"][0] | mention, *row["umls_meta_info"]]
    plan = make_plan([row])
    state = import_medconcept(plan)
    assert (state.rows.kept, state.concepts.kept, state.concepts.dropped) == (1, 1, {reason: 1})
    assert json.loads((plan.output / "train.dropped.jsonl").read_text())["dropped"] == "concept"


def test_a_row_without_concepts_is_kept(make_plan):
    state = import_medconcept(make_plan([record(umls_meta_info=[]), record(umls_meta_info=None)]))
    assert (state.rows.kept, state.concepts.kept) == (2, 0)


def test_a_byte_order_mark_is_no_part_of_the_first_line(make_plan):
    assert import_medconcept(make_plan([b"\xef\xbb\xbf", record()])).rows.kept == 1


def test_lines_are_numbered_and_a_long_one_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(medconcept, "MAX_LINE_BYTES", 5)
    (tmp_path / "x").write_bytes(b"12\n" + b"x" * 17 + b"\n34")
    lines = [(line.number, line.end_byte, line.content) for line in iter_lines(tmp_path / "x")]
    assert lines == [(1, 3, b"12\n"), (2, 21, None), (3, 23, b"34")]


MIXED = [record(), b"no\n", record(), record(image="cut.jpg"), record(), record(), b"no\n", b"no\n"]


@pytest.mark.parametrize("stop_after", range(1, 9))
def test_an_interrupted_import_ends_like_an_uninterrupted_one(make_plan, stop_after):
    whole = make_plan(MIXED, "whole", rows_per_shard=2)
    import_medconcept(whole)
    interrupted = make_plan(MIXED, "interrupted", rows_per_shard=2)

    def stop(state):
        if state.num_lines == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_medconcept(interrupted, on_progress=stop)
    state = import_medconcept(interrupted)
    assert files_of(interrupted.output) == files_of(whole.output)
    assert (state.rows.kept, state.num_lines) == (4, 8)


def test_several_processes_write_what_one_writes(make_plan):
    one, several = make_plan(MIXED, "one", rows_per_shard=2), make_plan(MIXED, "several", rows_per_shard=2)
    import_medconcept(one)
    import_medconcept(several, num_workers=2)
    assert files_of(one.output) == files_of(several.output)


def test_an_unfinished_import_is_not_trained_on(make_plan):
    plan = make_plan(MIXED, rows_per_shard=2)

    def stop(state):
        if state.num_lines == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_medconcept(plan, on_progress=stop)
    with pytest.raises(ValueError, match=r"has not finished\. Run it again"):
        find_shards(plan.output, "train")


def test_a_finished_import_is_not_done_again(make_plan, monkeypatch):
    plan = make_plan(MIXED, rows_per_shard=2)
    first = import_medconcept(plan)
    monkeypatch.setattr(medconcept, "parse_line", lambda *arguments: pytest.fail("parsed again"))
    assert import_medconcept(plan) == first


def test_shards_of_another_plan_are_not_continued(make_plan):
    import_medconcept(make_plan(MIXED, rows_per_shard=2))
    with pytest.raises(ValueError, match="from another source or with other settings"):
        import_medconcept(make_plan(MIXED, rows_per_shard=3))
    with pytest.raises(ValueError, match="from another source or with other settings"):
        import_medconcept(make_plan(MIXED[:-1], rows_per_shard=2))


def test_paths_are_kept_where_the_images_lie_below_the_output(make_plan, tmp_path):
    plan = make_plan([record()], output=".", embed_images=False)
    import_medconcept(plan)
    (row,) = read_figure_rows(find_shards(tmp_path, "train"))
    assert (row.image_path, row.image_bytes) == ("images/x.jpg", None)


def test_paths_cannot_be_kept_where_the_images_lie_elsewhere(make_plan):
    with pytest.raises(ValueError, match="images below the output folder"):
        import_medconcept(make_plan([record()], embed_images=False))


def test_a_missing_source_and_a_missing_image_folder_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*nothing.jsonl"):
        import_medconcept(ImportPlan(tmp_path / "nothing.jsonl", tmp_path, tmp_path / "out"))
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"no folder .*images"):
        import_medconcept(ImportPlan(tmp_path / "rows.jsonl", tmp_path / "images", tmp_path / "out"))


def test_an_output_that_cannot_be_written_is_an_error_before_any_work(make_plan, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to the folder"):
        import_medconcept(make_plan([record()], "file/out"))


@pytest.mark.parametrize("source", ["metadata.jsonl", "metadata_min.jsonl"])
def test_every_concept_of_the_published_sample_is_repaired(real_data, tmp_path, source):
    sample = real_data / "pmc_sample"
    plan = ImportPlan(sample / source, sample / "images", tmp_path)
    state = import_medconcept(plan)
    assert (state.rows.kept, state.rows.dropped, state.concepts.kept, state.concepts.dropped) == (70, {}, 280, {})
    published = [json.loads(line) for line in (sample / "metadata.jsonl").read_text().splitlines()]
    for row, line in zip(read_figure_rows(find_shards(tmp_path, "train")), published, strict=True):
        for concept, mention in zip(row.concepts, line["umls_meta_info"], strict=True):
            words = "".join(token.removeprefix("##") for token in mention["tokens"])
            assert concept.name.lower().replace(" ", "") == words
