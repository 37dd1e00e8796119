"""Training of question answering and report generation: each sample weighs the same wherever it lies."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import BertTokenizer, LlamaConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, ConceptCLIPProcessor
from medclip_hf.data.image_reports import StudyRow
from medclip_hf.data.question_answers import QuestionRow
from medclip_hf.data.stages import Drop
from medclip_hf.modeling.conceptclip.report_generation_conceptclip import (
    ConceptCLIPForReportGeneration,
    ConceptCLIPReportGenerationConfig,
)
from medclip_hf.modeling.conceptclip.visual_question_answering_conceptclip import ConceptCLIPForVisualQuestionAnswering
from medclip_hf.training.gradients import backward
from medclip_hf.training.report_generation import ReportObjective, StudyCollator, StudyDataset, encode_reports
from medclip_hf.training.vqa import QuestionCollator, QuestionDataset, QuestionObjective

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "heart", "is", "large", "lung", "clear", "report", "?"]
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
VISION = {**SIZES, "hidden_size": 16, "image_size": 12, "patch_size": 4, "hidden_act": "gelu"}
TEXT = {**SIZES, "vocab_size": len(WORDS), "hidden_size": 8, "max_position_embeddings": 10}
LANGUAGE = {**SIZES, "vocab_size": len(WORDS), "hidden_size": 8, "num_key_value_heads": 1, "bos_token_id": 2}
LANGUAGE |= {"eos_token_id": 3, "model_type": "llama"}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return tmp_path


@pytest.fixture
def processor():
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(WORDS)}, eos_token="[SEP]")
    return ConceptCLIPProcessor(SiglipImageProcessorPil(size={"height": 12, "width": 12}), tokenizer)


def questions(folder, processor):
    asked = [("is the heart large ?", "yes"), ("is the lung clear ?", "no"), ("heart ?", "yes"), ("?", "unheard of")]
    rows = [QuestionRow(f"q{n}", f"{n}.png", q, a, "open", f"{n}") for n, (q, a) in enumerate(asked)]
    rows.append(QuestionRow("bad", "broken.png", "?", "yes", "open", "bad"))
    dataset = QuestionDataset(folder, rows)
    torch.manual_seed(0)
    base = ConceptCLIPModel(ConceptCLIPConfig(text_config={**TEXT, **NO_DROPOUT}, vision_config=VISION))
    cross = {**SIZES, **NO_DROPOUT, "hidden_size": 12}
    model = ConceptCLIPForVisualQuestionAnswering.from_conceptclip(base, ["no", "yes"], cross_modal_config=cross)
    return dataset, QuestionCollator(processor, ["no", "yes"]), QuestionObjective(), model


def reports(folder, processor):
    texts = ["the heart is large", "clear", "lung clear the heart is large", "the lung"]
    rows = [
        StudyRow(f"s{n}", (f"{n}.png", "0.png") if n % 2 else (f"{n}.png",), t, f"{n}") for n, t in enumerate(texts)
    ]
    rows.append(StudyRow("bad", ("0.png", "broken.png"), "clear", "bad"))
    dataset = StudyDataset(folder, rows)
    torch.manual_seed(0)
    model = ConceptCLIPForReportGeneration(
        ConceptCLIPReportGenerationConfig(vision_config=VISION, text_config=LANGUAGE)
    )
    model.freeze_towers_()
    return dataset, StudyCollator(processor, "report"), ReportObjective(), model


KINDS = pytest.mark.parametrize("make", [questions, reports])


@KINDS
def test_a_picture_that_cannot_be_read_is_named_and_the_others_stay(folder, processor, make):
    dataset, collator, _, _ = make(folder, processor)
    batch = collator([dataset[(0, place)] for place in range(5)])
    assert len(batch["row_ids"]) == len(batch["pixel_values"]) == len(batch["labels"]) == 4
    assert [entry["row_id"] for entry in batch["set_aside"]] == ["bad"]
    assert batch["set_aside"][0]["reason"] == "image not recognised"


@KINDS
def test_micro_batches_give_the_gradient_of_the_whole_batch(folder, processor, make):
    dataset, collator, objective, model = make(folder, processor)
    batch = collator([dataset[place] for place in range(4)])
    found = []
    for num_micro_batches in (1, 3):
        model.zero_grad()
        values = backward(model, objective, batch, num_micro_batches, Accelerator(cpu=True))
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((values, gradients))
    (whole, gradients), (cut, cut_gradients) = found
    torch.testing.assert_close(whole["loss"], cut["loss"])
    assert gradients.keys() == cut_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, cut_gradients[name])
    torch.testing.assert_close(
        whole["loss"], model(**{k: batch[k] for k in objective.inputs if k in batch} | {"labels": batch["labels"]}).loss
    )


@KINDS
def test_a_batch_of_which_nothing_could_be_read_touches_every_trained_parameter(folder, processor, make):
    dataset, collator, objective, model = make(folder, processor)
    batch = collator([dataset[4], Drop("image missing", "", "gone")])
    assert batch["row_ids"] == []
    values = backward(model, objective, batch, 1, Accelerator(cpu=True))
    assert values["loss"] == 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)


def test_an_answer_outside_the_vocabulary_has_no_part_in_the_loss(folder, processor):
    dataset, collator, objective, model = questions(folder, processor)
    batch = collator([dataset[place] for place in range(4)])
    assert batch["labels"].tolist() == [1, 0, 1, -100]
    values = objective.compare(objective.embed(model, batch), batch)
    assert values["num_counted"] == 3
    logits = objective.embed(model, batch)["logits"][:3]
    torch.testing.assert_close(values["loss"], torch.nn.functional.cross_entropy(logits, batch["labels"][:3]))
    assert values["accuracy"] == (logits.argmax(-1) == batch["labels"][:3]).float().mean()


def test_of_prompt_report_and_padding_only_the_report_and_its_end_are_predicted(processor):
    encoded = encode_reports(processor.tokenizer, "report the", ["lung clear", "the heart is large"], max_length=3)
    assert encoded["input_ids"].tolist() == [[11, 5, 9, 10, 3], [11, 5, 5, 6, 7]]  # the longer one is cut: no end
    assert encoded["labels"].tolist() == [[-100, -100, 9, 10, 3], [-100, -100, 5, 6, 7]]
    assert encoded["attention_mask"].tolist() == [[1] * 5, [1] * 5]


def test_a_tokenizer_without_an_end_is_refused(processor):
    processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        encode_reports(processor.tokenizer, "report", ["clear"], 3)


def test_the_default_language_model_is_llama():
    assert isinstance(ConceptCLIPReportGenerationConfig().text_config, LlamaConfig)
