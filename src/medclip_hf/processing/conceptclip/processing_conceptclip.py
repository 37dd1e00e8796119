"""ConceptCLIP's processor: figures and captions in, pixels, tokens and the token spans of concepts out."""

import io
import logging
import operator
import os
import struct
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin

logger = logging.getLogger(__name__)

MAX_PIXELS = 178_956_970  # what Pillow takes for a decompression bomb; checked here for images opened elsewhere too
MAX_BYTES = 2**30  # of what is fetched from a URL
_TIMEOUT_S = 60
WHITE_16_BIT = 65535
PAPER = (255, 255, 255)  # figures with transparency are drawn for a white page

CharSpan = tuple[int, int]  # [start, end) characters of the raw caption


class ConceptCLIPProcessorKwargs(ProcessingKwargs, total=False):
    """Keyword arguments of a call, with ConceptCLIP's defaults."""

    _defaults = {  # type: ignore[misc] # noqa: RUF012 - as ProcessorMixin wants it
        "text_kwargs": {"padding": True, "truncation": True, "max_length": 77},  # the published context length
        "common_kwargs": {"return_tensors": "pt"},
    }


class ConceptCLIPProcessor(ProcessorMixin):
    """Model inputs from images and texts: a SigLIP image processor and a BERT tokenizer behind one call.

    Args:
        image_processor: resizes and normalises; as published: squashed to 384 x 384, bicubic, mean = std = 0.5.
        tokenizer: a tokenizer that tells the characters of each token (any fast BERT tokenizer).

    Examples:
        >>> processor = ConceptCLIPProcessor.from_pretrained("my-conceptclip")
        >>> caption = "Chest radiograph with left pleural effusion."
        >>> inputs = processor(images="figure.png", text=[caption], concept_char_spans=[[(27, 43)]])
        >>> inputs["concept_token_spans"]
        tensor([[[5, 7]]])
    """

    valid_processor_kwargs = ConceptCLIPProcessorKwargs

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        super().__init__(image_processor, tokenizer)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        concept_char_spans: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs: `pixel_values`, `input_ids`, `attention_mask`, `token_type_ids` and the concepts' places.

        `concept_token_spans` (B, C, 2) int64 and `concept_mask` (B, C) bool come with `concept_char_spans`. C is the
        largest number of concepts of a caption, at least 1, and concept k of a caption stays at place k. A span that
        truncation reached, wholly or in part, or that holds no token, is masked and stands as [0, 0).

        Args:
            images: one image or a (nested) list of: PIL image, path, URL, encoded bytes, array or tensor (see
                [`to_rgb`] for what becomes of 16 bits, transparency and so on).
            text: one caption or a list of captions.
            concept_char_spans: per caption a list of (start, end), characters of the raw caption, end exclusive. For a
                single caption given as a string, its list.
            kwargs: what the image processor (it sees 8-bit RGB) and the tokenizer take. Defaults: `padding=True,
                truncation=True, max_length=77, return_tensors="pt"`.

        Raises:
            ValueError: for an image that cannot be read, or a span outside its caption.
        """
        if images is not None:
            images = [to_rgb(image) for image in _flatten(images)]
            if not images:
                raise ValueError("images is an empty list: give at least one image, or leave it out.")
        if text is not None and len(text) == 0 and not isinstance(text, str):
            raise ValueError("text is an empty list: give at least one caption, or leave it out.")
        if concept_char_spans is None:
            return super().__call__(images=images, text=text, **kwargs)
        if text is None:
            raise ValueError("concept_char_spans came without text: give the captions they stand in.")
        if isinstance(text, str):
            text, concept_char_spans = [text], [concept_char_spans]
        concept_char_spans = _checked_char_spans(text, concept_char_spans)
        wants_offsets = kwargs.pop("return_offsets_mapping", False)
        features = super().__call__(images=images, text=text, return_offsets_mapping=True, **kwargs)
        offsets = features["offset_mapping"] if wants_offsets else features.pop("offset_mapping")
        token_spans, mask = token_spans_of_concepts(text, offsets, concept_char_spans)
        as_tensors = isinstance(features["input_ids"], torch.Tensor)
        features["concept_token_spans"] = torch.from_numpy(token_spans) if as_tensors else token_spans
        features["concept_mask"] = torch.from_numpy(mask) if as_tensors else mask
        return features

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> list[str]:
        """Save as `ProcessorMixin` does, and leave this object as it was: saving code would mark it with `auto_map`."""
        unmarked = [part for part in (self, self.image_processor) if not hasattr(part, "auto_map")]
        files = super().save_pretrained(save_directory, *args, **kwargs)
        for part in unmarked:
            vars(part).pop("auto_map", None)
        return files


def token_spans_of_concepts(
    captions: Sequence[str], offsets: Sequence[Any], concept_char_spans: Sequence[Sequence[CharSpan]]
) -> tuple[np.ndarray, np.ndarray]:
    """Token spans (B, C, 2) int64 of character spans and the mask (B, C) bool of those that are whole.

    A token belongs to a concept if the two share a character. A concept is masked if it has no token, or if characters
    of it, blanks aside, lie beyond the tokens that truncation left.

    Args:
        captions: B raw captions.
        offsets (B, T, 2): [start, end) characters of each token, [0, 0) for special tokens; T may differ by caption.
        concept_char_spans: per caption its (start, end) pairs.
    """
    num_concepts = max([1, *(len(spans) for spans in concept_char_spans)])
    token_spans = np.zeros((len(captions), num_concepts, 2), dtype=np.int64)
    mask = np.zeros((len(captions), num_concepts), dtype=bool)
    for row, (caption, spans) in enumerate(zip(captions, concept_char_spans, strict=True)):
        starts, ends = np.asarray(offsets[row], dtype=np.int64).reshape(-1, 2).T
        is_word = ends > starts
        if not is_word.any():
            continue
        kept_start, kept_end = starts[is_word].min(), ends.max()
        of_span = np.array(spans, dtype=np.int64).reshape(-1, 2, 1)
        touches = is_word & (starts < of_span[:, 1]) & (ends > of_span[:, 0])  # (concepts, tokens)
        first, last = touches.argmax(axis=1), len(starts) - touches[:, ::-1].argmax(axis=1)
        for place, (start, end) in enumerate(spans):
            cut_off = caption[start : min(end, kept_start)] + caption[max(start, kept_end) : end]
            if start < end and touches[place, first[place]] and not cut_off.strip():
                token_spans[row, place] = first[place], last[place]
                mask[row, place] = True
    return token_spans, mask


def to_rgb(image: Any) -> Image.Image:
    """The image as 8-bit RGB, upright: what the image tower was trained on.

    - EXIF orientation is applied; of several frames the first is taken.
    - 16 bits are scaled linearly: 0 stays black, 65535 becomes white. Data of fewer significant bits (a 12-bit
      radiograph) come out dark and are warned of: window them first.
    - Transparency is drawn on white paper, whether it is a channel, a palette entry or a colour key.
    - Arrays and tensors may be (H, W) or have 1, 3 or 4 channels first or last; bool, uint8, uint16, any integers
      within 0..255, or floats within [0, 1].

    Args:
        image: PIL image, path, http(s) or data URL, encoded bytes, array or tensor.

    Raises:
        ValueError: where it cannot be read, has no pixels, or so many that it may be an attack; it names the file.
    """
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _array_to_rgb(_tensor_to_array(image) if isinstance(image, torch.Tensor) else image)
    opened, name = _open(image)
    if opened.width == 0 or opened.height == 0:
        raise ValueError(f"{name} has no pixels: its size is {opened.width} x {opened.height}.")
    if opened.width * opened.height > MAX_PIXELS:
        raise ValueError(
            f"{name} has {opened.width} x {opened.height} pixels, more than the {MAX_PIXELS} allowed. "
            "Scale it down or cut it into tiles first."
        )
    try:
        opened.load()
        is_turned = opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
        upright = ImageOps.exif_transpose(opened) if is_turned else opened  # which would copy it all the same
    except (OSError, SyntaxError, EOFError, ValueError, struct.error, IndexError) as error:  # all by Pillow's decoders
        raise ValueError(f"{name} cannot be decoded: {error}. The file may be truncated or damaged.") from error
    return _pil_to_rgb(upright, name)


def _open(image: Any) -> tuple[Image.Image, str]:
    """The image, perhaps not decoded yet, and what to call it in an error."""
    if isinstance(image, Image.Image):
        return image, getattr(image, "filename", "") or "The image"
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:image/")):
        return _decoder(_fetch(image), image[:200]), image[:200]
    if not isinstance(image, (str, os.PathLike, bytes)):
        raise ValueError(
            f"An image should be a PIL image, a path, a URL, bytes, an array or a tensor, got {type(image).__name__}."
        )
    name = f"The image of {len(image)} bytes" if isinstance(image, bytes) else str(image)[:1000]
    if not isinstance(image, bytes) and not _is_file(image):
        raise ValueError(f"{name} is not a file. Give the path of an image.")
    return _decoder(image, name), name


def _is_file(path: Any) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # encoded bytes as text are too long for a name
        return False


def _decoder(image: Any, name: str) -> Image.Image:
    """The image of encoded bytes or of a path, perhaps not decoded yet."""
    try:
        return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} may be a decompression bomb: {error}") from error
    except (OSError, SyntaxError, EOFError, struct.error) as error:
        raise ValueError(f"{name} cannot be opened as an image: {error}") from error


def _fetch(url: str) -> bytes:
    """What lies at a URL; not by `load_image` of transformers, which turns 16 bits to white and transparency to black.

    Raises:
        ValueError: it cannot be fetched, or is larger than `MAX_BYTES`.
    """
    try:
        asked = Request(url, headers={"User-Agent": "medclip-hf"})  # noqa: S310 - the caller checked the scheme
        with urlopen(asked, timeout=_TIMEOUT_S) as answer:  # noqa: S310
            content = answer.read(MAX_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise ValueError(f"{url[:200]} cannot be fetched: {error}. Check the address and the network.") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"{url[:200]} has more than the {MAX_BYTES} bytes allowed. Fetch and scale it down first.")
    return content


def _pil_to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray(_scale_16_bit(np.asarray(image), name)).convert("RGB")
    if image.mode == "F":
        return _array_to_rgb(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (*PAPER, 255))
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def _tensor_to_array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # which NumPy does not know
    return tensor.detach().cpu().numpy()


def _array_to_rgb(array: np.ndarray) -> Image.Image:
    if array.dtype.kind not in "biuf":
        raise ValueError(f"An image array should hold numbers, got {array.dtype}.")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"An image array should be (H, W), (H, W, channels) or (channels, H, W), got {array.shape}.")
    levels = _to_8_bit(array)
    if levels.ndim == 3:
        if infer_channel_dimension_format(levels, num_channels=(1, 3, 4)) == ChannelDimension.FIRST:
            levels = np.moveaxis(levels, 0, -1)
        levels = levels[..., 0] if levels.shape[-1] == 1 else levels
    return _pil_to_rgb(Image.fromarray(np.ascontiguousarray(levels)), "The image")


def _to_8_bit(array: np.ndarray) -> np.ndarray:
    """The same values on a scale of 0 to 255, as uint8."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return _scale_16_bit(array, "The image")
    low, high = array.min(), array.max()
    if np.issubdtype(array.dtype, np.integer) and low >= 0 and high <= 255:
        return array.astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating) and low >= 0 and high <= 1:  # false for NaN
        return np.round(array * 255).astype(np.uint8)
    raise ValueError(
        f"An image array of {array.dtype} should hold integers within 0..255 or floats within [0, 1], got values from "
        f"{low} to {high}. Window it first; 16-bit images are uint16."
    )


