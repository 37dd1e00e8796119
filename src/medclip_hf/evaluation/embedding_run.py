"""Pictures to embeddings, unit by unit: workers decode ahead and a thread writes while the tower computes.

One loader runs over all units of a process, so the tower does not wait where one unit ends and the next begins. A batch
never reaches into another unit, so what a row becomes does not depend on who computes which units.
"""

import logging
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from medclip_hf.data.images import UnreadableImage, decode_image, open_image
from medclip_hf.data.stages import Drop
from medclip_hf.data.workers import Task, TaskReport
from medclip_hf.evaluation.embedding_cache import encode_in_batches
from medclip_hf.evaluation.embedding_sources import PictureSource
from medclip_hf.evaluation.embedding_store import Arrays, EmbeddingStore, Shard, ShardWriter
from medclip_hf.evaluation.encoders import Encoder

logger = logging.getLogger(__name__)

# Pixels (n, 3, H, W) of the pictures of a batch that can be read, their names, and the others.
_Loaded = tuple[Tensor, list[str], list[Drop]]

STORED_TYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class RunOptions:
    """How a run goes; none of it is in the settings of the store but `stored_type` and `with_patches`.

    Args:
        batch_size: of pictures, or of windows of scans.
        num_workers: processes that read and decode; 0: this one.
        stored_type: ``float32`` or ``float16``, of what is written.
        with_patches: also keep the vectors of patches.
    """

    batch_size: int = 64
    num_workers: int = 0
    stored_type: str = "float32"
    with_patches: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_workers < 0:
            raise ValueError(
                f"batch_size must be at least 1 and num_workers at least 0, got {self.batch_size} and "
                f"{self.num_workers}."
            )
        if self.stored_type not in STORED_TYPES:
            raise ValueError(f"stored_type is one of {sorted(STORED_TYPES)}, got {self.stored_type!r}.")


