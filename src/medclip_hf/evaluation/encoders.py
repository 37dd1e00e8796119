"""One small interface for every model that is compared: pictures and texts in, L2-normalised embeddings out.

ConceptCLIP, the CLIP- and SigLIP-like models of transformers, and open_clip's models stand behind the same `Encoder`,
so that a protocol never asks which one it has.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from medclip_hf.evaluation.zero_shot import ClassEmbeddings, check_prompts, embed_classes
from medclip_hf.modeling.conceptclip import ConceptCLIPModel
from medclip_hf.modeling.loading import is_path, load_complete
from medclip_hf.processing.conceptclip.processing_conceptclip import to_rgb
from medclip_hf.processing.pixels import SCALING, figure_scaling, scaled_pixels

logger = logging.getLogger(__name__)

OPEN_CLIP_PREFIX = "open_clip:"
_TEXT_BATCH = 64
_HUB_TIMEOUT_S = 10.0
# Changes when the meaning of what an encoder gives changes, so that older caches are not taken for new ones.
_INTERFACE_VERSION = 2
# Where a model came from and how it was loaded; precision is named apart.
_VOLATILE_KEYS = {
    *("_name_or_path", "name_or_path", "transformers_version", "auto_map", "architectures", "dtype", "torch_dtype"),
    *("image_processor_type", "processor_class", "_processor_class", "data_format"),
}
_LARGEST_SENSIBLE_LENGTH = 100_000  # tokenizers without a limit declare 10^30


@dataclass(frozen=True)
class ImageEmbeddings:
    """What a model makes of N images; float32, on its device.

    Args:
        image_embeds: (N, D), L2-normalised.
        image_norms: (N,), length of each vector before: image_embeds · image_norms is what a linear probe takes.
        patch_embeds: (N, P, D), L2-normalised; None without patch heads.
    """

    image_embeds: Tensor
    image_norms: Tensor
    patch_embeds: Tensor | None = None


@dataclass(frozen=True)
class Encoder:
    """A model behind the interface that every protocol takes.

    Args:
        name: what to call it in a table.
        identity: hash of weights, configuration, preprocessing, tokenizer and precision: what its embeddings depend on.
        device: where it computes.
        dtype: in which precision.
        logit_scale: exponentiated.
        logit_bias: 0 where the model has none.
        concept_logit_scale: of patches against concepts, exponentiated; None without patch heads.
        concept_logit_bias: of the same.
        num_patches: of an image; 0 without patch heads.
        preprocess: (3, H, W) pixels of a picture (PIL image, path or encoded bytes), on the CPU; for loader workers.
            Whole numbers where `forward_pixels` scales them, else as the model takes them.
        forward_pixels: embeddings of (N, 3, H, W) on the device.
        forward_texts: (K, D) of a batch of texts, L2-normalised.
        forward_classes: class and concept vectors of (names, templates); None: whole prompts alone.
    """

    name: str
    identity: str
    device: torch.device
    dtype: torch.dtype
    logit_scale: float
    logit_bias: float
    concept_logit_scale: float | None
    concept_logit_bias: float
    num_patches: int
    preprocess: Callable[[Any], Tensor]
    forward_pixels: Callable[[Tensor], ImageEmbeddings]
    forward_texts: Callable[[list[str]], Tensor]
    forward_classes: Callable[[Sequence[str], Sequence[str]], ClassEmbeddings] | None = None

    @property
    def has_patches(self) -> bool:
        """Whether `encode_images` gives patches that are comparable with concepts."""
        return self.concept_logit_scale is not None

    def encode_images(self, images: Sequence[Any]) -> ImageEmbeddings:
        """Embeddings of pictures: PIL images, paths or encoded bytes.

        Raises:
            ValueError: there is none, or one cannot be read.
        """
        if not len(images):
            raise ValueError("expected at least one image to encode, none came")
        return self.encode_pixels(torch.stack([self.preprocess(image) for image in images]))

    @torch.no_grad()
    def encode_pixels(self, pixel_values: Tensor) -> ImageEmbeddings:
        """Embeddings of what `preprocess` gave, (N, 3, H, W)."""
        dtype = self.dtype if pixel_values.is_floating_point() else pixel_values.dtype
        return self.forward_pixels(pixel_values.to(self.device, dtype, non_blocking=True))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], batch_size: int = _TEXT_BATCH) -> Tensor:
        """Embeddings (K, D) of texts, L2-normalised float32, in their order.

        Texts of like length share a batch, since each batch is padded to its longest.

        Raises:
            ValueError: there is none, or one is empty or no string.
        """
        if isinstance(texts, str) or not len(texts):
            raise ValueError("texts must be a list of at least one string")
        empty = [place for place, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]
        if empty:
            raise ValueError(f"{len(empty)} of {len(texts)} texts are empty or no string, first at place {empty[0]}")
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        parts = [
            self.forward_texts([texts[place] for place in order[first : first + batch_size]])
            for first in range(0, len(order), batch_size)
        ]
        embeds = torch.cat(parts)
        return embeds[torch.tensor(order, device=embeds.device).argsort()]

    @torch.no_grad()
    def encode_classes(self, class_names: Sequence[str], templates: Sequence[str]) -> ClassEmbeddings:
        """Vectors of every class in every template; see `zero_shot.embed_classes`.

        Raises:
            ValueError: as `zero_shot.embed_classes`.
        """
        if self.forward_classes is not None:
            return self.forward_classes(class_names, templates)
        names, patterns = check_prompts(class_names, templates)
        prompts = [pattern.replace("{}", name) for pattern in patterns for name in names]
        return ClassEmbeddings(names, patterns, self.encode_texts(prompts).unflatten(0, (len(patterns), len(names))))


def load_encoder(
    model: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    name: str | None = None,
    revision: str | None = None,
) -> Encoder:
    """The encoder of a model in a folder, on the Hub, or of open_clip.

    Args:
        model: folder or Hub name of ConceptCLIP or a CLIP- or SigLIP-like model of transformers; or
            ``open_clip:<architecture>/<pretrained tag>``, ``open_clip:hf-hub:<repository>``.
        device: default: the accelerator if there is one.
        dtype: "auto": bfloat16 on an accelerator, where it pays, float32 on the CPU. Else a torch dtype or its name.
        name: in tables; default: the last part of `model`.
        revision: of a repository on the Hub.

    Raises:
        ValueError: there is no such model, its weights are incomplete, or it has no image and text embeddings.
        ImportError: open_clip is asked for and not installed.
    """
    place = torch.device(device) if device else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = _dtype_of(dtype, place)
    if str(model).startswith(OPEN_CLIP_PREFIX):
        return _load_open_clip(str(model).removeprefix(OPEN_CLIP_PREFIX), place, precision, name)
    check_model_place(str(model), revision)
    loaded, processor = load_complete(str(model), revision=revision, dtype=precision)
    return make_encoder(
        loaded, processor, device=place, dtype=precision, name=name or Path(str(model)).resolve().name or str(model)
    )


def check_model_place(model: str, revision: str | None = None) -> None:
    """Ask once whether a model is there: loading would ask again and again for a minute where no network is.

    Args:
        model: folder or Hub name.
        revision: of a repository on the Hub.

    Raises:
        ValueError: it is a path without a folder, or a name that neither the cache nor the Hub has.
    """
    if Path(model).is_dir():
        return
    if Path(model).exists() or is_path(model):
        raise ValueError(f"there is no folder {model}: name the folder of a model, or a repository of the Hub.")
    try:
        if isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str):
            return
        HfApi().model_info(model, revision=revision, timeout=_HUB_TIMEOUT_S)
    except (OSError, ValueError, HTTPError) as error:  # the Hub's own, of the connection, of the name
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{model} is no folder on this disk, not in the cache, and the Hub could not give it: {reason} Name the "
            "folder of a model, or a repository of the Hub that you can reach."
        ) from error


def make_encoder(
    model: PreTrainedModel,
    processor: Any,
    *,
    name: str,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
) -> Encoder:
    """The encoder of a model in memory; it is put into evaluation mode, on `device` and in `dtype`.

    Args:
        model: `ConceptCLIPModel`, or any with `get_image_features` and `get_text_features`.
        processor: image processor and tokenizer behind one call.
        name: in tables.
        device: see `load_encoder`.
        dtype: see `load_encoder`.

    Raises:
        ValueError: the model has no such methods, or the processor lacks a part.
    """
    place = torch.device(device) if device else next(model.parameters()).device
    precision = _dtype_of(dtype, place)
    for method in ("get_image_features", "get_text_features"):
        if not hasattr(model, method):
            raise ValueError(
                f"{name} is a {type(model).__name__}, which has no {method}: expected ConceptCLIP or a CLIP- or "
                "SigLIP-like model with an image and a text tower. A CT model is scored by scripts/score_ct.py."
            )
    for part in ("image_processor", "tokenizer"):
        if getattr(processor, part, None) is None:
            raise ValueError(f"the processor of {name} has no {part}; save the whole processor beside the model.")
    _move(model, place, precision)
    if isinstance(model, ConceptCLIPModel):
        return _conceptclip_encoder(model, processor, name, place, precision)
    return _transformers_encoder(model, processor, name, place, precision)


def _move(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Put a model there, in that precision and in evaluation mode; its scalars, rounded, would shift every logit."""
    scalars = {name: value.detach().clone() for name, value in model.named_parameters() if value.numel() == 1}
    torch.nn.Module.to(model, device=device, dtype=dtype).eval()  # in place, as `to` of a module is
    for name, value in scalars.items():
        model.get_parameter(name).data = value.to(device)


