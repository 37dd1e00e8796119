"""The report: one file that fetches nothing, runs nothing and says that it is not a medical device."""

import html.parser
import re

import numpy as np
import pytest

from medclip_hf.explain.overlay import encode_png
from medclip_hf.explain.report import Paragraph, Picture, Section, Table, render_report, write_report

PNG = encode_png(np.zeros((2, 2, 3), np.uint8))
HOSTILE = "<script>alert('x')</script> & \"quoted\""


class _Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parse(page):
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


def full_page(text="plain"):
    parts = [Paragraph(text), Table(["name", text], [[text, "1"]], text), Picture(PNG, text)]
    return render_report(text, [Section(text, parts)])


def test_all_tags_are_closed_and_all_parts_are_there():
    reader = parse(full_page())
    tags = [tag for tag, _ in reader.tags]
    for expected in ("h1", "h2", "p", "table", "th", "td", "figure", "img", "figcaption"):
        assert expected in tags


def test_text_cannot_become_markup():
    reader = parse(full_page(HOSTILE))
    assert "script" not in {tag for tag, _ in reader.tags}
    assert reader.text.count(HOSTILE) >= 6
    (alternative,) = [attributes["alt"] for tag, attributes in reader.tags if tag == "img"]
    assert alternative == HOSTILE


def test_nothing_is_fetched_or_run():
    page = full_page()
    reader = parse(page)
    sources = [attributes[key] for _, attributes in reader.tags for key in ("src", "href") if key in attributes]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src &#x27;none&#x27;" in page


def test_it_fits_a_phone_and_says_its_language():
    page = full_page()
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in page
    assert re.search(r'<html lang="en">', page)


def test_it_says_that_it_is_not_a_medical_device():
    assert "not a medical device" in parse(render_report("t", [])).text
    with pytest.raises(ValueError, match="not a medical device"):
        render_report("t", [], notice=" ")


def test_a_report_is_written_whole_into_a_new_folder(tmp_path):
    path = write_report(tmp_path / "new" / "report.html", "Título", [])
    assert path.read_text(encoding="utf-8") == render_report("Título", [])
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_failed_report_leaves_the_old_one(tmp_path):
    path = write_report(tmp_path / "report.html", "old", [])
    with pytest.raises(ValueError, match="neither PNG nor JPEG"):
        write_report(path, "new", [Section("s", [Picture(b"GIF89a", "moving")])])
    assert "old" in path.read_text(encoding="utf-8")


def test_a_ragged_table_is_refused():
    with pytest.raises(ValueError, match="2 columns"):
        render_report("t", [Section("s", [Table(["a", "b"], [["1"]])])])


def test_an_empty_title_is_refused():
    with pytest.raises(ValueError, match="title"):
        render_report(" ", [])