class PictureStep:
    """Embeds units of pictures; a step of `data.workers`.

    Args:
        encoder: of the model.
        source: of the pictures.
        store: where units go.
        options: see there.

    Raises:
        ValueError: patches are asked of a model that has none.
    """

    def __init__(self, encoder: Encoder, source: PictureSource, store: EmbeddingStore, options: RunOptions) -> None:
        if options.with_patches and not encoder.has_patches:
            raise ValueError(f"{encoder.name} has no patch heads: leave --patches out.")
        self.encoder = encoder
        self.source = source
        self.store = store
        self.options = options

    def __call__(self, task: Task) -> TaskReport:
        """Do one unit."""
        return next(self.stream([task]))

    def set_aside(self, task: Task, reason: str) -> TaskReport:
        """Write a unit that kills its process: every row dropped for this reason."""
        rows = self.store.rows_of(task.number)
        drops = [Drop(reason, "", _row_id(self.source, index)) for index in rows]
        return TaskReport(task, len(rows), self.store.write(task.number, Shard((), {}), drops))

    def stream(self, tasks: Sequence[Task]) -> Iterator[TaskReport]:
        """Do several units without a pause between them; each is reported once its shard is on disk."""
        batches = [
            (task, indices)
            for task in tasks
            for indices in _cut(self.store.rows_of(task.number), self.options.batch_size)
        ]
        unit = _Unit()
        with ShardWriter(self.store) as writer:
            embedded = self._embedded([indices for _, indices in batches], before_fork=writer.wait)
            for (task, indices), (found, rows, drops) in zip(batches, embedded, strict=True):
                unit.add(found, rows, drops)
                if indices[-1] == self.store.rows_of(task.number)[-1]:
                    yield from writer.write(task, unit.shard, unit.drops)
                    unit = _Unit()
            yield from writer.finish()

    def _embedded(
        self, batches: list[Sequence[int]], before_fork: Callable[[], None]
    ) -> Iterator[tuple[Arrays, list[str], list[Drop]]]:
        """Embeddings of each batch as they are stored, one behind: a thread keeps one while the next is computed."""
        keeping: deque[tuple[Future[Arrays], list[str], list[Drop]]] = deque()

        def wait() -> None:
            futures.wait([found for found, *_ in keeping])
            before_fork()

        batch_size = self.options.batch_size
        with ThreadPoolExecutor(1, "embeddings") as thread:
            for pixel_values, rows, drops in self._loaded(batches, wait):
                kept = _Kept(self.encoder.device, STORED_TYPES[self.options.stored_type])
                if rows:
                    # To the device in the workers' type: a cast on the CPU would take longer than the copy.
                    pixel_values = pixel_values.to(self.encoder.device, non_blocking=True)
                    batch_size = encode_in_batches(pixel_values, batch_size, partial(self._encode_into, kept))
                kept.record()
                keeping.append((thread.submit(kept.values, self.encoder.name), rows, drops))
                if len(keeping) > 1:
                    found, rows, drops = keeping.popleft()
                    yield found.result(), rows, drops
            while keeping:
                found, rows, drops = keeping.popleft()
                yield found.result(), rows, drops

    def _encode_into(self, kept: "_Kept", _: int, pixel_values: Tensor) -> None:
        found = self.encoder.encode_pixels(pixel_values)
        values = {"image_embeds": found.image_embeds, "image_norms": found.image_norms}
        if self.options.with_patches and found.patch_embeds is not None:
            values["patch_embeds"] = found.patch_embeds
        kept.add(values)

    def _loaded(self, batches: list[Sequence[int]], before_fork: Callable[[], None]) -> Iterator[_Loaded]:
        """The pixels of each batch; a picture whose decoder takes its worker down is set aside, the others are not."""
        done = 0
        while done < len(batches):
            before_fork()
            try:
                for loaded in batches_of(self._loader(batches[done:], self.options.num_workers)):
                    done += 1
                    yield loaded
            except RuntimeError as error:
                if not is_death_of_worker(error):
                    raise
                # Workers are ahead of the tower, so the picture to blame may be in one of the next batches.
                logger.warning("a loader worker died; reading %d pictures one by one", len(batches[done]))
                before_fork()
                yield self._loaded_one_by_one(list(batches[done]))
                done += 1

    def _loaded_one_by_one(self, left: list[int]) -> _Loaded:
        """The same batch, each picture alone in flight, so that a death has one to blame."""
        parts: list[_Loaded] = []
        while left:
            try:
                for loaded in batches_of(self._loader([[index] for index in left], num_workers=1, batches_ahead=1)):
                    parts.append(loaded)
                    left.pop(0)
            except RuntimeError as error:
                if not is_death_of_worker(error):
                    raise
                row_id = _row_id(self.source, left.pop(0))
                parts.append((torch.zeros(0), [], [Drop("picture killed its loader worker", "", row_id)]))
        pixels = [pixel_values for pixel_values, rows, _ in parts if rows]
        return (
            torch.cat(pixels) if pixels else torch.zeros(0),
            [row_id for _, rows, _ in parts for row_id in rows],
            [drop for *_, drops in parts for drop in drops],
        )

    def _loader(self, batches: list[Sequence[int]], num_workers: int, batches_ahead: int = 2) -> DataLoader[Any]:
        return DataLoader(
            _Pictures(self.source, self.encoder.preprocess),
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=num_workers,
            prefetch_factor=batches_ahead if num_workers else None,
            collate_fn=_collate,
            pin_memory=self.encoder.device.type == "cuda",
            multiprocessing_context="fork" if num_workers else None,  # the preprocessing is a closure
        )