def _scale_16_bit(array: np.ndarray, name: str) -> np.ndarray:
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > WHITE_16_BIT:
        raise ValueError(f"{name} holds values from {low} to {high}, beyond 16 bits. Window it to 8 or 16 bits first.")
    if 255 < high < 4096:
        logger.warning("%s has 16 bits but its brightest value is %d: it will look dark. Window it first.", name, high)
    return ((array.astype(np.uint32) * 255 + WHITE_16_BIT // 2) // WHITE_16_BIT).astype(np.uint8)


def _flatten(images: Any) -> list[Any]:
    """A flat list of single images."""
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in _flatten(item)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def _checked_char_spans(captions: Sequence[str], concept_char_spans: Sequence[Any]) -> list[list[CharSpan]]:
    """The spans as pairs of integers, one list a caption; raises where they are none or lie outside their caption."""
    if len(captions) != len(concept_char_spans):
        raise ValueError(
            f"concept_char_spans needs one list a caption, got {len(concept_char_spans)} lists for "
            f"{len(captions)} captions."
        )
    checked = []
    for row, (caption, spans) in enumerate(zip(captions, concept_char_spans, strict=True)):
        try:
            pairs = [(operator.index(start), operator.index(end)) for start, end in spans]
        except (TypeError, ValueError) as error:
            raise ValueError(f"Caption {row} needs a list of (start, end) integers, got {spans!r}.") from error
        for start, end in pairs:
            if not 0 <= start <= end <= len(caption):
                raise ValueError(
                    f"Caption {row} has {len(caption)} characters, but a concept is said to stand at [{start}, {end})."
                )
        checked.append(pairs)
    return checked


__all__ = ["ConceptCLIPProcessor", "to_rgb"]
