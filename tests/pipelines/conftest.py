"""Tiny saved models of both kinds, scans and pictures, and a process in which the package cannot be imported."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertTokenizer
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import (
    ConceptCLIPConfig,
    ConceptCLIPModel,
    ConceptCLIPProcessor,
    FVLMConfig,
    FVLMImageProcessor,
    FVLMModel,
    FVLMProcessor,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "chest", "left", "effusion", "nodule", "not", "card", ".", "of"]
TEXT = {
    "vocab_size": len(WORDS),
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}


@pytest.fixture(scope="session")
def conceptclip_folder(tmp_path_factory) -> Path:
    """A saved ConceptCLIP of 3 x 3 patches with its processor."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    vision |= {"image_size": 13, "patch_size": 4, "hidden_act": "gelu"}
    folder = tmp_path_factory.mktemp("conceptclip")
    ConceptCLIPModel(ConceptCLIPConfig(text_config=TEXT, vision_config=vision)).save_pretrained(folder)
    image_processor = SiglipImageProcessorPil(size={"height": 13, "width": 13})
    ConceptCLIPProcessor(image_processor, _tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def fvlm_folder(tmp_path_factory) -> Path:
    """A saved fVLM of two anatomies with its processor."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    vision |= {"image_size_dhw": (8, 8, 8), "patch_size_dhw": (4, 4, 4)}
    config = FVLMConfig(
        text_config=TEXT,
        vision_config=vision,
        anatomies=("lung", "heart"),
        feature_layers=(0,),
        pooling_num_attention_heads=2,
        projection_dim=12,
    )
    model = FVLMModel(config)
    torch.nn.init.normal_(model.anatomy_heads[0].query)
    folder = tmp_path_factory.mktemp("fvlm")
    model.save_pretrained(folder)
    image_processor = FVLMImageProcessor(
        anatomies=config.anatomies, size_dhw=(8, 8, 8), patch_size_dhw=(4, 4, 4), crop_margin_dhw=(1, 1, 1)
    )
    FVLMProcessor(image_processor, _tokenizer()).save_pretrained(folder)
    return folder


def _tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})


@pytest.fixture
def volume() -> np.ndarray:
    """(12, 14, 16) in Hounsfield units: air around, tissue inside."""
    generator = np.random.default_rng(0)
    values = generator.integers(-20, 60, (12, 14, 16)).astype(np.int16)
    values[:, :, :6] -= 900
    return values


@pytest.fixture
def mask() -> np.ndarray:
    """Its mask: lung (1) away from the faces, heart (2) at the face at the feet."""
    ids = np.zeros((12, 14, 16), np.uint8)
    ids[3:9, 4:10, 2:6] = 1
    ids[0:5, 5:9, 8:12] = 2
    return ids
