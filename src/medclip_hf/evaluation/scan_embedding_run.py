"""CT scans to one vector for each anatomy, unit by unit; windows of one size share a batch, whatever scan they are of.

The numbers are those of `ct_zero_shot.embed_scan`, which embeds the windows of one scan at a time.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medclip_hf.data.stages import Drop
from medclip_hf.data.workers import Task, TaskReport
from medclip_hf.evaluation.ct_zero_shot import Protocol as WindowProtocol
from medclip_hf.evaluation.ct_zero_shot import Size, cut_window, plan_windows
from medclip_hf.evaluation.embedding_cache import encode_in_batches
from medclip_hf.evaluation.embedding_run import STORED_TYPES, RunOptions, batches_of, is_death_of_worker, require_finite
from medclip_hf.evaluation.embedding_store import EmbeddingStore, Shard, ShardWriter
from medclip_hf.modeling.fvlm.anatomy_masks_fvlm import anatomy_token_mask

logger = logging.getLogger(__name__)

# Of whatever size, until their batch is full: of the published size each takes 40 MB, and keeps its scan in memory.
MAX_WAITING_WINDOWS = 32


class ScanSource(Protocol):
    """A numbered list of scans, the same in every process and after a restart."""

    def __len__(self) -> int:
        """How many there are."""

    def row_id(self, index: int) -> str:
        """What to call a scan."""

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Volume (D, H, W) in [0, 1] and mask (D, H, W) of ids; ValueError or OSError where it cannot be used."""


# Anatomies scored in a window; its voxels (D, H, W), whole patches; which patches belong to which anatomy, (A, P).
CutWindow = tuple[tuple[int, ...], Tensor, Tensor]
Waiting = tuple[int, tuple[int, ...], Tensor, Tensor]  # row in the unit, and a window of it


class ScanStep:
    """Embeds units of scans; a step of `data.workers`.

    Args:
        model: `FVLMModel` in eval mode, on its device.
        source: of the scans.
        store: where units go.
        options: `batch_size` counts windows.
        protocol: of the windows, see `ct_zero_shot.plan_windows`.
        window_size_dhw: smallest window, voxels.
    """

    def __init__(
        self,
        model: Any,
        source: ScanSource,
        store: EmbeddingStore,
        options: RunOptions,
        *,
        protocol: WindowProtocol = "published",
        window_size_dhw: Size,
    ) -> None:
        if options.with_patches:
            raise ValueError("an fVLM gives one vector for each anatomy: leave --patches out.")
        self.model = model
        self.source = source
        self.store = store
        self.options = options
        self.protocol: WindowProtocol = protocol
        self.window_size_dhw = window_size_dhw

    def __call__(self, task: Task) -> TaskReport:
        """Do one unit."""
        return next(self.stream([task]))

    def set_aside(self, task: Task, reason: str) -> TaskReport:
        """Write a unit that kills its process: every scan dropped for this reason."""
        rows = self.store.rows_of(task.number)
        drops = [Drop(reason, "", self.source.row_id(index)) for index in rows]
        return TaskReport(task, len(rows), self.store.write(task.number, Shard((), {}), drops))

    def stream(self, tasks: Sequence[Task]) -> Iterator[TaskReport]:
        """Do several units without a pause between them; each is reported once its shard is on disk."""
        indices = [index for task in tasks for index in self.store.rows_of(task.number)]
        with ShardWriter(self.store) as writer:
            cut_scans = self._cut_scans(indices, before_fork=writer.wait)
            for task in tasks:
                unit = _ScanUnit(self.model, self.options)
                for index in self.store.rows_of(task.number):
                    unit.add(self.source.row_id(index), next(cut_scans))
                unit.embed_the_rest()
                yield from writer.write(task, unit.shard, unit.drops)
            yield from writer.finish()

    def _cut_scans(self, indices: list[int], before_fork: Callable[[], None]) -> Iterator[list[CutWindow] | Drop]:
        """The windows of each scan; one whose reader takes its worker down is set aside, the others are not."""
        done = 0
        while done < len(indices):
            before_fork()
            try:
                for found in batches_of(self._loader(indices[done:], self.options.num_workers)):
                    done += 1
                    yield found
            except RuntimeError as error:
                if not is_death_of_worker(error):
                    raise
                # Workers are ahead, so another one may be to blame: then it comes to this again.
                logger.warning("a loader worker died; reading the next scan alone")
                before_fork()
                yield self._cut_alone(indices[done])
                done += 1

    def _cut_alone(self, index: int) -> list[CutWindow] | Drop:
        try:
            return next(batches_of(self._loader([index], num_workers=1)))
        except RuntimeError as error:
            if not is_death_of_worker(error):
                raise
            return Drop("scan killed its loader worker", "", self.source.row_id(index))

    def _loader(self, indices: list[int], num_workers: int) -> DataLoader[Any]:
        patch_size_dhw = tuple(self.model.config.vision_config.patch_size_dhw)
        cutter = _CutScans(
            self.source,
            self.model.config.num_anatomies,
            patch_size_dhw,
            self.protocol,
            self.window_size_dhw,
            self.model.dtype,
        )
        return DataLoader(
            cutter,
            sampler=indices,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            pin_memory=False,  # windows wait until their batch is full: pinned, they would fill the memory
            multiprocessing_context="fork" if num_workers else None,
        )


