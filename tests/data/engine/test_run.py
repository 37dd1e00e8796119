"""The MedConcept engine from a table to a finished data set: interrupted, repeated, in several processes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medclip_hf.data.engine.figure_type import FigureRules
from medclip_hf.data.engine.publish import stream_figure_rows
from medclip_hf.data.engine.run import build_medconcept
from medclip_hf.data.engine.settings import (
    ConceptSettings,
    DecontaminationSettings,
    EngineSettings,
    OutputSettings,
    SourceSettings,
    SplitSettings,
)
from medclip_hf.data.parquet import find_shards, read_figure_rows
from medclip_hf.data.workers import ProcessRunner
from medclip_hf.training.datasets import FigureDataset

CAPTION = "Axial CT of the chest, case {}, shows a mass in the lung."
NUM_FIGURES = 30


def noise(seed, size=(96, 80)):
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A table of figures of ten articles, among them copies and bad ones."""
    folder = tmp_path_factory.mktemp("source")
    lines = []
    for number in range(NUM_FIGURES):
        noise(number).save(folder / f"{number}.jpg")
        lines.append({"image": f"{number}.jpg", "caption": CAPTION.format(number), "pmcid": f"PMC{number % 10}"})
    (folder / "copy.jpg").write_bytes((folder / "3.jpg").read_bytes())
    noise(4).save(folder / "again.jpg", quality=50)
    Image.new("RGB", (96, 80), "white").save(folder / "blank.png")
    (folder / "empty.jpg").write_bytes(b"")
    lines += [
        {"image": "copy.jpg", "caption": "The same picture again, MRI of the brain."},
        {"image": "again.jpg", "caption": "Nearly the same picture, MRI of the brain."},
        {"image": "blank.png", "caption": "Bar chart of the results of the trial."},
        {"image": "empty.jpg", "caption": "There is nothing to see in this file."},
        {"image": "../../etc/passwd", "caption": "A name that leaves the folder."},
        {"image": "nowhere.jpg", "caption": "A figure without its file."},
        {"image": "0.jpg", "caption": ""},
        {"image": "0.jpg"},
        ["not", "an", "object"],
    ]
    text = "\n".join(json.dumps(line) for line in lines) + "\n{broken\n"
    (folder / "table.jsonl").write_text(text)
    return folder / "table.jsonl"


def settings(table, output, *, keep_work=False, **sections):
    return EngineSettings(
        **(
            {
                "source": SourceSettings("table", str(table), items_per_unit=7),
                "output": OutputSettings(str(output), rows_per_shard=11, keep_work=keep_work),
                "concepts": ConceptSettings(vocabulary=""),
                "splits": SplitSettings(0.1, 0.2),
            }
            | sections
        )
    )


