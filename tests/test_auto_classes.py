"""Importing the package makes the Auto classes and stock pipelines of transformers know its models."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
    pipeline,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, ConceptCLIPProcessor

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "chest", "left", "effusion", "a", "radiograph", "of", "."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    config = ConceptCLIPConfig(
        text_config={**sizes, "vocab_size": len(WORDS), "hidden_size": 8},
        vision_config={**sizes, "hidden_size": 16, "image_size": 12, "patch_size": 4, "hidden_act": "gelu"},
    )
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    folder = tmp_path_factory.mktemp("saved")
    ConceptCLIPModel(config).save_pretrained(folder)
    ConceptCLIPProcessor(SiglipImageProcessorPil(size={"height": 12, "width": 12}), tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("auto_class", "expected"),
    [
        (AutoConfig, ConceptCLIPConfig),
        (AutoModel, ConceptCLIPModel),
        (AutoModelForZeroShotImageClassification, ConceptCLIPModel),
        (AutoProcessor, ConceptCLIPProcessor),
        (AutoTokenizer, BertTokenizer),
        (AutoImageProcessor, SiglipImageProcessorPil),
    ],
)
@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_auto_classes_find_the_installed_classes_in_a_saved_folder(folder, auto_class, expected, trust_remote_code):
    assert type(auto_class.from_pretrained(folder, trust_remote_code=trust_remote_code)) is expected


def test_the_model_type_alone_names_configuration_and_model(folder):
    assert AutoConfig.for_model("conceptclip").model_type == "conceptclip"
    assert type(AutoModel.from_config(AutoConfig.from_pretrained(folder))) is ConceptCLIPModel


def test_the_stock_zero_shot_pipeline_scores_labels(folder):
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    image = Image.effect_noise((30, 20), 60).convert("RGB")
    labels = ["left effusion", "chest"]
    template = "a radiograph of {}."
    scores = classify(image, candidate_labels=labels, hypothesis_template=template)
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**processor(images=image, text=[template.format(label) for label in labels]))
    expected = outputs.logits_per_image.softmax(-1)[0].tolist()
    assert {entry["label"]: entry["score"] for entry in scores} == pytest.approx(
        dict(zip(labels, expected, strict=True))
    )


def test_the_stock_feature_pipeline_gives_the_image_embedding(folder):
    embed = pipeline("image-feature-extraction", model=str(folder))
    image = Image.effect_noise((30, 20), 60).convert("RGB")
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        expected = model(**processor(images=image)).image_embeds
    torch.testing.assert_close(embed(image, return_tensors=True), expected)


def test_the_stock_feature_pipeline_takes_batches(folder):
    embed = pipeline("image-feature-extraction", model=str(folder))
    images = [Image.effect_noise((30, 20), sigma).convert("RGB") for sigma in (20, 60, 90)]
    together = embed(images, batch_size=2, return_tensors=True)
    torch.testing.assert_close(torch.cat(together), torch.cat([embed(image, return_tensors=True) for image in images]))
