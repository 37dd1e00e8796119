import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from medclip_hf.data.reports.decomposition import decompose_report
from medclip_hf.data.reports.llm import AnswerFile, LLMReportDecomposer, parse_answer

ANATOMIES = ("lung", "heart")
REPORTS = [
    ("Lungs are clear. A widget is seen. The heart is large.", "Cardiomegaly."),
    ("No effusion. It is fine.", ""),
    ("", "Not given."),
]


@pytest.fixture(scope="module")
def tokenizer():
    letters = {chr(byte): byte for byte in range(32, 127)} | {"\n": 10, "Ċ": 11, "Ġ": 12, "<pad>": 0, "</s>": 1}
    backend = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def decomposer(model, tokenizer):
    return LLMReportDecomposer(model, tokenizer, ANATOMIES, max_new_tokens=8, batch_size=2)


def answer_with(decomposer, monkeypatch, answer):
    """Lets the model give a fixed answer, or one computed from each prompt; counts the prompts."""
    asked = []

    def generate(texts):
        asked.extend(texts)
        return [answer(text) if callable(answer) else answer for text in texts]

    monkeypatch.setattr(decomposer, "_generate", generate)
    return asked


def test_a_model_that_knows_nothing_leaves_every_sentence_to_the_rules(decomposer):
    by_rules = [decompose_report(*report, ANATOMIES) for report in REPORTS]
    assert decomposer(REPORTS) == by_rules
    assert decomposer.counts.num_reports == 3
    assert decomposer.counts.num_prompts == decomposer.counts.num_generated == 3
    assert decomposer.counts.sentences_by_model + decomposer.counts.sentences_by_rules.total() == 6


def test_answers_do_not_depend_on_the_size_of_the_batch(model, tokenizer):
    answers = []
    for batch_size in (1, 3):
        decomposer = LLMReportDecomposer(model, tokenizer, ANATOMIES, max_new_tokens=8, batch_size=batch_size)
        decomposer(REPORTS)
        answers.append(decomposer.answers)
    assert answers[0] == answers[1]


def test_valid_answers_take_the_place_of_the_rules(decomposer, monkeypatch):
    verdicts = {"1": {"lung": "normal"}, "2": {"lung": "abnormal"}, "3": {}}
    answer_with(decomposer, monkeypatch, f"Here it is: ```json\n{json.dumps(verdicts)}\n``` Done.")
    lung, heart = decomposer([(REPORTS[0][0], "")])[0]
    assert lung.findings == "Lungs are clear. A widget is seen."
    assert heart.findings == ""
    assert decomposer.counts.sentences_by_model == 3


def test_verdicts_of_the_model_count_under_the_findings_too_rule(model, tokenizer, monkeypatch):
    decomposer = LLMReportDecomposer(model, tokenizer, ANATOMIES, normal_rule="findings_too")
    answer_with(decomposer, monkeypatch, '{"1": {"lung": "abnormal", "heart": "normal"}}')
    lung, heart = decomposer([("Something odd.", "")])[0]
    assert (lung.is_abnormal, heart.is_abnormal) == (True, False)


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        ({}, "sentence not answered"),
        ({"1": ["lung"]}, "answer of another form"),
        ({"1": {"liver": "normal"}}, "anatomy not in the list"),
        ({"1": {"lung": "perhaps"}}, "verdict neither normal nor abnormal"),
        ({"1": {"lung": ["normal"]}}, "verdict neither normal nor abnormal"),
    ],
)
def test_an_answer_that_breaks_the_schema_leaves_its_sentence_to_the_rules(decomposer, monkeypatch, verdict, reason):
    answer_with(decomposer, monkeypatch, json.dumps(verdict))
    assert decomposer([("Lungs are clear.", "")])[0][0].findings == "Lungs are clear."
    assert decomposer.counts.sentences_by_rules == {reason: 1}


def test_one_broken_sentence_does_not_spoil_the_others_of_its_prompt(decomposer, monkeypatch):
    answer_with(decomposer, monkeypatch, '{"1": {"heart": "normal"}, "2": "lung"}')
    lung, heart = decomposer([("Nothing here. Lungs are clear.", "")])[0]
    assert heart.findings == "Nothing here."
    assert lung.findings == "Lungs are clear."


