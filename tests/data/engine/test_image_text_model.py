"""Figures judged by a CLIP-like model, here a tiny one that knows nothing."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from medclip_hf.data.engine.figure_type import FigureRules
from medclip_hf.data.engine.image_text_model import PROMPTS, FigureJudge, ImageTextModel
from medclip_hf.data.engine.settings import (
    DecontaminationSettings,
    EngineSettings,
    ModelSettings,
    OutputSettings,
    SourceSettings,
)
from medclip_hf.data.records import FigureRow
from medclip_hf.data.stages import Drop
from medclip_hf.training.tokenizers import train_wordpiece_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = train_wordpiece_tokenizer(list(PROMPTS), vocab_size=300)
    tokenizer.model_max_length = 32
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"eos_token_id": tokenizer.sep_token_id, "bos_token_id": tokenizer.cls_token_id}
    config = CLIPConfig(
        text_config={**tower, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 32},
        vision_config={**tower, "image_size": 64, "patch_size": 16},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    CLIPProcessor(CLIPImageProcessorPil(**sizes), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return ImageTextModel(str(folder), "cpu", batch_size=2)


def row(number, caption="A figure."):
    pixels = np.random.default_rng(number).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return FigureRow(f"row{number}", caption, image_bytes=buffer.getvalue())


def settings(folder, keep="all", min_cosine=0.97):
    return EngineSettings(
        SourceSettings("table", "t.csv"),
        OutputSettings("out"),
        decontamination=DecontaminationSettings(min_cosine=min_cosine),
        figures=FigureRules(keep=keep),
        model=ModelSettings(str(folder)),
    )


def judge(model, folder, keep="all", kind=None):
    found = FigureJudge(model, settings(folder, keep), ([], np.zeros((0, 0), np.float32)))
    if kind:
        found.kinds = [kind] * len(PROMPTS)
    return found


def test_embeddings_have_length_one_and_do_not_depend_on_the_batch(model):
    images = [Image.open(io.BytesIO(row(number).image_bytes)).convert("RGB") for number in range(5)]
    together = model.embed_images(images)
    assert together.shape == (5, 16)
    assert np.allclose(np.linalg.norm(together, axis=1), 1)
    assert np.allclose(model.embed_images(images[4:]), together[4:], atol=1e-5)
    assert model.embed_texts(["a", "a bar chart or a line plot", "b"]).shape == (3, 16)


@pytest.mark.parametrize(
    ("keep", "kind", "is_kept"),
    [
        ("medical", "medical", True),
        ("medical", "picture", False),
        ("medical", "drawing", False),
        ("pictures", "picture", True),
        ("pictures", "drawing", False),
        ("all", "drawing", True),
    ],
)
def test_what_the_model_sees_decides(model, folder, keep, kind, is_kept):
    (outcome,) = judge(model, folder, keep, kind)([row(1)])
    assert isinstance(outcome, FigureRow) == is_kept
    if not is_kept:
        assert outcome.reason == f"figure is no medical image: {kind}"


def test_the_caption_names_the_modality_before_the_model_does(model, folder):
    outcomes = judge(model, folder)([row(1, "Chest CT with a mass."), row(2), row(3)])
    assert outcomes[0].modality == "computed tomography"


def test_a_picture_like_an_evaluation_image_is_dropped_and_the_image_named(model, folder):
    seen = model.embed_images([Image.open(io.BytesIO(row(2).image_bytes)).convert("RGB")])
    found = FigureJudge(model, settings(folder, min_cosine=0.99999), (["set/2.png"], seen))
    outcomes = found([row(1), row(2), row(3)])
    assert [outcome.row_id for outcome in outcomes if isinstance(outcome, Drop)] == ["row2"]
    assert outcomes[1].reason == "evaluation image resembled"
    assert "set/2.png" in outcomes[1].detail


def test_an_image_that_cannot_be_read_is_dropped_and_the_others_judged(model, folder):
    outcomes = judge(model, folder)([row(1), FigureRow("bad", "text", image_bytes=b"nothing"), row(2)])
    assert [outcome.row_id for outcome in outcomes] == ["row1", "bad", "row2"]
    assert isinstance(outcomes[1], Drop)


def test_a_model_of_text_alone_is_refused(tmp_path):
    config = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=50)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not embed images and texts alike"):
        ImageTextModel(str(tmp_path))