def _conceptclip_encoder(
    model: ConceptCLIPModel, processor: Any, name: str, device: torch.device, dtype: torch.dtype
) -> Encoder:
    has_patches = bool(model.config.use_patch_concept_alignment)
    vision = model.config.vision_config
    preprocess, scale = _picture_reader(processor.image_processor, device)

    def forward_pixels(pixel_values: Tensor) -> ImageEmbeddings:
        outputs = model(pixel_values=scale(pixel_values).to(dtype), return_logits=False)
        pooled = outputs.vision_model_output.pooler_output.float()
        patches = None if outputs.patch_embeds is None else outputs.patch_embeds.float()
        return ImageEmbeddings(_normalized(pooled), pooled.norm(dim=-1), patches)

    def forward_texts(texts: list[str]) -> Tensor:
        inputs = processor(text=texts, return_tensors="pt").to(device)
        return _normalized(model.get_text_features(**inputs).pooler_output)

    return Encoder(
        name=name,
        identity=model_identity(model, processor, dtype),
        device=device,
        dtype=dtype,
        logit_scale=float(model.logit_scale.detach().double().exp()),
        logit_bias=float(model.logit_bias.detach()),
        concept_logit_scale=float(model.concept_logit_scale.detach().double().exp()) if has_patches else None,
        concept_logit_bias=float(model.concept_logit_bias.detach()) if has_patches else 0.0,
        num_patches=(vision.image_size // vision.patch_size) ** 2 if has_patches else 0,
        preprocess=preprocess,
        forward_pixels=forward_pixels,
        forward_texts=forward_texts,
        forward_classes=lambda names, templates: embed_classes(model, processor, names, templates),
    )


def _transformers_encoder(model: Any, processor: Any, name: str, device: torch.device, dtype: torch.dtype) -> Encoder:
    text_options = _text_options(model, processor.tokenizer)
    preprocess, scale = _picture_reader(processor.image_processor, device)

    def forward_pixels(pixel_values: Tensor) -> ImageEmbeddings:
        pooled = _pooled(model.get_image_features(pixel_values=scale(pixel_values).to(dtype))).float()
        return ImageEmbeddings(_normalized(pooled), pooled.norm(dim=-1))

    def forward_texts(texts: list[str]) -> Tensor:
        inputs = processor.tokenizer(texts, return_tensors="pt", **text_options).to(device)
        return _normalized(_pooled(model.get_text_features(**inputs)))

    return Encoder(
        name=name,
        identity=model_identity(model, processor, dtype),
        device=device,
        dtype=dtype,
        logit_scale=_exponentiated(getattr(model, "logit_scale", None)),
        logit_bias=_scalar(getattr(model, "logit_bias", None)),
        concept_logit_scale=None,
        concept_logit_bias=0.0,
        num_patches=0,
        preprocess=preprocess,
        forward_pixels=forward_pixels,
        forward_texts=forward_texts,
    )


def _picture_reader(
    image_processor: Any, device: torch.device
) -> tuple[Callable[[Any], Tensor], Callable[[Tensor], Tensor]]:
    """What makes pixels (3, H, W) of a picture, and what makes the model's input of a batch of them on the device.

    An image processor that only scales at its end hands over bytes: that spares a worker a third of its time and three
    quarters of what it sends. Whether it does is tried on a picture; any other makes the model's input itself.
    """

    def read(image: Any, **options: Any) -> Tensor:
        # The same reading for every model: 16 bits, transparency and EXIF must not decide who wins.
        return image_processor(images=to_rgb(image), return_tensors="pt", **options)["pixel_values"][0]

    def as_it_is(pixel_values: Tensor) -> Tensor:
        return pixel_values

    if not all(hasattr(image_processor, name) for name in ("do_rescale", "rescale_factor", "do_normalize")):
        return read, as_it_is
    scaling = figure_scaling(image_processor, 1).to(device)
    read_raw = partial(read, do_rescale=False, do_normalize=False)

    def scale(pixel_values: Tensor) -> Tensor:
        is_scaled = pixel_values.is_floating_point()
        return pixel_values if is_scaled else scaled_pixels({"pixel_values": pixel_values, SCALING: scaling})

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    raw, expected = read_raw(picture), read(picture).float()
    if raw.dtype != torch.uint8 or raw.shape != expected.shape:
        return read, as_it_is
    is_same = torch.allclose(scale(raw[None].to(device))[0].cpu(), expected, atol=1e-5)
    return (read_raw, scale) if is_same else (read, as_it_is)


def _text_options(model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """How the model's texts are padded and cut: SigLIP was trained on texts padded to its full length."""
    text_config = getattr(model.config, "text_config", model.config)
    limits = [int(tokenizer.model_max_length), int(getattr(text_config, "max_position_embeddings", 0) or 0)]
    sensible = [limit for limit in limits if 0 < limit < _LARGEST_SENSIBLE_LENGTH]
    padding = "max_length" if "siglip" in model.config.model_type and sensible else True
    return {"padding": padding, "truncation": bool(sensible), **({"max_length": min(sensible)} if sensible else {})}


def _load_open_clip(spec: str, device: torch.device, dtype: torch.dtype, name: str | None) -> Encoder:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            f"{OPEN_CLIP_PREFIX}{spec} needs open_clip, which needs torchvision: pip install open_clip_torch in an "
            "environment whose torchvision matches its torch."
        ) from error
    architecture, _, pretrained = (spec, "", "") if spec.startswith("hf-hub:") else spec.partition("/")
    try:
        model, preprocess = open_clip.create_model_from_pretrained(
            architecture, pretrained=pretrained or None, device=device
        )
        tokenizer = open_clip.get_tokenizer(architecture)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"open_clip cannot load {spec!r}: {error}") from error
    return make_open_clip_encoder(
        model, preprocess, tokenizer, name=name or spec.rsplit("/", 1)[-1], device=device, dtype=dtype
    )