def digests(folder):
    """Of every file of a data set but its locks."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, build_medconcept(settings(source, folder))


def dropped_reasons(folder):
    reasons = {}
    for path in (folder / "dropped").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            reasons[entry["row_id"]] = entry["reason"]
    return reasons


def test_good_figures_are_kept_and_the_others_dropped_with_their_reason(finished):
    folder, report = finished
    assert report.tally.kept == sum(report.num_figures.values()) == NUM_FIGURES
    assert dropped_reasons(folder) == {
        "table:31": "image repeated",
        "table:32": "image nearly repeated",
        "table:33": "figure is a drawing",
        "table:34": "image file empty",
        "table:35": "image path outside its folder",
        "table:36": "image missing",
        "table:37": "caption empty",
        "table:38": "caption empty",
        "table:39": "line not readable",
        "table:40": "line not readable",
    }
    assert report.tally.dropped.total() == 10
    assert report.num_items == 40


def test_no_article_is_in_two_splits(finished):
    folder, report = finished
    articles = [
        {row.pmcid for row in read_figure_rows(find_shards(folder, split))} for split in ("train", "validation", "test")
    ]
    assert not articles[0] & articles[1]
    assert not (articles[0] | articles[1]) & articles[2]
    assert report.num_figures["test"] == 6


def test_the_trainer_reads_the_data_set(finished):
    folder, report = finished
    dataset = FigureDataset(folder, "train", image_size=32)
    assert len(dataset) == report.num_figures["train"]
    assert dataset[0].image.size == (32, 32)


def test_the_intermediate_files_are_gone_and_the_card_is_there(finished):
    folder, _ = finished
    assert not (folder / "work").exists()
    assert "computed tomography" in (folder / "README.md").read_text()
    assert "computed tomography" in (folder / "data_card.html").read_text()
    assert Image.open(folder / "contact_sheet.jpg").size[0] > 500


def test_a_finished_run_started_again_changes_nothing(source, finished):
    folder, report = finished
    before = digests(folder)
    assert build_medconcept(settings(source, folder)) == report
    assert digests(folder) == before


def test_two_processes_give_the_files_of_one(source, finished, tmp_path):
    build_medconcept(settings(source, tmp_path), ProcessRunner(2))
    assert digests(tmp_path) == digests(finished[0])


def test_threads_that_read_ahead_change_nothing(source, finished, tmp_path):
    table = SourceSettings("table", str(source), items_per_unit=7, reads_at_once=4)
    build_medconcept(settings(source, tmp_path, source=table))
    assert digests(tmp_path) == digests(finished[0])


class Stop(Exception):
    pass


def test_a_run_broken_off_anywhere_ends_as_if_it_had_not_been(source, finished, tmp_path):
    def stop_after(count, seen=[]):  # noqa: B006
        seen.clear()

        def on_progress(progress):
            seen.append(progress)
            if len(seen) > count:
                raise Stop

        return on_progress

    for count in range(30):
        try:
            build_medconcept(settings(source, tmp_path), on_progress=stop_after(count))
            break
        except Stop:
            continue
    assert count > 2
    assert digests(tmp_path) == digests(finished[0])


def test_finished_units_are_not_done_again(source, tmp_path):
    def stop_in_annotate(progress):
        if progress.step == "annotate":
            raise Stop

    with pytest.raises(Stop):
        build_medconcept(settings(source, tmp_path), on_progress=stop_in_annotate)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "collected").iterdir()}
    build_medconcept(settings(source, tmp_path, keep_work=True))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "collected").iterdir()} == before


def test_a_killed_run_goes_on(source, finished, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    output = tmp_path / "out"
    recipe.write_text(
        f"source: {{kind: table, path: {source}, items_per_unit: 7}}\n"
        f"output: {{folder: {output}, rows_per_shard: 11}}\n"
        "concepts: {vocabulary: ''}\nsplits: {validation_share: 0.1, test_share: 0.2}\n"
    )
    script = os.path.join(os.path.dirname(__file__), "..", "..", "..", "scripts", "build_medconcept.py")  # noqa: PTH118, PTH120
    with subprocess.Popen([sys.executable, script, "--config", str(recipe), "--workers", "2"]) as process:
        deadline = time.monotonic() + 120
        while not list(output.glob("work/collected/*.parquet")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    build_medconcept(settings(source, output))
    assert digests(output) == digests(finished[0])


def test_a_folder_of_another_recipe_is_refused_and_the_difference_named(source, finished):
    folder, _ = finished
    other = settings(source, folder, splits=SplitSettings(0.2, 0.2))
    with pytest.raises(ValueError, match=r"other settings \(splits.validation_share: 0.1, now 0.2\)"):
        build_medconcept(other)


def test_a_folder_with_foreign_parquet_files_is_refused(source, tmp_path):
    (tmp_path / "train-00000.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="this engine did not write"):
        build_medconcept(settings(source, tmp_path))


def test_two_runs_do_not_share_a_folder(source, tmp_path):
    def start_another(progress):
        build_medconcept(settings(source, tmp_path))

    with pytest.raises(ValueError, match="another process is writing"):
        build_medconcept(settings(source, tmp_path), on_progress=start_another)


def test_no_evaluation_image_is_trained_on(source, tmp_path):
    evaluation = tmp_path / "evaluation" / "set"
    evaluation.mkdir(parents=True)
    (evaluation / "exact.jpg").write_bytes((source.parent / "5.jpg").read_bytes())
    noise(6).save(evaluation / "recompressed.jpg", quality=40)
    (evaluation / "broken.png").write_bytes(b"nothing")
    given = settings(source, tmp_path / "out", decontamination=DecontaminationSettings((str(tmp_path / "evaluation"),)))
    report = build_medconcept(given)
    assert (report.num_evaluation_images, report.num_contaminated) == (2, 2)
    pairs = [json.loads(line) for line in (tmp_path / "out" / "decontamination.jsonl").read_text().splitlines()]
    assert [(pair["row_id"], pair["reason"]) for pair in pairs] == [
        ("table:6", "evaluation image repeated"),
        ("table:7", "evaluation image nearly repeated"),
    ]
    assert pairs[0]["detail"].endswith("set/exact.jpg")


def test_evaluation_images_in_parquet_are_compared_as_well(source, finished, tmp_path):
    given = settings(source, tmp_path, decontamination=DecontaminationSettings((str(finished[0]),)))
    report = build_medconcept(given)
    assert report.tally.kept == 0
    assert report.num_contaminated == NUM_FIGURES + 2


def test_a_decontamination_folder_without_images_is_an_error(source, tmp_path):
    (tmp_path / "nothing").mkdir()
    given = settings(source, tmp_path / "out", decontamination=DecontaminationSettings((str(tmp_path / "nothing"),)))
    with pytest.raises(ValueError, match="nothing would be checked"):
        build_medconcept(given)


def test_a_source_in_which_nothing_is_good_ends_in_an_empty_set(tmp_path):
    (tmp_path / "table.csv").write_text("image,caption\nnowhere.jpg,A figure without its file.\n")
    report = build_medconcept(settings(tmp_path / "table.csv", tmp_path / "out"))
    assert report.num_figures == {"train": 0, "validation": 0, "test": 0}
    assert (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_tables_of_other_kinds_give_the_same_rows(source, finished, tmp_path, suffix):
    lines = [json.loads(line) for line in source.read_text().splitlines()[:NUM_FIGURES]]
    table = tmp_path / f"table{suffix}"
    if suffix == ".parquet":
        import pyarrow as pa

        pq.write_table(pa.Table.from_pylist(lines), table)
    else:
        separator = "\t" if suffix == ".tsv" else ","
        rows = [separator.join(lines[0])] + [separator.join(f'"{value}"' for value in line.values()) for line in lines]
        table.write_text("\ufeff" + "\n".join(rows))
    given = SourceSettings("table", str(table), images=str(source.parent), items_per_unit=7)
    build_medconcept(settings(table, tmp_path / "out", source=given))
    for split in ("train", "test"):
        expected = list(read_figure_rows(find_shards(finished[0], split)))
        assert list(read_figure_rows(find_shards(tmp_path / "out", split))) == expected


def test_images_stored_in_a_parquet_table_are_read(finished, tmp_path):
    (table,) = find_shards(finished[0], "test")
    report = build_medconcept(settings(table, tmp_path))
    rows = [row for split in ("train", "test") for row in read_figure_rows(find_shards(tmp_path, split))]
    expected = list(read_figure_rows([table]))
    assert report.tally.kept == len(expected)
    assert {row.row_id: row.image_bytes for row in rows} == {row.row_id: row.image_bytes for row in expected}


def test_hostile_lines_are_dropped_and_the_others_read(source, tmp_path):
    good = json.dumps(
        {"image": "1.jpg", "caption": "Chest CT with \ud800 a mass.", "row_id": "a\udfff", "pmcid": "\x07P"}
    )
    table = tmp_path / "table.jsonl"
    lines = [
        good.encode(),
        b'{"caption": "\xff\xfe"}',
        b"[" * 100_000,
        b'{"caption": "' + b"x" * 5_000_000 + b'"}',
        b"",
    ]
    table.write_bytes(b"\n".join(lines) + b"\n")
    given = SourceSettings("table", str(table), str(source.parent))
    report = build_medconcept(settings(table, tmp_path / "out", source=given))
    (row,) = read_figure_rows(find_shards(tmp_path / "out", "train"))
    assert (row.row_id, row.caption, row.pmcid) == ("a", "Chest CT with a mass.", "P")
    assert report.tally.dropped == {"line not readable": 4}


def test_a_csv_field_without_end_costs_no_run(source, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text('image,caption\n1.jpg,Chest CT with a mass.\n2.jpg,"' + "no end " * 700_000)
    given = SourceSettings("table", str(table), str(source.parent))
    report = build_medconcept(settings(table, tmp_path / "out", source=given))
    assert report.tally.kept == 1
    assert report.tally.dropped.total() >= 1


def test_an_error_nobody_thought_of_costs_one_item(source, finished, tmp_path, monkeypatch):
    from medclip_hf.data.engine import steps

    def prepare(content, name, rules, original=steps.prepare_image):
        if name == "table:8":
            raise RuntimeError("a decoder's surprise")
        return original(content, name, rules)

    monkeypatch.setattr(steps, "prepare_image", prepare)
    report = build_medconcept(settings(source, tmp_path))
    assert report.tally.dropped["unexpected error"] == 1
    assert report.tally.kept == NUM_FIGURES - 1


def test_medical_images_cannot_be_told_without_a_model(source, tmp_path):
    with pytest.raises(ValueError, match=r"needs model\.path"):
        settings(source, tmp_path, figures=FigureRules(keep="medical"))


def test_concepts_lie_where_their_words_are(source, tmp_path):
    build_medconcept(settings(source, tmp_path, concepts=ConceptSettings()))
    rows = list(read_figure_rows(find_shards(tmp_path, "train")))
    assert all(row.concepts for row in rows)
    found = {row.caption[concept.start_char : concept.end_char].lower() for row in rows for concept in row.concepts}
    assert "mass" in found


def test_the_entailment_filter_sees_captions_with_their_concepts(monkeypatch):
    from medclip_hf.data.concepts import entailment
    from medclip_hf.data.engine.steps import concept_extractor

    class KeepFirst:
        def __init__(self, model, *, min_probability):
            assert (model, min_probability) == ("some/model", 0.7)

        def __call__(self, captions, mentions):
            return [found[:1] for found in mentions]

    captions = ["CT of the lung with pneumonia.", "MRI of the brain and the liver."]
    everything = concept_extractor(ConceptSettings())(captions)
    monkeypatch.setattr(entailment, "EntailmentFilter", KeepFirst)
    given = ConceptSettings(entailment_model="some/model", min_entailment=0.7)
    assert concept_extractor(given)(captions) == [found[:1] for found in everything]
    assert all(len(found) > 1 for found in everything)


@pytest.mark.parametrize("split_panels", [False, True])
def test_the_real_sample_becomes_a_data_set(real_data, tmp_path, split_panels):
    sample = real_data / "pmc_sample"
    given = SourceSettings("table", str(sample / "metadata.jsonl"), str(sample / "images"), split_panels=split_panels)
    report = build_medconcept(settings(sample, tmp_path, source=given))
    rows = list(read_figure_rows(find_shards(tmp_path, "train")))
    assert report.num_items == 70
    assert report.tally.kept > 40
    assert report.tally.dropped["figure is a drawing"] >= 18
    assert any(row.panel for row in rows) == split_panels
    assert len({row.row_id for row in rows}) == len(rows)


def test_a_finished_set_streams_back(finished):
    folder, _ = finished
    expected = list(read_figure_rows(find_shards(folder, "train")))
    assert list(stream_figure_rows(folder, "train")) == expected


def test_hostile_names_do_no_harm_in_the_card(source, tmp_path):
    lines = [
        {
            "image": "1.jpg",
            "caption": "CT of the chest with a mass.",
            "license": "<script>alert(1)</script>|x",
            "pmcid": "1",
        }
    ]
    table = tmp_path / "table.jsonl"
    table.write_text(json.dumps(lines[0]) + "\n")
    given = SourceSettings("table", str(table), str(source.parent))
    build_medconcept(settings(table, tmp_path / "out", source=given))
    for name in ("README.md", "data_card.html"):
        assert "<script>" not in (tmp_path / "out" / name).read_text()


ARTICLE = """<?xml version="1.0"?>
<article xmlns:xlink="http://www.w3.org/1999/xlink"><front><article-meta>
<article-id pub-id-type="pmc">{pmcid}</article-id>
<permissions><license xlink:href="https://creativecommons.org/licenses/{license}/4.0/"><license-p>x</license-p></license>
</permissions></article-meta></front><body><sec><title>Results</title>
<p>See <xref ref-type="fig" rid="F1">Figure 1</xref>.</p>
<fig id="F1"><label>Figure 1</label><caption><p>Chest CT of patient {pmcid} with a mass.</p></caption>
<graphic xlink:href="g1"/></fig></sec></body></article>"""


def test_articles_become_rows_and_hostile_ones_drops(tmp_path):
    articles = tmp_path / "articles"
    for number, license_code in ((1, "by"), (2, "by-nc"), (3, "by")):
        folder = articles / f"PMC{number}.1"
        folder.mkdir(parents=True)
        (folder / f"PMC{number}.1.xml").write_text(ARTICLE.format(pmcid=f"PMC{number}", license=license_code))
        noise(number).save(folder / "g1.jpg")
    (articles / "PMC3.1" / "PMC3.1.xml").write_text(
        '<!DOCTYPE a [<!ENTITY b "bbbbbbbbbb"><!ENTITY c "&b;&b;&b;&b;">]><article><p>&c;</p></article>'
    )
    given = SourceSettings("folder", str(articles), licenses=("CC BY",))
    report = build_medconcept(settings("", tmp_path / "out", source=given))
    (row,) = read_figure_rows(find_shards(tmp_path / "out", "train"))
    assert (row.pmcid, row.license, row.cited_in, row.modality) == (
        *("PMC1", "CC BY", ("Results",), "computed tomography"),
    )
    assert report.tally.kept == 1
    assert report.tally.dropped["licence not kept"] == 1
    assert report.tally.dropped.total() == 2
