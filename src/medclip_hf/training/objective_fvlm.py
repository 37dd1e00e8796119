"""What fVLM is trained for: the disease-aware loss of every anatomy over the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from medclip_hf.modeling.fvlm.loss_fvlm import anatomy_alignment_loss, anatomy_logits
from medclip_hf.processing.pixels import SCALING, scaled_pixels
from medclip_hf.training.distributed import gather_counts, gather_rows, in_float32, num_processes, process_index
from medclip_hf.training.gradients import Batch
from medclip_hf.training.text_lengths import bucket_sizes, without_padding


class Calibration(Protocol):
    """What corrects the targets of abnormal scans, see `calibration.py`."""

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        """Embeddings of the batch by another model, without gradients; named `teacher_...` or `peer_...`."""

    @property
    def peer_weight(self) -> float:
        """Weight of the peer's answers now; 0 where there is no peer."""


class FVLMObjective:
    """The disease-aware loss of every anatomy over the global batch.

    Args:
        anatomies: names of the model's anatomies, for the log.
        calibration: corrects the targets of abnormal scans; None trains as the release does, on hard targets.
        text_buckets: texts of a batch are encoded in at most so many groups of like length, each padded to its longest.
            It changes no number but by rounding, and which units dropout takes.

    Raises:
        ValueError: fewer than one group.
    """

    image_inputs = ("pixel_values", "anatomy_mask")
    text_inputs = ("input_ids", "attention_mask")
    beside = (SCALING, "text_lengths")  # of the batch, where it has them

    def __init__(
        self, anatomies: Sequence[str], calibration: Calibration | None = None, *, text_buckets: int = 1
    ) -> None:
        if text_buckets < 1:
            raise ValueError(f"text_buckets should be at least 1, got {text_buckets}.")
        self.anatomies = tuple(anatomies)
        self.calibration = calibration
        self.text_buckets = text_buckets

    def split(self, batch: Batch, num_chunks: int) -> list[Batch]:
        """At most `num_chunks` micro-batches, each with its share of the scans and of the distinct texts.

        A micro-batch may hold scans alone or texts alone; both meet in `compare`.
        """
        if num_chunks < 1:
            raise ValueError(f"num_chunks should be at least 1, got {num_chunks}.")
        num_chunks = min(num_chunks, max(len(batch["pixel_values"]), len(batch["input_ids"]), 1))
        chunks: list[Batch] = [{} for _ in range(num_chunks)]
        present = [name for name in self.beside if name in batch]
        for name in (*self.image_inputs, *self.text_inputs, *present):
            bounds = [len(batch[name]) * chunk // num_chunks for chunk in range(num_chunks + 1)]
            for chunk, (start, stop) in zip(chunks, pairwise(bounds), strict=True):
                chunk[name] = batch[name][start:stop]
        return [without_padding(chunk) for chunk in chunks]

    def embed(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Embeddings of the scans' anatomies and of the texts, and the logit scale as it is now.

        Where there is no scan or no text, the embeddings without rows still depend on every parameter.
        """
        num_scans, num_texts = len(batch["pixel_values"]), len(batch["input_ids"])
        images = {name: batch[name] for name in self.image_inputs} | {"pixel_values": scaled_pixels(batch)}
        first, *others = self._texts_by_length(batch)
        outputs = model(**_with_stand_ins(model, images | first), return_loss=False, return_logits=False)
        text_embeds = [outputs["text_embeds"][: len(first["input_ids"])]]
        for texts in others:
            encoded = model(**_with_stand_in_text(texts), return_loss=False, return_logits=False)["text_embeds"]
            text_embeds.append(encoded[: len(texts["input_ids"])])
        embeddings = {
            "anatomy_embeds": outputs["anatomy_embeds"][:num_scans],
            "anatomy_present": outputs["anatomy_present"][:num_scans],
            "text_embeds": torch.cat(text_embeds),
            "logit_scale": outputs["logit_scale"],
        }
        if self.calibration is not None:
            texts = {name: batch[name] for name in self.text_inputs}
            others_embeddings = self.calibration.embed(_with_stand_ins(model, images | texts))
            counts = {"anatomy": num_scans, "text": num_texts, "logit": 1}
            embeddings |= {name: value[: counts[name.split("_")[1]]] for name, value in others_embeddings.items()}
        return embeddings

    def _texts_by_length(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Groups of the batch's texts in their order.

        Several processes have equally many groups, maybe empty ones: where models are in shards, a forward pass gathers
        weights from all of them.
        """
        texts = {name: batch[name] for name in self.text_inputs}
        if self.text_buckets == 1 or "text_lengths" not in batch:
            return [texts]
        sizes = bucket_sizes(batch["text_lengths"], self.text_buckets) or [0]
        if num_processes() > 1:
            sizes += [0] * (self.text_buckets - len(sizes))
        groups, start = [], 0
        for size in sizes:
            group = {name: values[start : start + size] for name, values in texts.items()}
            lengths = batch["text_lengths"][start : start + size]
            groups.append({name: without_padding(group | {"text_lengths": lengths})[name] for name in group})
            start += size
        return groups

    def compare(self, embeddings: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """`loss` to call backward on, and the global values for the log, detached and equal on all processes.

        All processes compute the whole loss: its matrices are small, (anatomies, scans, scans), and the gradients of
        gathered rows, summed over processes, are then those of one process times the number of processes.

        Args:
            embeddings: of the whole batch, as `embed` gives them, concatenated over micro-batches.
            batch: what was embedded, with `text_index`, `text_ids`, `is_complete` and `is_abnormal`.
        """
        device = embeddings["anatomy_embeds"].device
        counts = gather_counts([len(embeddings["anatomy_embeds"]), len(embeddings["text_embeds"])], device)
        num_scans, num_texts = ([process[kind] for process in counts] for kind in (0, 1))
        rows, is_abnormal, is_used = _gather_labels(embeddings["anatomy_present"], batch, num_scans, num_texts)
        # The row behind the last text stands for "no text", which index -1 names.
        text_ids = F.pad(gather_rows(batch["text_ids"], num_texts), (0, 1))[rows]
        logit_scale = embeddings["logit_scale"].mean()
        losses = anatomy_alignment_loss(
            _gather_embeds(embeddings["anatomy_embeds"], num_scans),
            _texts_of_anatomies(embeddings["text_embeds"], rows, num_texts),
            logit_scale,
            text_ids=text_ids,
            is_abnormal=is_abnormal,
            is_used=is_used,
            **self._calibrated(embeddings, rows, num_scans, num_texts),
        )
        log = {f"{name}_loss": loss for name, loss in zip(self.anatomies, losses.detach(), strict=True)}
        return {
            "loss": losses.sum(),
            "total_loss": losses.detach().sum(),
            **log,
            "num_scans": torch.tensor(float(sum(num_scans))),
            "num_texts": torch.tensor(float(sum(num_texts))),
            "num_trained_anatomies": (losses.detach() > 0).sum().float(),
            "logit_scale": logit_scale.detach(),
        }

    def _calibrated(
        self, embeddings: dict[str, Tensor], rows: Tensor, num_scans: list[int], num_texts: list[int]
    ) -> dict[str, Any]:
        """What the calibration adds to the arguments of the loss."""
        arguments: dict[str, Any] = {}
        if self.calibration is None:
            return arguments
        if "teacher_text_embeds" in embeddings:
            texts = _texts_of_anatomies(embeddings["teacher_text_embeds"].detach(), rows, num_texts)
            arguments["teacher_text_embeds"] = texts
        if "peer_anatomy_embeds" in embeddings:
            images = _gather_embeds(embeddings["peer_anatomy_embeds"].detach(), num_scans)
            texts = _texts_of_anatomies(embeddings["peer_text_embeds"].detach(), rows, num_texts)
            scale = embeddings["peer_logit_scale"].detach().mean()
            arguments |= {
                "peer_logits": anatomy_logits(images, texts, scale),
                "peer_weight": self.calibration.peer_weight,
            }
        return arguments


def _with_stand_ins(model: torch.nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, with one empty patch in place of no scan and one empty token in place of no text.

    Towers refuse empty batches, but every process has to run both: DistributedDataParallel waits for their gradients.
    """
    config: Any = getattr(model, "module", model).config
    if len(inputs["pixel_values"]) == 0:
        size_dhw = config.vision_config.patch_size_dhw
        channels = config.vision_config.num_channels
        inputs["pixel_values"] = inputs["pixel_values"].new_zeros(1, channels, *size_dhw)
        inputs["anatomy_mask"] = inputs["anatomy_mask"].new_ones(1, *size_dhw)
    return _with_stand_in_text(inputs)


def _with_stand_in_text(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    if len(inputs["input_ids"]) > 0:
        return inputs
    no_ids, no_mask = inputs["input_ids"], inputs["attention_mask"]
    return inputs | {"input_ids": no_ids.new_zeros(1, 1), "attention_mask": no_mask.new_ones(1, 1)}


def _gather_labels(
    anatomy_present: Tensor, batch: Batch, num_scans: list[int], num_texts: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """For every anatomy of every scan (B, A): its text among all texts or -1, whether abnormal, whether used."""
    has_text = batch["text_index"] >= 0
    first_text = sum(num_texts[: process_index()])
    rows = torch.where(has_text, batch["text_index"] + first_text, -1)
    is_used = has_text & anatomy_present & batch["is_complete"].bool()
    labels = torch.stack([rows, batch["is_abnormal"].long(), is_used.long()], dim=-1)
    rows, is_abnormal, is_used = gather_rows(labels, num_scans).unbind(-1)
    return rows, is_abnormal.bool(), is_used.bool()


def _texts_of_anatomies(text_embeds: Tensor, rows: Tensor, num_texts: list[int]) -> Tensor:
    """(B, A, D): the text of every anatomy of every scan of all processes; zeros where it has none."""
    return F.pad(_gather_embeds(text_embeds, num_texts), (0, 0, 0, 1))[rows]


def _gather_embeds(embeds: Tensor, counts: list[int]) -> Tensor:
    """Those of all processes."""
    return gather_rows(in_float32(embeds), counts)