def make_open_clip_encoder(
    model: Any,
    preprocess: Callable[[Any], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    *,
    name: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = "auto",
) -> Encoder:
    """The encoder of what `open_clip.create_model_from_pretrained` and `open_clip.get_tokenizer` give.

    Args:
        model: has `encode_image`, `encode_text`, `logit_scale` (a logarithm) and perhaps `logit_bias`.
        preprocess: (3, H, W) of an RGB PIL image.
        tokenizer: token ids (K, T) of texts.
        name: in tables.
        device: see `load_encoder`.
        dtype: see `load_encoder`.
    """
    place = torch.device(device)
    precision = _dtype_of(dtype, place)
    model = model.to(device=place, dtype=precision).eval()

    def forward_pixels(pixel_values: Tensor) -> ImageEmbeddings:
        pooled = model.encode_image(pixel_values).float()
        return ImageEmbeddings(_normalized(pooled), pooled.norm(dim=-1))

    digest = _weights_digest(model)
    digest.update(json.dumps(["open_clip", _INTERFACE_VERSION, repr(preprocess), str(precision)]).encode())
    digest.update(type(tokenizer).__name__.encode() + str(tokenizer(["a lesion of 3 mm, Not given."])).encode())
    return Encoder(
        name=name,
        identity=digest.hexdigest(),
        device=place,
        dtype=precision,
        logit_scale=_exponentiated(getattr(model, "logit_scale", None)),
        logit_bias=_scalar(getattr(model, "logit_bias", None)),
        concept_logit_scale=None,
        concept_logit_bias=0.0,
        num_patches=0,
        preprocess=lambda image: preprocess(to_rgb(image)),
        forward_pixels=forward_pixels,
        forward_texts=lambda texts: _normalized(model.encode_text(tokenizer(texts).to(place))),
    )


def model_identity(model: PreTrainedModel, processor: Any, dtype: torch.dtype) -> str:
    """Hash of all that the embeddings depend on."""
    settings = _without_volatile([model.config.to_dict(), processor.image_processor.to_dict()])
    parts = [_INTERFACE_VERSION, type(model).__name__, str(dtype), settings, _words_of(processor.tokenizer)]
    digest = _weights_digest(model)
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _words_of(tokenizer: Any) -> Any:
    """What a tokenizer does to a text, without the padding and truncation that its last call left behind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    return {key: value for key, value in words.items() if key not in ("padding", "truncation")} | {
        "model_max_length": int(tokenizer.model_max_length)
    }


def _without_volatile(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _without_volatile(value) for key, value in values.items() if key not in _VOLATILE_KEYS}
    return [_without_volatile(value) for value in values] if isinstance(values, list | tuple) else values


def _weights_digest(model: Any) -> Any:
    """A running hash that has seen every parameter and buffer with its name, type and shape."""
    digest = hashlib.blake2b(digest_size=16)
    for key, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().contiguous().cpu()
        digest.update(f"{key} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest


def _dtype_of(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be 'auto' or a floating-point type such as 'bfloat16', got {dtype!r}")
    return found


def _pooled(output: Any) -> Tensor:
    """The vector of what `get_*_features` gave: a tensor in older versions of transformers, an output object since."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _normalized(pooled: Tensor) -> Tensor:
    return torch.nn.functional.normalize(pooled.float(), dim=-1)


def _exponentiated(value: Tensor | None) -> float:
    return 1.0 if value is None else float(value.detach().double().exp())


def _scalar(value: Tensor | None) -> float:
    return 0.0 if value is None else float(value.detach().double())
