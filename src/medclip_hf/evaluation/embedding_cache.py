"""Embeddings of a data set, computed once for each model and kept on disk in shards.

    <folder>/<hash of model and images>/manifest.json
                                        images-00000.safetensors     image_embeds, image_norms, is_readable
                                        patches-<hash>-00000.safetensors   best-patch cosines with a list of concepts
    <folder>/<hash of model and texts>/manifest.json
                                       texts-00000.safetensors       text_embeds

The key changes with the weights, the preprocessing, the precision, the list of images and the size and time of each
file. A shard is written whole or not at all, so a broken run goes on where it was. Patches themselves are not kept (729
vectors an image): only their best-patch cosines with the concepts asked for. Nothing in the cache names a patient or a
file.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medclip_hf.data.images import UnreadableImage, decode_image, open_image
from medclip_hf.data.parquet import require_writable, write_text_atomically
from medclip_hf.evaluation.encoders import Encoder, ImageEmbeddings
from medclip_hf.evaluation.task_data import ImageItem, SetAside, TaskData
from medclip_hf.evaluation.zero_shot import best_patch_mean

logger = logging.getLogger(__name__)

ROWS_PER_SHARD = 2048
DEFAULT_BATCH_SIZE = 64
Progress = Callable[[int, int], None]  # (rows done, rows of all)
Batch = TypeVar("Batch", Tensor, list[Any])


@dataclass(frozen=True)
class PatchQuestion:
    """What is asked of the patches: how near their best come to each concept.

    Args:
        concept_embeds: (K, D), L2-normalised.
        top_patches: how many of an image's patches are averaged.
    """

    concept_embeds: Tensor
    top_patches: int

    @property
    def identity(self) -> str:
        """Hash of concepts and number."""
        digest = hashlib.blake2b(f"{self.top_patches}".encode(), digest_size=8)
        digest.update(self.concept_embeds.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class CachedImages:
    """Embeddings of N images, float32 on the CPU.

    Args:
        image_embeds: (N, D), L2-normalised; zeros where the image could not be read.
        image_norms: (N,), length before.
        is_readable: (N,) bool.
        patch_means: (N, K), mean cosine of the best patches with each concept; None where not asked for.
        unreadable: the images that could not be read, as far as this call read them.
        num_computed: images that this call encoded; the others came from the cache.
        batch_size: that the memory allowed.
    """

    image_embeds: Tensor
    image_norms: Tensor
    is_readable: Tensor
    patch_means: Tensor | None
    unreadable: tuple[SetAside, ...]
    num_computed: int
    batch_size: int


class ShardCache:
    """Named shards of tensors below one key; a shard of another key, or a damaged one, is computed again, and said.

    Args:
        folder: of all caches; None: nothing is kept.
        key: what the tensors depend on; JSON.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, Any]) -> None:
        text = json.dumps(dict(key), sort_keys=True)
        self.identity = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        self.folder = None if folder is None else folder / self.identity
        if self.folder is not None:
            require_writable(self.folder)
            write_text_atomically(self.folder / "manifest.json", json.dumps(dict(key), indent=2) + "\n")

    def load(self, name: str, num_rows: int) -> dict[str, Tensor] | None:
        """The tensors of a shard, or None where there is none that fits."""
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                owner = (file.metadata() or {}).get("key")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            logger.warning("the cached shard %s is damaged and is computed again: %s", path, error)
            return None
        if owner != self.identity:
            logger.warning("the cached shard %s is of another model or data set and is computed again", path)
            return None
        if any(len(tensor) != num_rows or not _is_finite(tensor) for tensor in tensors.values()):
            logger.warning("the cached shard %s holds other rows or values that are not finite; computed again", path)
            return None
        return tensors

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a shard, whole or not at all."""
        if self.folder is None:
            return
        temporary = self.folder / f".{name}.{os.getpid()}.tmp"  # another run may fill the same cache
        kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(kept, temporary, metadata={"key": self.identity})
        temporary.replace(self.folder / f"{name}.safetensors")


def embed_images(
    encoder: Encoder,
    data: TaskData,
    folder: Path | None,
    *,
    question: PatchQuestion | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> CachedImages:
    """Embeddings of every image of a data set, from the cache where they are there.

    An image that cannot be decoded is set aside and its row is zeros. Decoding and preprocessing run in loader workers
    beside the encoder. Where memory does not suffice, the batch is halved until it does, for the rest of the run.

    Args:
        encoder: of the model.
        data: whose images.
        folder: of the cache; None: nothing is kept.
        question: what to ask of the patches.
        batch_size: to start with.
        num_workers: processes that decode; 0: this one.
        progress: called after each shard.

    Raises:
        ValueError: the patches of a model without patch heads are asked for, embeddings that are not finite, or no
            image can be read.
    """
    if question is not None and not encoder.has_patches:
        raise ValueError(f"{encoder.name} has no patch heads: it has a global score alone")
    cache = ShardCache(folder, {"model": encoder.identity, "images": data.identity, "num_rows": len(data.items)})
    parts: list[dict[str, Tensor]] = []
    unreadable: list[SetAside] = []
    num_computed = 0
    for number, first in enumerate(range(0, len(data.items), ROWS_PER_SHARD)):
        items = data.items[first : first + ROWS_PER_SHARD]
        part = _load_shard(cache, number, len(items), question)
        if part is None:
            part, failed, batch_size = _encode_shard(encoder, items, question, batch_size, num_workers)
            _save_shard(cache, number, part, question)
            unreadable += failed
            num_computed += len(items)
        parts.append(part)
        if progress is not None:
            progress(first + len(items), len(data.items))
    tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    if not tensors["is_readable"].any():
        raise ValueError(
            f"none of the {len(data.items)} images can be read" + (f": {unreadable[0]}" if unreadable else "")
        )
    return CachedImages(
        tensors["image_embeds"],
        tensors["image_norms"],
        tensors["is_readable"],
        tensors.get("patch_means"),
        tuple(unreadable),
        num_computed,
        batch_size,
    )


def embed_texts(
    encoder: Encoder, texts: Sequence[str], folder: Path | None, *, progress: Progress | None = None
) -> Tensor:
    """Embeddings (M, D) of texts, L2-normalised float32 on the CPU, from the cache where they are there.

    Raises:
        ValueError: as `Encoder.encode_texts`, or embeddings that are not finite.
    """
    digest = hashlib.blake2b("\0".join(texts).encode(errors="surrogatepass"), digest_size=16).hexdigest()
    cache = ShardCache(folder, {"model": encoder.identity, "texts": digest, "num_rows": len(texts)})
    parts = []
    for number, first in enumerate(range(0, len(texts), ROWS_PER_SHARD)):
        chunk = texts[first : first + ROWS_PER_SHARD]
        part = cache.load(f"texts-{number:05d}", len(chunk))
        if part is None:
            part = {"text_embeds": _finite(encoder.encode_texts(chunk).cpu(), encoder)}
            cache.save(f"texts-{number:05d}", part)
        parts.append(part["text_embeds"])
        if progress is not None:
            progress(first + len(chunk), len(texts))
    return torch.cat(parts)


# Shards ----------------------------------------------------------------------------------------------------------


def _load_shard(
    cache: ShardCache, number: int, num_rows: int, question: PatchQuestion | None
) -> dict[str, Tensor] | None:
    part = cache.load(f"images-{number:05d}", num_rows)
    if part is None or question is None:
        return part
    patches = cache.load(f"patches-{question.identity}-{number:05d}", num_rows)
    return None if patches is None else part | patches


def _save_shard(cache: ShardCache, number: int, part: dict[str, Tensor], question: PatchQuestion | None) -> None:
    whole = {key: tensor for key, tensor in part.items() if key != "patch_means"}
    cache.save(f"images-{number:05d}", whole)
    if question is not None:
        cache.save(f"patches-{question.identity}-{number:05d}", {"patch_means": part["patch_means"]})


def _encode_shard(
    encoder: Encoder, items: Sequence[ImageItem], question: PatchQuestion | None, batch_size: int, num_workers: int
) -> tuple[dict[str, Tensor], list[SetAside], int]:
    """The tensors of some images, those that could not be read, and the batch size that memory allowed."""
    rows: dict[str, Tensor] = {}
    is_readable = torch.zeros(len(items), dtype=torch.bool)
    failed: list[SetAside] = []
    for places, pixel_values, errors in _decoded_batches(encoder, items, batch_size, num_workers):
        failed += errors
        if not len(places):
            continue
        put = partial(_put, rows, len(items), places, encoder, question)
        batch_size = encode_in_batches(pixel_values, batch_size, put)
        is_readable[places] = True
    if not rows:  # not one image of the shard: its width is unknown, so ask the encoder with a grey picture
        grey = encoder.preprocess(Image.new("RGB", (8, 8)))
        _put(rows, len(items), torch.tensor([0]), encoder, question, 0, grey[None])
        rows = {key: torch.zeros_like(value) for key, value in rows.items()}
    return {**rows, "is_readable": is_readable}, failed, batch_size


def encode_in_batches(values: Batch, batch_size: int, encode: Callable[[int, Batch], None]) -> int:
    """The batch size that memory allowed, `batch_size` or a half, a quarter … of it, after all values were encoded.

    Args:
        values: N of them, a tensor (N, …) or a list.
        batch_size: to start with.
        encode: called with the place of the first value and the values of a batch.

    Raises:
        torch.OutOfMemoryError: a single value does not fit.
    """
    start = 0
    while start < len(values):
        chunk = values[start : start + batch_size]
        try:
            encode(start, chunk)
        except RuntimeError as error:
            if not _is_out_of_memory(error) or len(chunk) == 1:
                raise
            batch_size = max(1, len(chunk) // 2)
            logger.warning("memory does not suffice for %d images at once: going on with %d", len(chunk), batch_size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        start += len(chunk)
    return batch_size


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _put(
    rows: dict[str, Tensor],
    num_rows: int,
    places: Tensor,
    encoder: Encoder,
    question: PatchQuestion | None,
    start: int,
    pixel_values: Tensor,
) -> None:
    """Encode a batch and put it at its places, `start` of them being done."""
    found = encoder.encode_pixels(pixel_values)
    values = {"image_embeds": found.image_embeds, "image_norms": found.image_norms}
    if question is not None:
        values["patch_means"] = _patch_means(found, question)
    for key, value in values.items():
        if key not in rows:
            rows[key] = torch.zeros((num_rows, *value.shape[1:]))
        rows[key][places[start : start + len(value)]] = _finite(value.cpu(), encoder)


def _patch_means(found: ImageEmbeddings, question: PatchQuestion) -> Tensor:
    assert found.patch_embeds is not None  # the encoder has patches
    concepts = question.concept_embeds.to(found.patch_embeds.device)
    return best_patch_mean(found.patch_embeds, concepts, question.top_patches).float()


def _finite(values: Tensor, encoder: Encoder) -> Tensor:
    if not torch.isfinite(values).all():
        raise ValueError(
            f"{encoder.name} gives embeddings that are not finite in {encoder.dtype}. Try float32; if that does not "
            "help, its weights are damaged."
        )
    return values.float()


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


# Decoding beside the encoder -------------------------------------------------------------------------------------


class _Decoded(Dataset[Any]):
    """Pixels of each image, or why there are none."""

    def __init__(self, encoder: Encoder, items: Sequence[ImageItem]) -> None:
        self.preprocess = encoder.preprocess
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> tuple[int, Tensor | SetAside]:
        item = self.items[place]
        try:
            picture = decode_image(open_image(item.read(), item.item_id), item.item_id)
            return place, self.preprocess(picture)
        except UnreadableImage as error:
            return place, SetAside(item.item_id, error.reason, error.detail)
        except (OSError, ValueError) as error:
            return place, SetAside(item.item_id, "image cannot be preprocessed", f"{type(error).__name__}: {error}")


def _decoded_batches(
    encoder: Encoder, items: Sequence[ImageItem], batch_size: int, num_workers: int
) -> Iterator[tuple[Tensor, Tensor, list[SetAside]]]:
    loader = DataLoader(
        _Decoded(encoder, items),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=encoder.device.type == "cuda",
        multiprocessing_context="fork" if num_workers else None,  # the preprocessing is a closure
    )
    yield from loader


def _collate(batch: list[tuple[int, Tensor | SetAside]]) -> tuple[Tensor, Tensor, list[SetAside]]:
    places = [place for place, found in batch if isinstance(found, Tensor)]
    pixels = [found for _, found in batch if isinstance(found, Tensor)]
    failed = [found for _, found in batch if isinstance(found, SetAside)]
    return torch.tensor(places, dtype=torch.int64), torch.stack(pixels) if pixels else torch.zeros(0), failed
