"""The entailment filter keeps what its model says, whatever the batches."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from medclip_hf.data.concepts.entailment import EntailmentFilter, entailment_label
from medclip_hf.data.records import ConceptMention

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "this",
    "figure",
    "is",
    "about",
    "lung",
    "cyst",
    "ct",
    "of",
    "a",
    ".",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nli")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=32)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        id2label={0: "contradiction", 1: "neutral", 2: "ENTAILMENT"},
        initializer_range=1.0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def mention(name: str, is_negated: bool = False) -> ConceptMention:
    return ConceptMention(name, name, 0, 1, is_negated=is_negated)


def test_mentions_at_the_threshold_and_above_stay(model: Path) -> None:
    caption = "CT of a lung"
    probabilities = EntailmentFilter(str(model)).probabilities([(caption, "lung"), (caption, "cyst")])
    assert probabilities[0] != pytest.approx(probabilities[1], abs=1e-4)
    better = ("lung", "cyst")[probabilities[1] > probabilities[0]]
    judge = EntailmentFilter(str(model), min_probability=sum(probabilities) / 2)
    assert judge([caption, ""], [(mention("lung"), mention("cyst"), mention(better)), ()]) == [
        (mention(better), mention(better)),
        (),
    ]


def test_denied_mentions_are_not_asked(model: Path) -> None:
    judge = EntailmentFilter(str(model), min_probability=1.0)
    assert judge(["no cyst"], [(mention("cyst", is_negated=True), mention("lung"))]) == [
        (mention("cyst", is_negated=True),)
    ]


def test_results_do_not_depend_on_batches(model: Path) -> None:
    pairs = [("CT of a lung " * n, name) for n in (1, 3, 2) for name in ("lung", "cyst")]
    alone = EntailmentFilter(str(model), batch_size=1).probabilities(pairs)
    assert EntailmentFilter(str(model), batch_size=4).probabilities(pairs) == pytest.approx(alone, abs=1e-5)


def test_a_caption_longer_than_the_model_is_cut_and_the_concept_kept(model: Path) -> None:
    long = "CT of a lung " * 50
    lung, cyst = EntailmentFilter(str(model)).probabilities([(long, "lung"), (long, "cyst")])
    assert lung != pytest.approx(cyst, abs=1e-6)


def test_a_model_without_entailment_is_refused() -> None:
    with pytest.raises(ValueError, match="entailment"):
        entailment_label({0: "LABEL_0", 1: "LABEL_1"})


def test_not_entailment_is_no_entailment() -> None:
    assert entailment_label({0: "not_entailment", 1: "entailment"}) == 1


def test_an_absent_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot load the entailment model"):
        EntailmentFilter(str(tmp_path / "nothing"))


def test_a_hypothesis_without_concept_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="concept"):
        EntailmentFilter(str(model), hypothesis="It shows a lung.")
