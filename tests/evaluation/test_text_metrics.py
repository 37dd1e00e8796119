"""BLEU, ROUGE-L, METEOR and CIDEr of reports: the packages' own figures, intervals, and texts that are bad."""

import os
import shutil

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from medclip_hf.evaluation import text_metrics
from medclip_hf.evaluation.text_metrics import text_figures, tokens_of

REFERENCES = [
    "The heart is enlarged. No pleural effusion is seen.",
    "Small left pleural effusion, measuring 2.5 cm.",
    "The lungs are clear. The heart size is normal.",
    "Opacity in the right lower lobe, possibly pneumonia.",
]
GENERATED = [
    "The heart is mildly enlarged. No effusion is seen.",
    "There is a small left pleural effusion of 2.5 cm.",
    "The lungs are clear. Heart size is normal.",
    "The lungs are clear.",
]
FAST = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")


def test_tokens_are_lower_cased_words_numbers_and_full_stops():
    assert tokens_of("Effusion, 2.5 cm (left); no  PNEUMOTHORAX.") == "effusion 2.5 cm left no pneumothorax ."


def test_the_texts_themselves_score_as_high_as_can_be():
    figures = text_figures(REFERENCES, REFERENCES, metrics=FAST, num_resamples=0).figures
    for name in FAST[:-1]:
        assert figures[name].value == pytest.approx(1.0), name
    assert figures["cider"].value == pytest.approx(10.0, rel=0.01)


def test_texts_without_a_common_word_score_0():
    figures = text_figures(["xx yy"] * 4, REFERENCES, metrics=FAST, num_resamples=0).figures
    assert all(interval.value == 0 for interval in figures.values())


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_bleu_is_that_of_sacrebleu_on_the_corpus(order):
    figures = text_figures(GENERATED, REFERENCES, metrics=[f"bleu_{order}"], num_resamples=0).figures
    scorer = BLEU(tokenize="none", max_ngram_order=order, smooth_method="none")
    expected = scorer.corpus_score(list(map(tokens_of, GENERATED)), [list(map(tokens_of, REFERENCES))]).score / 100
    assert figures[f"bleu_{order}"].value == pytest.approx(expected)


def test_rouge_l_is_twice_the_longest_common_words_over_both_lengths():
    figures = text_figures(["a b c d"], ["a x c"], metrics=["rouge_l"], num_resamples=0).figures
    assert figures["rouge_l"].value == pytest.approx(2 * 2 / (4 + 3))


def test_the_interval_holds_the_value_and_is_of_patients():
    by_text = text_figures(GENERATED, REFERENCES, metrics=["bleu_2", "rouge_l"], num_resamples=200)
    for interval in by_text.figures.values():
        assert interval.low <= interval.value <= interval.high
    one_patient = text_figures(GENERATED, REFERENCES, metrics=["bleu_2"], groups=["p"] * 4, num_resamples=50)
    interval = one_patient.figures["bleu_2"]
    assert interval.low == pytest.approx(interval.value) == pytest.approx(interval.high)


def test_a_text_without_a_word_counts_as_0_and_is_named():
    figures = text_figures(["", *GENERATED[1:]], REFERENCES, metrics=FAST, num_resamples=20)
    assert figures.num_empty == 1
    assert 0 < figures.figures["rouge_l"].value < 1
    assert np.isfinite([interval.value for interval in figures.figures.values()]).all()


def test_meteor_is_left_out_with_its_reason_where_there_is_no_java(monkeypatch):
    monkeypatch.setattr(text_metrics.shutil, "which", lambda name: None)
    figures = text_figures(GENERATED, REFERENCES, metrics=["meteor", "rouge_l"], num_resamples=0)
    assert list(figures.figures) == ["rouge_l"]
    assert "Java" in figures.left_out["meteor"]


@pytest.mark.skipif(
    shutil.which("java") is None or "MEDCLIP_HF_TEST_METEOR" not in os.environ,
    reason="the Java program takes half a minute: set MEDCLIP_HF_TEST_METEOR=1 to run it",
)
def test_meteor_runs_where_there_is_java_even_for_an_empty_text():
    figures = text_figures(["", *REFERENCES[1:]], REFERENCES, metrics=["meteor"], num_resamples=0)
    assert figures.figures["meteor"].value == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize(
    ("generated", "references", "metrics", "told"),
    [
        (["a"], ["a", "b"], FAST, "each text needs its reference"),
        ([], [], FAST, "each text needs its reference"),
        (["a"], [" , "], FAST, "hold no word"),
        (["a"], ["a"], ["bleu_5"], "unknown metrics"),
    ],
)
def test_texts_that_cannot_be_compared_are_refused(generated, references, metrics, told):
    with pytest.raises(ValueError, match=told):
        text_figures(generated, references, metrics=metrics)
