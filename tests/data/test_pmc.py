"""Figures of articles as rows: from folders, tarballs and buckets; what is not wanted or not safe is dropped."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from medclip_hf.data.article_stores import ArticleRef, Graphics
from medclip_hf.data.images import UnreadableImage
from medclip_hf.data.pmc import ArticleSource, open_store
from medclip_hf.data.records import FigureRow
from medclip_hf.data.stages import Drop

ARTICLES = Path(__file__).parent / "articles"


def picture(colour="grey", file_format="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (96, 80), colour).save(buffer, file_format)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two articles in the layout of the bucket, the first with pictures."""
    for number in (1, 2):
        place = tmp_path / f"PMC900000{number}.1"
        place.mkdir()
        shutil.copy(ARTICLES / f"PMC900000{number}.1.xml", place)
    first = tmp_path / "PMC9000001.1"
    for name in ("g001.jpg", "g002.jpg", "g006.jpg", "e001.jpg"):
        (first / f"drawn-9000001-{name}").write_bytes(picture())
    (first / "drawn-9000001-g004.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    return tmp_path


def read_all(source):
    outcomes = [outcome for item in source.list_items() for outcome in source.read(item)]
    rows = {outcome.row_id: outcome for outcome in outcomes if isinstance(outcome, FigureRow)}
    drops = {outcome.row_id: outcome.reason for outcome in outcomes if isinstance(outcome, Drop)}
    return rows, drops


def folder_source(folder, **options):
    return ArticleSource(open_store("folder", str(folder)), **options)


# --- rows -------------------------------------------------------------------------------------------------------


def test_a_figure_becomes_a_row_with_all_that_the_article_says(folder):
    rows, _ = read_all(folder_source(folder))
    row = rows["PMC9000001.1/F2"]
    assert row.caption == "Ultrasound follow-up. After one week."
    assert (row.pmcid, row.pmid, row.figure_id, row.license) == ("PMC9000001", "39000001", "F2", "CC BY-NC")
    assert row.cited_in == ("2. Case report",)
    assert row.image_bytes == (folder / "PMC9000001.1" / "drawn-9000001-g002.jpg").read_bytes()


def test_figures_without_file_and_names_that_climb_out_are_dropped(folder):
    _, drops = read_all(folder_source(folder))
    assert drops["PMC9000001.1/F3"] == "image missing"
    assert drops["PMC9000001.1/F4-2"] == "image path outside its folder"


def test_a_picture_that_no_figure_names_is_dropped_but_not_those_of_formulae(folder):
    (folder / "PMC9000001.1" / "stray.png").write_bytes(picture())
    (folder / "PMC9000001.1" / "drawn-9000001-g002.gif").write_bytes(picture())  # a thumbnail
    _, drops = read_all(folder_source(folder))
    strays = [row_id for row_id, reason in drops.items() if reason == "file belongs to no figure"]
    assert strays == ["PMC9000001.1/stray.png"]


def test_a_figure_of_two_files_gives_two_marked_rows(folder):
    for name in ("hand", "two-a", "two-b"):
        (folder / "PMC9000002.1" / f"{name}.png").write_bytes(picture(file_format="PNG"))
    rows, drops = read_all(folder_source(folder, keep_retracted=True))
    assert [rows[f"PMC9000002.1/fig2.{number}"].is_compound for number in (1, 2)] == [True, True]
    assert drops["PMC9000002.1/nofile"] == "figure without file"


# --- what is wanted -----------------------------------------------------------------------------------------------


def test_retracted_articles_are_dropped_unless_asked_for(folder):
    assert read_all(folder_source(folder))[1]["PMC9000002.1"] == "article retracted"
    assert "PMC9000002.1" not in read_all(folder_source(folder, keep_retracted=True))[1]


def test_only_the_licences_asked_for_are_kept(folder):
    rows, drops = read_all(folder_source(folder, licenses=("CC BY",)))
    assert not rows
    assert drops["PMC9000001.1"] == "licence not kept"


def test_a_figure_under_a_foreign_licence_is_dropped_alone(folder):
    rows, drops = read_all(folder_source(folder, licenses=("CC BY-NC",)))
    assert "PMC9000001.1/F2" in rows
    assert drops["PMC9000001.1/F4"] == "licence of the figure not kept"


def test_the_metadata_file_goes_before_the_xml(folder):
    metadata = {"license_code": "CC BY", "is_retracted": False, "pmid": 39000009}
    (folder / "PMC9000001.1" / "PMC9000001.1.json").write_text(json.dumps(metadata))
    rows, _ = read_all(folder_source(folder, licenses=("CC BY",)))
    assert rows["PMC9000001.1/F2"].license == "CC BY"


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"license_code": '])
def test_a_broken_metadata_file_drops_the_article(folder, content):
    (folder / "PMC9000001.1" / "PMC9000001.1.json").write_text(content)
    assert read_all(folder_source(folder))[1]["PMC9000001.1"] == "article metadata broken"


def test_a_misspelled_licence_is_an_error(folder):
    with pytest.raises(ValueError, match="unknown licences 'cc-by': choose among CC0"):
        folder_source(folder, licenses=("cc-by",))


# --- folders --------------------------------------------------------------------------------------------------------


def test_supplementary_xml_beside_an_article_is_no_article(folder):
    (folder / "PMC9000001.1" / "supplement.xml").write_text("<table/>")
    assert len(list(folder_source(folder).list_items())) == 2


def test_articles_of_one_flat_folder_and_of_deep_ones_have_distinct_names(tmp_path):
    for place in ("", "00/a1", "00/a2"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        shutil.copy(ARTICLES / "PMC9000001.1.xml", tmp_path / place / "article.nxml")
    names = [item["name"] for item in folder_source(tmp_path).list_items()]
    assert names == ["article", "00/a1/article", "00/a2/article"]


def test_broken_articles_are_dropped_and_the_others_read(folder):
    (folder / "PMC9000002.1" / "PMC9000002.1.xml").write_bytes(b"<article>")
    (folder / "empty").mkdir()
    (folder / "empty" / "empty.xml").write_bytes(b"")
    rows, drops = read_all(folder_source(folder))
    assert drops["PMC9000002.1"] == "XML broken"
    assert drops["empty"] == "XML file empty"
    assert "PMC9000001.1/F2" in rows


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.jpg"
    outside.write_bytes(picture())
    link = folder / "PMC9000001.1" / "drawn-9000001-g003.jpg"
    link.symlink_to(outside)
    assert read_all(folder_source(folder))[1]["PMC9000001.1/F3"] == "image path outside its folder"


def test_a_pipe_in_the_place_of_a_picture_does_not_block(folder):
    os.mkfifo(folder / "PMC9000001.1" / "drawn-9000001-g003.jpg")
    assert read_all(folder_source(folder))[1]["PMC9000001.1/F3"] == "image missing"


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        open_store("folder", str(tmp_path / "nowhere"))


def test_an_item_cannot_name_a_file_outside_the_folder(folder):
    ref = {"name": "x", "location": "../../etc/passwd", "pmcid": ""}
    assert [drop.reason for drop in folder_source(folder).read(ref)] == ["image path outside its folder"]


# --- names of pictures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "files", "found"),
    [
        ("g1.jpg", ["g1.gif", "g1.jpg"], "g1.jpg"),
        ("g1", ["g1.gif", "g1.jpg"], "g1.jpg"),
        ("G1.JPG", ["g1.jpg"], "g1.jpg"),
        ("g1.tif", ["g1.jpg"], "g1.jpg"),
        ("g1.eps", ["g1.eps", "g1.png"], "g1.png"),
        ("g1.eps", ["g1.eps"], "g1.eps"),
        ("figures/g1.png", ["g1.png"], "g1.png"),
        ("10.1000.x-g1", ["10.1000.x-g1.jpg"], "10.1000.x-g1.jpg"),
    ],
)
def test_a_picture_is_found_under_the_names_that_articles_use(name, files, found):
    assert Graphics(files, str.encode)(name) == found.encode()


@pytest.mark.parametrize("name", ["../g1.jpg", "a/../../g1.jpg", "/etc/g1.jpg", "C:\\g1.jpg", "..\\g1.jpg"])
def test_a_name_that_leaves_the_article_is_refused(name):
    with pytest.raises(UnreadableImage) as caught:
        Graphics(["g1.jpg"], str.encode)(name)
    assert caught.value.reason == "image path outside its folder"


def test_references_survive_a_journey_through_json(folder):
    items = list(folder_source(folder).list_items())
    assert json.loads(json.dumps(items)) == items
    assert ArticleRef(**items[0]).pmcid == "PMC9000001"
