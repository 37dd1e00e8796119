"""fVLM's processor: CT volumes and the texts of their anatomies in, model inputs out."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin, TextKwargs

from .image_processing_fvlm import FVLMImageProcessor

MAX_TEXT_LENGTH = 384  # tokens, as published
_IMAGE_ARGUMENTS = ("spacing_mm_dhw", "orientation", "do_crop", "do_window", "do_pad")


class FVLMProcessor(ProcessorMixin):
    """Model inputs from volumes and texts: `FVLMImageProcessor` and a BERT tokenizer behind one call.

    Args:
        image_processor: see `FVLMImageProcessor`; it keeps the contract on orientation, spacing and unit.
        tokenizer: of the text tower.

    Examples:
        >>> processor = FVLMProcessor.from_pretrained("my-fvlm")
        >>> inputs = processor(
        ...     images=[volume_hu],
        ...     anatomy_mask=[mask],
        ...     text=[{"heart": "Cardiomegaly.", "aorta": "aorta shows no significant abnormalities."}],
        ... )
        >>> inputs["text_index"]  # lung, heart, esophagus, aorta
        tensor([[-1,  0, -1,  1]])
    """

    def __init__(self, image_processor: FVLMImageProcessor, tokenizer: Any) -> None:
        super().__init__(image_processor, tokenizer)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | Sequence[Mapping[str, str]] | None = None,
        anatomy_mask: Any = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs: `pixel_values`, `anatomy_mask`, `input_ids`, `attention_mask`, and where texts belong.

        Texts are padded to the longest of the batch. Given as one mapping from anatomy to text for each volume, equal
        texts are encoded once, and `text_index` (B, A) int64 tells the row of each anatomy's text (-1: none or empty),
        `text_ids` (T,) int64 what equal texts of other batches have in common, a hash of their content.

        Args:
            images: a volume (D, H, W) in Hounsfield units or a list of volumes: see `FVLMImageProcessor.preprocess`.
            text: prompts, or one mapping from anatomy to text for each volume (a single one for a single volume).
            anatomy_mask: a mask (D, H, W) of integer ids, or a list of masks.
            return_tensors: "pt" or "np".
            **kwargs: what the image processor takes (`spacing_mm_dhw`, `orientation`, `do_crop`, `do_window`,
                `do_pad`), and what the tokenizer takes (defaults: `padding=True, truncation=True, max_length=384`).

        Raises:
            ValueError: nothing came, a volume or mask cannot be used, an anatomy or an argument is unknown, or there is
                no text.
        """
        if images is None and text is None:
            raise ValueError("Neither images nor text came; give volumes, texts or both.")
        if images is None and anatomy_mask is not None:
            raise ValueError("anatomy_mask came without images: give the volumes it belongs to.")
        # A misspelt `orientation` must not pass for one that was checked.
        if unknown := sorted(set(kwargs) - set(_IMAGE_ARGUMENTS) - set(TextKwargs.__annotations__)):
            raise ValueError(f"Neither the image processor nor the tokenizer knows {', '.join(unknown)}.")
        image_arguments = {name: kwargs.pop(name) for name in _IMAGE_ARGUMENTS if name in kwargs}
        features: dict[str, Any] = {}
        if images is not None:
            features |= self.image_processor(
                images, anatomy_mask=anatomy_mask, return_tensors=return_tensors, **image_arguments
            )
        if text is not None:
            features |= self._text_features(text, return_tensors, kwargs)
            if "text_index" in features and images is not None:
                self._check_one_text_each(len(features["text_index"]), len(features["pixel_values"]))
        return BatchFeature(features)

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything a call can give the model."""
        return ["pixel_values", "anatomy_mask", "input_ids", "attention_mask", "text_index", "text_ids"]

    def _text_features(
        self,
        text: str | Sequence[str] | Sequence[Mapping[str, str]],
        return_tensors: str | None,
        arguments: dict[str, Any],
    ) -> dict[str, Any]:
        """Encoded texts, and for mappings the places of the texts."""
        defaults = {"padding": True, "truncation": True, "max_length": MAX_TEXT_LENGTH, "return_token_type_ids": False}
        texts: Any = [text] if isinstance(text, str | Mapping) else text
        if not isinstance(texts, Sequence) or not all(isinstance(entry, str | Mapping) for entry in texts):
            raise ValueError(
                f"text should be a string, a mapping from anatomy to text or a list of such, got {text!r}."
            )
        places: dict[str, Any] = {}
        if any(isinstance(entry, Mapping) for entry in texts):
            texts, text_index = index_texts(texts, self.image_processor.anatomies)
            places = {
                "text_index": torch.tensor(text_index, dtype=torch.int64),
                "text_ids": torch.tensor([text_id(entry) for entry in texts], dtype=torch.int64),
            }
        if not texts:
            raise ValueError("text holds no text at all; leave it out to embed volumes alone.")
        encoded = self.tokenizer(texts, return_tensors=return_tensors, **defaults | arguments)
        if return_tensors == "np":
            places = {name: value.numpy() for name, value in places.items()}
        return {**encoded, **places}

    @staticmethod
    def _check_one_text_each(num_texts: int, num_volumes: int) -> None:
        if num_texts != num_volumes:
            raise ValueError(f"{num_volumes} volumes came with texts of {num_texts}; give one mapping for each volume.")


def index_texts(texts: Sequence[Mapping[str, str]], anatomies: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """The T distinct texts in order of appearance, and for each of B volumes the row of every anatomy's text.

    Args:
        texts: for each volume, anatomy -> text; an anatomy that is missing, or whose text is blank, gets -1.
        anatomies: names and order of the columns.

    Raises:
        ValueError: an entry is no mapping from names to strings, or names an unknown anatomy.
    """
    rows: dict[str, int] = {}
    text_index = []
    for place, entry in enumerate(texts):
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"text[{place}] must be a mapping from anatomy to text like the others, but {entry!r} came."
            )
        unknown = sorted(set(entry) - set(anatomies))
        if unknown:
            raise ValueError(f"text[{place}] names the anatomies {unknown}; the model knows {list(anatomies)}.")
        if wrong := [anatomy for anatomy, value in entry.items() if not isinstance(value, str)]:
            raise ValueError(f"text[{place}] holds {entry[wrong[0]]!r} for {wrong[0]}; leave out what has no text.")
        stripped = [entry.get(anatomy, "").strip() for anatomy in anatomies]
        text_index.append([rows.setdefault(text, len(rows)) if text else -1 for text in stripped])
    return list(rows), text_index


def text_id(text: str) -> int:
    """A number that equal texts share on every machine: 64 bits of BLAKE2b of the text, signed."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


__all__ = ["FVLMProcessor"]