class _ScanUnit:
    """Scans of one unit; windows wait, by size, until a batch of theirs is full or the unit ends."""

    def __init__(self, model: Any, options: RunOptions) -> None:
        self.model = model
        self.options = options
        self.drops: list[Drop] = []
        self._rows: list[str] = []
        self._embeds: list[Tensor] = []  # (A, D) of each scan
        self._is_present: list[Tensor] = []  # (A,) bool
        self._waiting: dict[Size, list[Waiting]] = {}
        self._batch_size = options.batch_size

    def add(self, row_id: str, found: list[CutWindow] | Drop) -> None:
        """Take the windows of a scan, or why there are none."""
        if isinstance(found, Drop):
            self.drops.append(found)
            return
        config = self.model.config
        row = len(self._rows)
        self._rows.append(row_id)
        self._embeds.append(torch.zeros(config.num_anatomies, config.projection_dim))
        self._is_present.append(torch.zeros(config.num_anatomies, dtype=torch.bool))
        for anatomies, pixels, token_mask in found:
            depth, height, width = pixels.shape
            waiting = self._waiting.setdefault((depth, height, width), [])
            waiting.append((row, anatomies, pixels, token_mask))
            if len(waiting) == self.options.batch_size:
                self._embed(waiting)
        if sum(map(len, self._waiting.values())) > MAX_WAITING_WINDOWS:
            self._embed(max(self._waiting.values(), key=len))

    def embed_the_rest(self) -> None:
        """Embed the windows whose batch is not full: no other scan comes."""
        for waiting in self._waiting.values():
            if waiting:
                self._embed(waiting)

    def shard(self) -> Shard:
        """What all scans have become."""
        if not self._rows:
            return Shard((), {})
        stored_type = STORED_TYPES[self.options.stored_type]
        embeds = torch.stack(self._embeds).to(stored_type)
        require_finite(bool(embeds.isfinite().all()), "anatomy_embeds", stored_type, type(self.model).__name__)
        is_present = torch.stack(self._is_present).numpy().astype(np.uint8)
        return Shard(tuple(self._rows), {"anatomy_embeds": embeds.numpy(), "anatomy_present": is_present})

    def _embed(self, waiting: list[Waiting]) -> None:
        """Embed windows of one size."""

        def encode(_start: int, part: list[Waiting]) -> None:
            # Put together where the model is: that spares the CPU a copy of tens of megabytes a window.
            device = self.model.device
            pixel_values = torch.stack([window.to(device, non_blocking=True) for _, _, window, _ in part])[:, None]
            token_mask = torch.stack([mask.to(device, non_blocking=True) for *_, mask in part])
            with torch.no_grad():
                outputs = self.model(pixel_values=pixel_values, anatomy_token_mask=token_mask, return_logits=False)
            found = outputs.anatomy_embeds.float().cpu()
            for (row, anatomies, *_), embeds in zip(part, found, strict=True):
                self._embeds[row][list(anatomies)] = embeds[list(anatomies)]
                self._is_present[row][list(anatomies)] = True

        self._batch_size = encode_in_batches(waiting, self._batch_size, encode)
        waiting.clear()


class _CutScans(Dataset[Any]):
    """The windows of each scan, ready for the tower, or why there are none."""

    def __init__(
        self,
        source: ScanSource,
        num_anatomies: int,
        patch_size_dhw: Size,
        protocol: WindowProtocol,
        window_size_dhw: Size,
        dtype: torch.dtype,
    ) -> None:
        self.source = source
        self.num_anatomies = num_anatomies
        self.patch_size_dhw = patch_size_dhw
        self.protocol: WindowProtocol = protocol
        self.window_size_dhw = window_size_dhw
        self.dtype = dtype

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> list[CutWindow] | Drop:
        row_id = self.source.row_id(index)
        try:
            volume, mask = self.source.read(index)
            windows = plan_windows(mask.numpy(), self.num_anatomies, self.protocol, self.window_size_dhw)
        except (ValueError, OSError) as error:
            return Drop(getattr(error, "reason", "scan cannot be used"), str(error), row_id)
        if not windows:
            return Drop("no anatomy of the model in the scan", "", row_id)
        volume = volume.to(self.dtype)  # as the model does first of all: here it halves what travels
        return [self._cut(volume, mask, window) for window in windows]

    def _cut(self, volume: Tensor, mask: Tensor, window: Any) -> CutWindow:
        pixels, window_mask = cut_window(volume, mask, window, self.patch_size_dhw)
        token_mask = anatomy_token_mask(window_mask[None], self.num_anatomies, self.patch_size_dhw)[0]
        return window.anatomies, pixels, token_mask


def _as_it_is(found: list[CutWindow] | Drop) -> list[CutWindow] | Drop:
    return found
