"""Figures judged by a CLIP-like model of `transformers`: medical or not, which modality, shown in an evaluation set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoModel, AutoProcessor

from medclip_hf import register
from medclip_hf.data.engine.figure_images import prepare_image
from medclip_hf.data.engine.figure_type import MODALITIES, named_modality
from medclip_hf.data.engine.settings import EngineSettings
from medclip_hf.data.images import UnreadableImage
from medclip_hf.data.records import FigureRow
from medclip_hf.data.stages import Drop

Embeddings = NDArray[np.float32]  # (rows, dim), of length 1

# What a figure can show besides a modality, and whether that is a medical picture, another picture or a drawing.
PROMPTS = {
    **{f"a medical image, {modality}": "medical" for modality in MODALITIES},
    "a fluorescence microscopy image of cells": "medical",
    "an electron microscopy image": "medical",
    "a clinical photograph of a patient": "medical",
    "a photograph of surgery": "medical",
    "a photograph of an object or a landscape": "picture",
    "a photograph of laboratory equipment": "picture",
    "a photograph of an animal or a plant": "picture",
    "a bar chart or a line plot": "drawing",
    "a flow chart or a block diagram": "drawing",
    "a drawing or an illustration": "drawing",
    "a table of text and numbers": "drawing",
    "a chemical structure or a protein model": "drawing",
    "a western blot or a gel": "drawing",
}
KEPT_KINDS = {"medical": ("medical",), "pictures": ("medical", "picture"), "all": ("medical", "picture", "drawing")}


class ImageTextModel:
    """Embeddings of images and texts by any model of `transformers` with image and text features.

    Args:
        path: folder or Hub name.
        device: ``"auto"`` takes a GPU where there is one.
        batch_size: images or texts at once.

    Raises:
        ValueError: where the model has no image and text features.
    """

    def __init__(self, path: str, device: str = "auto", batch_size: int = 64) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.batch_size = batch_size
        register()  # workers import the package without its models; the judge may be one of them
        self.model = AutoModel.from_pretrained(path).to(self.device).eval()
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "get_text_features"):
            raise ValueError(f"{path} is a {type(self.model).__name__}, which does not embed images and texts alike")
        self.processor = AutoProcessor.from_pretrained(path)

    def embed_images(self, images: Sequence[Image.Image]) -> Embeddings:
        """Embeddings (num_images, dim) of RGB images, of length 1."""
        return self._embed(images, lambda part: self.processor(images=part, return_tensors="pt"), "get_image_features")

    def embed_texts(self, texts: Sequence[str]) -> Embeddings:
        """Embeddings (num_texts, dim) of texts, of length 1."""
        # SigLIP learned from texts padded to the longest length; for the others the padding is masked.
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return self._embed(texts, lambda part: self.processor(text=part, **options), "get_text_features")

    @torch.inference_mode()
    def _embed(self, items: Sequence[Any], encode: Any, method: str) -> Embeddings:
        parts = []
        for start in range(0, len(items), self.batch_size):
            inputs = encode(list(items[start : start + self.batch_size])).to(self.device)
            features = getattr(self.model, method)(**inputs)
            if not isinstance(features, torch.Tensor):
                features = features.pooler_output
            parts.append(torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy())
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


class FigureJudge:
    """Keeps or drops figures by what a model sees in them, and names their modality.

    Args:
        model: that embeds images and texts.
        settings: of the engine.
        evaluation: names and embeddings (num_images, dim) of images that must not be trained on.
    """

    def __init__(
        self, model: ImageTextModel, settings: EngineSettings, evaluation: tuple[list[str], Embeddings]
    ) -> None:
        self.model = model
        self.settings = settings
        self.evaluation_names, self.evaluation_embeddings = evaluation
        self.kinds = list(PROMPTS.values())
        self.prompt_embeddings = model.embed_texts([f"{prompt}." for prompt in PROMPTS])

    def __call__(self, rows: Sequence[FigureRow]) -> list[FigureRow | Drop]:
        """Each row with its modality, or the reason to drop it."""
        outcomes: list[FigureRow | Drop] = []
        for start in range(0, len(rows), self.model.batch_size):
            outcomes += self._judge(rows[start : start + self.model.batch_size])
        return outcomes

    def _judge(self, rows: Sequence[FigureRow]) -> list[FigureRow | Drop]:
        decoded = [self._decode(row) for row in rows]
        images = [image for image in decoded if not isinstance(image, Drop)]
        embeddings = iter(self.model.embed_images(images))
        return [
            image if isinstance(image, Drop) else self._judge_one(row, next(embeddings))
            for row, image in zip(rows, decoded, strict=True)
        ]

    def _judge_one(self, row: FigureRow, embedding: NDArray[np.float32]) -> FigureRow | Drop:
        if len(self.evaluation_embeddings):
            cosines = self.evaluation_embeddings @ embedding
            nearest = int(cosines.argmax())
            if cosines[nearest] >= self.settings.decontamination.min_cosine:
                detail = f"cosine {cosines[nearest]:.3f} with {self.evaluation_names[nearest]}"
                return Drop("evaluation image resembled", detail, row.row_id)
        best = int((self.prompt_embeddings @ embedding).argmax())
        if self.kinds[best] not in KEPT_KINDS[self.settings.figures.keep]:
            return Drop(f"figure is no medical image: {self.kinds[best]}", list(PROMPTS)[best], row.row_id)
        seen = MODALITIES[best] if best < len(MODALITIES) else ""
        return replace(row, modality=row.modality or named_modality(row.caption) or seen)

    def _decode(self, row: FigureRow) -> Image.Image | Drop:
        try:
            return prepare_image(row.image_bytes or b"", row.row_id, self.settings.images)[1]
        except UnreadableImage as error:
            return Drop(error.reason, error.detail, row.row_id)
