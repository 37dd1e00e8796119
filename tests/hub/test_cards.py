"""Cards: metadata that the Hub's own classes accept, figures as measured, and nothing of anybody's disk."""

import datetime

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from medclip_hf.hub.cards import EVAL_RESULTS, ModelFacts, model_card, write_card
from medclip_hf.hub.results import MeasuredFigure, eval_results

AUROC = MeasuredFigure(
    "AUROC, mean of 3 cell types",
    0.91234,
    0.88,
    0.94,
    data="BCCD, test slides",
    num_samples=72,
    num_patients=36,
    protocol="LoRA, rank 8",
    dataset_id="owner/bccd",
)


def facts(**changes) -> ModelFacts:
    given = {"name": "Cells", "model_type": "conceptclip", "summary": "Names blood cells.", "figures": (AUROC,)}
    return ModelFacts(**(given | changes))


def test_the_hubs_own_class_reads_every_key_back():
    text = model_card(
        facts(
            pipeline_tag="image-classification",
            base_model="owner/base",
            base_model_relation="adapter",
            is_adapter=True,
            datasets=("owner/bccd",),
            metrics=("roc_auc", "f1"),
        )
    )
    head = ModelCard(text).data.to_dict()
    assert head == {
        "language": ["en"],
        "license": "apache-2.0",
        "library_name": "peft",
        "pipeline_tag": "image-classification",
        "tags": ["medical", "medclip-hf", "conceptclip"],
        "datasets": ["owner/bccd"],
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "metrics": ["roc_auc", "f1"],
    }


def test_a_card_of_either_model_has_every_section_and_says_that_it_is_no_medical_device():
    for model_type in ("conceptclip", "fvlm"):
        text = model_card(facts(model_type=model_type))
        sections = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
        assert sections == [
            "Use",
            "Intended use and misuse",
            "Training data",
            "Training",
            "Evaluation",
            "Limits and bias",
            "Licence",
            "Citation",
        ]
        assert "Not a medical device" in text
        assert "0.912 (0.880 to 0.940)" in text
        assert "72 samples of 36 patients" in text


def test_texts_can_neither_break_the_table_nor_bring_html_nor_headings():
    text = model_card(facts(training={"note | a": "<script>x</script>\n# heading"}))
    assert "<script>" not in text
    assert r"| note \| a | &lt;script&gt;x&lt;/script&gt; \# heading |" in text


def test_a_path_whose_folders_hold_spaces_is_cut_as_a_setting():
    text = model_card(facts(training={"started from": r"C:\Users\Jane Doe\models\base"}))
    assert "Jane" not in text
    assert "| started from | base |" in text


def test_signs_that_steer_a_screen_or_turn_letters_round_are_left_out():
    assert "\n# Cells x y\n" in model_card(facts(name="Cells\x1b\u202ex\0\ny"))


@pytest.mark.parametrize("link", ["LICENSE", "https://example.org/licence?v=1"])
def test_a_licence_of_its_own_is_linked(link):
    assert f"[Own]({link})" in model_card(facts(license="other", license_name="Own", license_link=link))


@pytest.mark.parametrize("path", ["/home/jane/models/base", r"C:\Users\jane\models\base", "~/models/base"])
def test_of_a_path_only_the_last_part_is_published(path):
    text = model_card(facts(training={"started from": path}, summary=f"See {path} and https://example.org/a/b."))
    assert "jane" not in text
    assert "~" not in text
    assert "| started from | base |" in text
    assert "https://example.org/a/b" in text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"base_model": "/home/jane/models/base"}, "base_model"),
        ({"base_model": "base"}, "base_model"),
        ({"datasets": ("a/b/c",)}, "datasets"),
        ({"pipeline_tag": "ct-classification"}, "pipeline_tag"),
        ({"license": "Apache 2.0"}, "license"),
        ({"license": "other"}, "license_name"),
        ({"license": "other", "license_name": "Own", "license_link": "/home/jane/LICENSE"}, "license_link"),
        ({"license": "other", "license_name": "Own", "license_link": "https://a.org)\n# x"}, "license_link"),
        ({"auto_class": "AutoModel\nimport os"}, "auto_class"),
        ({"name": " "}, "name"),
        ({"model_type": "clip"}, "model_type"),
    ],
)
def test_what_the_hub_would_not_understand_is_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        facts(**changes)


@pytest.mark.parametrize("ends", [{"low": 0.1}, {"low": 0.9, "high": 0.1}, {"value": float("nan")}])
def test_an_interval_has_two_finite_ends_in_order(ends):
    with pytest.raises(ValueError, match="AUROC"):
        MeasuredFigure(**({"metric": "AUROC", "value": 0.5} | ends))


def test_results_hold_the_figures_of_public_test_sets_alone():
    private = MeasuredFigure("AUROC", 0.8, data="our clinic")
    undefined = MeasuredFigure("AUROC", None, dataset_id="owner/other")
    text = eval_results(
        [AUROC, private, undefined],
        date=datetime.date(2026, 11, 22),
        source_url="https://example.org/how",
        source_name="how",
    )
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("owner/bccd", "default", 0.91234)
    assert entry.date == "2026-11-22"
    assert entry.source_url == "https://example.org/how"
    assert "95 % bootstrap interval by patient 0.8800 to 0.9400; 72 samples of 36 patients" in entry.notes
    assert eval_results([private]) is None


def test_a_card_written_again_leaves_no_results_of_the_model_before_it(tmp_path):
    write_card(tmp_path, facts())
    assert (tmp_path / EVAL_RESULTS).is_file()
    write_card(tmp_path, facts(figures=()))
    assert "Nothing was measured." in (tmp_path / "README.md").read_text()
    assert not (tmp_path / EVAL_RESULTS).exists()


def test_a_card_needs_the_folder_of_its_model(tmp_path):
    with pytest.raises(ValueError, match="Save the model there first"):
        write_card(tmp_path / "absent", facts())


@pytest.mark.parametrize("name", ["conceptclip", "fvlm"])
def test_the_cards_of_the_two_systems_have_metadata_and_every_section(repository, name):
    card = ModelCard.load(repository / "model_cards" / f"{name}.md", ignore_metadata_errors=False)
    assert {"license", "library_name", "language", "base_model", "metrics", "tags"} <= card.data.to_dict().keys()
    for section in (
        "Architecture",
        "Data",
        "Training recipe",
        "Evaluation",
        "Intended use and misuse",
        "Limits and bias",
        "Licence",
        "Names",
        "Citation",
    ):
        assert f"\n## {section}" in card.text
    assert "Not a medical device" in card.text