class _Unit:
    """What a unit has become so far."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.drops: list[Drop] = []
        self._parts: dict[str, list[NDArray[Any]]] = {}

    def add(self, found: Arrays, rows: list[str], drops: list[Drop]) -> None:
        self.rows += rows
        self.drops += drops
        for name, values in found.items():
            self._parts.setdefault(name, []).append(values)

    def shard(self) -> Shard:
        arrays: Arrays = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        return Shard(tuple(self.rows), arrays)


class _Kept:
    """Values of a batch on their way to what is stored; `values` waits for them and for nothing launched later.

    An accelerator rounds them before they travel; on a CPU that is left to whoever asks for `values`.
    """

    def __init__(self, device: torch.device, stored_type: torch.dtype) -> None:
        self._parts: list[dict[str, Tensor]] = []
        self._rounded: list[dict[str, _Rounded]] = []
        self._stored_type = stored_type
        self._device = device
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def add(self, values: dict[str, Tensor]) -> None:
        self._parts.append(values)
        if self._event is not None:
            self._round()

    def record(self) -> None:
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))  # the current device may be another

    def values(self, model: str) -> Arrays:
        self._round()
        if self._event is not None:
            self._event.synchronize()
        found: Arrays = {}
        for name in self._rounded[0] if self._rounded else ():
            parts = [part[name] for part in self._rounded]
            require_finite(all(bool(part.is_finite) for part in parts), name, self._stored_type, model)
            found[name] = (parts[0].values if len(parts) == 1 else torch.cat([part.values for part in parts])).numpy()
        return found

    def _round(self) -> None:
        while self._parts:
            values = self._parts.pop(0)
            self._rounded.append({name: _as_stored(value, self._stored_type) for name, value in values.items()})


@dataclass(frozen=True)
class _Rounded:
    """Values as they are stored, on the CPU or on their way there, and whether all of them are finite, (): bool."""

    values: Tensor
    is_finite: Tensor


def _as_stored(values: Tensor, stored_type: torch.dtype) -> _Rounded:
    # Rounding keeps the order, so all are finite if the least and the greatest are: one pass, where `isfinite` takes
    # several. Both are NaN if any value is.
    extremes = torch.stack(values.aminmax()).to(stored_type)
    return _Rounded(_fetched(values.to(stored_type)), _fetched(extremes.isfinite().all()))


def _fetched(values: Tensor) -> Tensor:
    return values.to("cpu", non_blocking=True)


def require_finite(is_finite: bool, name: str, stored_type: torch.dtype, model: str) -> None:
    """Refuse to store what is no number.

    Raises:
        ValueError: unless `is_finite`.
    """
    if not is_finite:
        raise ValueError(
            f"{name} of {model} are not finite in {str(stored_type).removeprefix('torch.')}. Try --dtype float32; if "
            "that does not help, the weights are damaged."
        )


class _Pictures(Dataset[Any]):
    """Pixels of each picture with its name, or why there are none."""

    def __init__(self, source: PictureSource, preprocess: Callable[[Any], Tensor]) -> None:
        self.source = source
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[str, Tensor] | Drop:
        row_id = _row_id(self.source, index)
        try:
            picture = decode_image(open_image(self.source.read(index), row_id), row_id)
            return row_id, self.preprocess(picture)
        except UnreadableImage as error:
            return Drop(error.reason, error.detail, row_id)
        except (OSError, ValueError) as error:
            return Drop("image cannot be preprocessed", f"{type(error).__name__}: {error}", row_id)


def batches_of(loader: DataLoader[Any]) -> Iterator[Any]:
    """What the loader gives; the death of a worker is raised here.

    PyTorch raises it from a signal handler, wherever the main thread is: mostly amid the tower. Without that handler
    the loader finds the death itself, within seconds, when it is next asked.
    """
    batches = iter(loader)  # sets the handler
    if not loader.num_workers or threading.current_thread() is not threading.main_thread():
        yield from batches
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from batches
    finally:
        signal.signal(signal.SIGCHLD, handler)


def is_death_of_worker(error: RuntimeError) -> bool:
    """Whether a loader says that one of its workers was killed."""
    return "DataLoader worker" in str(error)


def _row_id(source: PictureSource, index: int) -> str:
    try:
        return source.row_id(index)
    except UnreadableImage:  # its shard is damaged there
        return f"row {index}"


def _collate(batch: list[tuple[str, Tensor] | Drop]) -> _Loaded:
    found = [item for item in batch if not isinstance(item, Drop)]
    drops = [item for item in batch if isinstance(item, Drop)]
    # In a worker this stacks where the main process reads, without another copy.
    pixel_values = default_collate([pixels for _, pixels in found]) if found else torch.zeros(0)
    return pixel_values, [row_id for row_id, _ in found], drops


def _cut(rows: range, size: int) -> Iterator[range]:
    """The rows in batches, the last one smaller where they do not divide."""
    return (rows[first : first + size] for first in range(0, len(rows), size))