def test_what_the_model_is_not_asked_about_stays_with_the_rules(decomposer, monkeypatch):
    answer_with(decomposer, monkeypatch, '{"1": {}}')
    statements, _ = decomposer.decompose([("The liver is normal.", "")])[0]
    assert statements[0].anatomies == ("liver",)


def test_long_sections_are_cut_into_several_prompts_and_put_together_again(model, tokenizer, monkeypatch):
    decomposer = LLMReportDecomposer(model, tokenizer, ANATOMIES, max_sentences=2)
    asked = answer_with(decomposer, monkeypatch, '{"1": {"lung": "normal"}, "2": {"heart": "normal"}}')
    findings = "Aa is seen. Bb is seen. Cc is seen. Dd is seen. Ee is seen."
    lung, heart = decomposer([(findings, "")])[0]
    assert len(asked) == 3
    assert lung.findings == "Aa is seen. Cc is seen. Ee is seen."
    assert heart.findings == "Bb is seen. Dd is seen."


def test_a_prompt_beyond_the_context_is_left_to_the_rules(tokenizer):
    config = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    decomposer = LLMReportDecomposer(LlamaForCausalLM(config), tokenizer, ANATOMIES, max_new_tokens=8)
    assert decomposer([("Lungs are clear.", "")]) == [decompose_report("Lungs are clear.", "", ANATOMIES)]
    assert decomposer.counts.sentences_by_rules == {"prompt too long": 1}
    assert decomposer.counts.num_generated == 0


def test_a_chat_template_is_used_where_there_is_one(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "<<{{ messages[0]['content'] }}>>")
    decomposer = LLMReportDecomposer(model, tokenizer, ANATOMIES)
    asked = answer_with(decomposer, monkeypatch, "{}")
    decomposer([("Lungs are clear.", "")])
    assert asked[0].startswith("<<")
    assert asked[0].endswith("1. Lungs are clear.>>")


def test_a_run_that_was_broken_off_asks_only_what_is_new(model, tokenizer, monkeypatch, tmp_path):
    path = tmp_path / "answers.jsonl"
    first = LLMReportDecomposer(model, tokenizer, ANATOMIES, answers=AnswerFile(path))
    answer_with(first, monkeypatch, '{"1": {"lung": "normal"}}')
    first([("Lungs are clear.", "")])
    with path.open("a", encoding="utf-8") as file:
        file.write('["cut sho')
    again = LLMReportDecomposer(model, tokenizer, ANATOMIES, answers=AnswerFile(path))
    asked = answer_with(again, monkeypatch, '{"1": {"heart": "normal"}}')
    texts = again([("Lungs are clear.", ""), ("The heart is fine.", "")])
    assert len(asked) == 1
    assert texts[0][0].findings == "Lungs are clear."


def test_the_answer_file_holds_no_report_text(model, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    decomposer = LLMReportDecomposer(model, tokenizer, ANATOMIES, answers=AnswerFile(path))
    answer_with(decomposer, monkeypatch, '{"1": {"lung": "normal"}}')
    decomposer([("Lungs of the mayor are clear.", "")])
    assert "mayor" not in path.read_text(encoding="utf-8")


def test_a_saved_model_is_loaded_by_its_folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    decomposer = LLMReportDecomposer.from_pretrained(tmp_path, ANATOMIES, max_new_tokens=4)
    assert decomposer([("Lungs are clear.", "")]) == [decompose_report("Lungs are clear.", "", ANATOMIES)]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ('{"1": {}}', {"1": {}}),
        ('Sure {here}: {"1": {}} and {"2": {}}', {"1": {}}),
        ("[1, 2]", None),
        ("", None),
        ('{"1": ', None),
    ],
)
def test_the_first_json_object_of_an_answer_is_read(answer, found):
    assert parse_answer(answer) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anatomies": ("third eye",)}, "third eye"),
        ({"normal_rule": "always"}, "normal_rule"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_arguments_are_refused(model, tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        LLMReportDecomposer(model, tokenizer, **({"anatomies": ANATOMIES} | arguments))
