"""Tiny models with random weights, to see the page where nothing was trained; the page says in red that they are."""

from pathlib import Path
from typing import Any

import torch
from examples import DRAWN_CT_FINDINGS, FIGURE_CONCEPTS, FIGURE_PROMPTS
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
from medclip_hf.data.ct.anatomy import THORACIC_ANATOMIES

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-"
_SIZE_DHW, _PATCH_DHW = (40, 32, 40), (8, 8, 8)
_LAYERS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


def make_untrained(kind: str, folder: Path, seed: int = 0) -> Path:
    """The folder of a new untrained model, "conceptclip" or "fvlm"."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    text = {**_LAYERS, "vocab_size": len(tokenizer)}
    if kind == "conceptclip":
        small = {**_LAYERS, "image_size": 64, "patch_size": 8}
        ConceptCLIPModel(ConceptCLIPConfig(text_config=text, vision_config=small)).save_pretrained(folder)
        ConceptCLIPProcessor(SiglipImageProcessorPil(size={"height": 64, "width": 64}), tokenizer).save_pretrained(
            folder
        )
        return folder
    vision: dict[str, Any] = {
        **_LAYERS,
        "num_hidden_layers": 2,
        "image_size_dhw": _SIZE_DHW,
        "patch_size_dhw": _PATCH_DHW,
    }
    config = FVLMConfig(
        text_config=text,
        vision_config=vision,
        anatomies=THORACIC_ANATOMIES,
        feature_layers=(0,),
        pooling_num_attention_heads=2,
        projection_dim=16,
    )
    model = FVLMModel(config)
    heads: Any = model.anatomy_heads
    for head in heads:  # they start at zero, where all anatomies are alike
        torch.nn.init.normal_(head.query)
    model.save_pretrained(folder)
    image_processor = FVLMImageProcessor(
        anatomies=THORACIC_ANATOMIES,
        size_dhw=_SIZE_DHW,
        patch_size_dhw=_PATCH_DHW,
        crop_margin_dhw=(2, 2, 2),
        spacing_mm_dhw=(8.0, 8.0, 8.0),
    )
    FVLMProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def _tokenizer() -> BertTokenizer:
    """Words of the examples, and letters for all others."""
    texts = [
        *FIGURE_CONCEPTS,
        *FIGURE_PROMPTS,
        *(text for finding in DRAWN_CT_FINDINGS for text in (finding.absent, finding.present)),
    ]
    words = {word for text in texts for word in text.lower().replace(".", "").replace("-", " ").split()}
    letters = [*_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *sorted(words - set(letters))]
    return BertTokenizer(vocab={word: place for place, word in enumerate(vocabulary)})
