"""What the card of a data set counts and shows."""

import io

import numpy as np
import pytest
import yaml
from PIL import Image

from medclip_hf.data.engine import data_card
from medclip_hf.data.engine.data_card import DistinctCount, contact_sheet, summarise, write_data_card
from medclip_hf.data.engine.settings import EngineSettings, OutputSettings, SourceSettings
from medclip_hf.data.parquet import write_figure_rows
from medclip_hf.data.records import ConceptMention, FigureRow

REPORT = {"num_evaluation_images": 0, "tally": {"kept": 3, "dropped": {"image damaged": 1}}}


def row(number, **values):
    pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    mass = ConceptMention("C1", "mass", 2, 6, is_negated=number == 0)
    defaults = {"pmcid": "PMC1", "license": "CC BY", "modality": "ultrasound", "concepts": (mass,)}
    return FigureRow(f"r{number}", "a mass", image_bytes=buffer.getvalue(), **(defaults | values))


@pytest.fixture
def folder(tmp_path):
    write_figure_rows([row(0), row(1, license="", is_compound=True), row(2, pmcid="PMC2")], tmp_path, "train")
    write_figure_rows([row(3, modality="", pmcid="")], tmp_path, "test")
    return tmp_path


def test_everything_is_counted_over_all_splits(folder):
    found = summarise(folder)
    assert found.figures == {"train": 3, "test": 1}
    assert len(found.articles) == 2
    assert found.licenses == {"CC BY": 3, "not stated": 1}
    assert found.modalities == {"ultrasound": 3, "not named": 1}
    assert found.concepts == {"mass (C1)": 4}
    assert (found.num_negated, found.num_compound, found.num_mentions) == (1, 1, 4)
    assert found.caption_words == {"0 to 9": 4}


def test_the_header_tells_the_hub_which_files_are_which_split(folder):
    write_data_card(folder, "A title: with a colon", REPORT, {"source": {"path": "/home/me/articles"}})
    text = (folder / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["pretty_name"] == "A title: with a colon"
    files = header["configs"][0]["data_files"]
    assert files == [{"split": "train", "path": "train-*.parquet"}, {"split": "test", "path": "test-*.parquet"}]
    assert "| image damaged | 1 | 25.0% |" in text


def test_paths_of_the_machine_stay_at_home(folder):
    settings = EngineSettings(SourceSettings("folder", "/home/me/articles"), OutputSettings("/home/me/out"))
    write_data_card(folder, "t", REPORT, settings.published())
    for name in ("README.md", "data_card.html"):
        text = (folder / name).read_text()
        assert "/home/me" not in text
        assert "path: articles" in text


def test_the_page_in_html_needs_no_other_file(folder):
    write_data_card(folder, "t", REPORT, {})
    text = (folder / "data_card.html").read_text()
    assert 'src="data:image/jpeg;base64,' in text
    assert "http" not in text


def test_examples_do_not_depend_on_how_shards_are_cut(folder, tmp_path):
    other = tmp_path / "other"
    write_figure_rows(
        [row(0), row(1, license="", is_compound=True), row(2, pmcid="PMC2")], other, "train", rows_per_shard=1
    )
    assert contact_sheet(other) == contact_sheet(folder)


def test_a_set_without_images_has_no_sheet(tmp_path):
    write_figure_rows([FigureRow("a", "text", image_path="a.jpg")], tmp_path, "train")
    assert contact_sheet(tmp_path) is None


def test_names_are_counted_once_however_often_they_come(monkeypatch):
    monkeypatch.setattr(data_card, "NAMES_AT_ONCE", 4)
    count = DistinctCount()
    for number in range(50):
        count.add(f"PMC{number % 7}")
    assert len(count) == 7
