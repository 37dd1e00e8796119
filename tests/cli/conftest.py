"""Tiny saved models and files for the command."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
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

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "chest", "effusion", "nodule", "not", "."]
TOWER = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
TEXT = {**TOWER, "vocab_size": len(WORDS), "hidden_size": 8}


def tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})


@pytest.fixture(scope="session")
def conceptclip_folder(tmp_path_factory) -> Path:
    """A saved ConceptCLIP with its processor."""
    torch.manual_seed(0)
    vision = {**TOWER, "hidden_size": 16, "image_size": 12, "patch_size": 4, "hidden_act": "gelu"}
    folder = tmp_path_factory.mktemp("conceptclip")
    ConceptCLIPModel(ConceptCLIPConfig(text_config=TEXT, vision_config=vision)).save_pretrained(folder)
    image_processor = SiglipImageProcessorPil(size={"height": 12, "width": 12})
    ConceptCLIPProcessor(image_processor, tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def fvlm_folder(tmp_path_factory) -> Path:
    """A saved fVLM of two anatomies with its processor."""
    torch.manual_seed(0)
    vision = {**TOWER, "hidden_size": 16, "image_size_dhw": (8, 8, 8), "patch_size_dhw": (4, 4, 4)}
    config = FVLMConfig(
        text_config=TEXT,
        vision_config=vision,
        anatomies=("lung", "heart"),
        feature_layers=(0,),
        pooling_num_attention_heads=2,
        projection_dim=12,
    )
    folder = tmp_path_factory.mktemp("fvlm")
    FVLMModel(config).save_pretrained(folder)
    image_processor = FVLMImageProcessor(
        anatomies=config.anatomies, size_dhw=(8, 8, 8), patch_size_dhw=(4, 4, 4), crop_margin_dhw=(1, 1, 1)
    )
    FVLMProcessor(image_processor, tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with two pictures, one of them deeper, a broken one and a text."""
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in ("a.png", "deeper/b.jpg"):
        Image.fromarray(generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / name)
    (folder / "broken.png").write_text("no image")
    (folder / "notes.txt").write_text("not looked at")
    return folder


@pytest.fixture
def scans(tmp_path) -> tuple[Path, Path]:
    """(folder of two scans, one of them no CT; folder of their label files)."""
    images, labels = tmp_path / "scans", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    generator = np.random.default_rng(0)
    values = generator.integers(-20, 60, (12, 14, 16)).astype(np.int16)
    values[:, :, :6] -= 900
    mask = np.zeros(values.shape, np.uint8)
    mask[3:9, 4:10, 2:6], mask[3:6, 5:9, 8:12] = 10, 51  # TotalSegmentator 2: left upper lobe, heart
    affine = np.diag([-1.0, -1.0, 3.0, 1.0])
    for name, array in (("one", values), ("windowed", np.clip(values, 0, 50))):
        nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine), images / f"{name}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(mask.transpose(2, 1, 0), affine), labels / f"{name}.nii.gz")
    return images, labels
