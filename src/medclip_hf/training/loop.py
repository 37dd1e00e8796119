"""The one training loop: step, log, validate, save, stop, resume; it knows no model, only an objective."""

import contextlib
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from medclip_hf.training import checkpoints, early_stopping, faults, sharded, zero
from medclip_hf.training.acceleration import Watch, prepare_blocks
from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.checkpoints import RunState
from medclip_hf.training.gradients import Batch, Objective, StatefulObjective, backward
from medclip_hf.training.launch import end, make_accelerator
from medclip_hf.training.optimization import learning_rate_at, make_optimizer, set_learning_rate
from medclip_hf.training.processes import shared_store
from medclip_hf.training.run_record import RunRecord
from medclip_hf.training.same_run import check_continues, check_processes_agree, check_rows
from medclip_hf.training.sampling import EpochBatchSampler, steps_per_epoch
from medclip_hf.training.signals import STOPPING, StopRequest, ignore_stop_signals

logger = logging.getLogger(__name__)

FINAL_MODEL = "final"
_MAX_SKIPPED_IN_A_ROW = 10
_MAX_NAMED_ROWS = 20


class NoRowsError(RuntimeError):
    """Batch after batch, not one row could be read."""


class MapDataset(Protocol):
    """Rows by (epoch, index); what is random in an example comes from the run's seed, epoch and index alone."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int], /) -> Any: ...


EvaluateFn = Callable[[torch.nn.Module, int], Mapping[str, float]]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Args:
        status: "interrupted" after SIGTERM or SIGINT, with a checkpoint written.
        step: optimiser steps done.
        exit_code: for the script to leave with: 0, or 128 + the signal's number, as shells have it.
        model_path: the final model, ready for `from_pretrained`; None if interrupted.
        metrics: of the last validation.
    """

    status: Literal["complete", "interrupted"]
    step: int
    exit_code: int
    model_path: Path | None
    metrics: dict[str, float]


def train(
    model: Any,
    dataset: MapDataset,
    collator: Callable[[list[Any]], Batch],
    objective: Objective,
    arguments: RunArguments,
    *,
    processor: Any = None,
    evaluate_fn: EvaluateFn | None = None,
    resume: bool | str | Path = False,
    recipe: Mapping[str, Any] | None = None,
    accelerator: Accelerator | None = None,
) -> TrainResult:
    """Train `model`, write checkpoints and the final model, and say how the run ended.

    Args:
        model: with `save_pretrained`, and `clamp_logit_scales_` if it has logit scales; the same weights on every
            process.
        dataset: map-style, its keys are (epoch, index).
        collator: examples → batch, with the keys `row_ids` and `set_aside` beside the tensors.
        objective: see `gradients.Objective`, and `gradients.StatefulObjective` for one with a memory.
        arguments: of the run.
        processor: saved beside the model.
        evaluate_fn: (unwrapped model in eval mode, step) → named values. Every process calls it, so it may gather; the
            values of the main process are logged, with "validation_" before their names. Random states are put back
            afterwards: validating does not change the training.
        resume: True continues from the newest complete checkpoint in the output folder, or starts if there is none; a
            path continues from that one. Weights, moments, random states and data order are those of a run that was
            never stopped.
        recipe: written to `run.json`.
        accelerator: from `launch.make_accelerator`, if the caller needs one before or after; `launch.end`, which closes
            trackers and process group, is then the caller's to call.

    Raises:
        ValueError: an output folder that already holds a run, a checkpoint that is not of this run, too few rows.
        FloatingPointError: the loss or its gradient is not finite.
        NoRowsError: not one row could be read, batch after batch.
        LostProcessError: another process is dead, has failed, or did not come in time; it is named.
        UnwrittenError: a checkpoint or another file of the run could not be written.
    """
    own_accelerator = make_accelerator(arguments) if accelerator is None else None
    accelerator = accelerator or own_accelerator
    assert accelerator is not None
    rank, num_processes, timeout = accelerator.process_index, accelerator.num_processes, arguments.timeout_seconds
    with faults.Watch(shared_store(), rank, num_processes, timeout_seconds=timeout) as watch:
        run = _Run(
            model, dataset, collator, objective, arguments, accelerator, processor, evaluate_fn, recipe or {}, watch
        )
        try:
            run.prepare(resume)
            with StopRequest() as stop:
                result = run.finish(run.steps(stop))
        except BaseException as error:
            lost = watch.explain(error)
            if lost is None:
                watch.report(error)
            run.note_failure()
            if lost is not None:
                raise lost from error
            raise
    if own_accelerator is not None:
        del run
        end(own_accelerator)
    return result


class _Run:
    """The state of a run while it lasts."""

    def __init__(
        self,
        model: Any,
        dataset: MapDataset,
        collator: Callable[[list[Any]], Batch],
        objective: Objective,
        arguments: RunArguments,
        accelerator: Accelerator,
        processor: Any,
        evaluate_fn: EvaluateFn | None,
        recipe: Mapping[str, Any],
        watch: faults.Watch,
    ) -> None:
        self.unwrapped = model
        self.dataset = dataset
        self.collator = collator
        self.objective = objective
        self.arguments = arguments
        self.accelerator = accelerator
        self.processor = processor
        self.evaluate_fn = evaluate_fn
        self.watch = watch
        self.recipe = recipe
        self.output_dir = Path(arguments.output_dir)
        self.steps_per_epoch = self.max_steps = 0
        self.step = self.first_step = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.rows_set_aside = 0
        self.saved_step = -1
        self.last_validation: dict[str, float] = {}
        self.validations: list[tuple[int, float]] = []  # (step, best_metric)
        self.is_recorded = False
        self.writer: sharded.ShardWriter | None = None
        self.unfinished: Path | None = None  # the checkpoint being written in the background

    def prepare(self, resume: bool | str | Path) -> None:
        """Bring the model to its device, and the run to where it starts."""
        self._plan_steps()
        if self.arguments.best_metric is not None and self.evaluate_fn is None:
            raise ValueError(
                f"training.best_metric={self.arguments.best_metric} needs a validation, and this run has none. Name a "
                "validation split, or set best_metric and early_stopping_patience to null."
            )
        checkpoint = self._checkpoint_to_resume(resume)
        prepare_blocks(self.unwrapped, self.arguments)
        plan = zero.launched_plan() if self.accelerator.num_processes > 1 else None
        if sharded.is_sharding_asked_for():
            self.model = sharded.shard(self.unwrapped, self.accelerator)
            self.writer = sharded.ShardWriter(self.accelerator)
        elif plan is None:
            self.model = self.accelerator.prepare_model(self.unwrapped)
        self.optimizer = make_optimizer(self.unwrapped, self.arguments)
        _seed_everything(self.arguments.seed, self.accelerator.process_index)
        if checkpoint is not None:
            self._restore(checkpoint)
        if plan is not None:  # it cuts weights and moments as it finds them
            self.model = zero.cut(self.unwrapped, self.optimizer, plan, self.arguments, self.accelerator)
        self.record = RunRecord(
            self.output_dir, self.accelerator, {"arguments": asdict(self.arguments), "recipe": self.recipe}
        )
        if self.arguments.best_metric is not None and checkpoint is not None:
            metric = self.arguments.best_metric
            self.validations = early_stopping.read_validations(self.record.metrics_path, metric, self.step)
        self.record.start(self.step, is_resumed=resume is not False)
        self.is_recorded = True
        if self.arguments.trackers:
            # TensorBoard forgets what an earlier start logged beyond the step we resume from
            self.accelerator.init_trackers(
                self.output_dir.name, init_kwargs={"tensorboard": {"purge_step": self.step + 1}}
            )
        logger.info(
            "training: %d steps of %d rows (%d × %d processes), %d steps an epoch, from step %d",
            self.max_steps,
            self.arguments.batch_size_per_process * self.accelerator.num_processes,
            self.arguments.batch_size_per_process,
            self.accelerator.num_processes,
            self.steps_per_epoch,
            self.step,
        )

    def steps(self, stop: StopRequest) -> int | None:
        """Do the remaining steps; gives back the signal that ended them early, if one did."""
        self.model.train()
        progress = tqdm(
            total=self.max_steps,
            initial=self.step,
            unit="step",
            disable=not (self.arguments.progress_bar and self.accelerator.is_main_process),
            mininterval=0.1 if sys.stderr.isatty() else 10.0,  # a log file needs no animation
        )
        with progress, logging_redirect_tqdm():
            clock = time.perf_counter()
            batches = Watch(() if self._progress().should_stop else self._loader())
            self.watch.enter(f"reading the rows of step {self.step + 1}")
            for batch in batches:
                values = self._step(batch, stop)
                elapsed, clock = time.perf_counter() - clock, time.perf_counter()
                values["samples_per_second"] = values.pop("rows") / elapsed
                progress.update()
                progress.set_postfix(
                    loss=f"{values['loss']:.4f}", samples_s=f"{values['samples_per_second']:.1f}", refresh=False
                )
                if self.step % self.arguments.log_every == 0 or self.step == self.max_steps:
                    self._log(values | {"loader_wait_share": batches.share()})
                if _is_due(self.step, self.arguments.evaluate_every):
                    self._evaluate()
                    clock = time.perf_counter()
                stopped_by = int(values["signal"]) or None
                if stopped_by or _is_due(self.step, self.arguments.checkpoint_every):
                    self._save()
                    clock = time.perf_counter()
                if stopped_by:
                    return stopped_by
                self.watch.enter(f"reading the rows of step {self.step + 1}")
                if self._progress().should_stop:
                    logger.info("step %d: no better %s for long", self.step, self.arguments.best_metric)
                    break
        return None

    def note_failure(self) -> None:
        """Leave word in `run.json`; a full disk must not hide why the run failed."""
        if self.is_recorded:
            with contextlib.suppress(OSError):
                self.record.set_status("failed", self.step)

    def finish(self, stopped_by: int | None) -> TrainResult:
        """Write the final model, or leave the checkpoint for another start."""
        if stopped_by:
            self._finish_checkpoint()
            self.record.set_status("interrupted", self.step)
            self.accelerator.wait_for_everyone()  # a scheduler may kill the others as soon as one has left
            logger.warning("stopped by signal %d after step %d; continue with resume", stopped_by, self.step)
            return TrainResult("interrupted", self.step, 128 + stopped_by, None, self.last_validation)
        has_trained, every = self.step > self.first_step, self.arguments.evaluate_every
        if has_trained and every is not None and self.step % every:
            self._evaluate()
        if self.saved_step != self.step:
            self._save()
        self._finish_checkpoint()
        self.watch.enter("writing the final model")
        model_path = self.output_dir / FINAL_MODEL
        weights = self._whole_weights()
        write = partial(self._save_final_model, model_path, weights)
        checkpoints.together(write, model_path.with_name(f"{FINAL_MODEL}.tmp"), self.accelerator)
        self.record.set_status("complete", self.step)
        return TrainResult("complete", self.step, 0, model_path, self.last_validation)

    def _step(self, batch: Batch, stop: StopRequest) -> dict[str, float]:
        """One optimiser step; gives back values that are the same on all processes."""
        self.watch.enter(f"computing step {self.step + 1}")
        self.record.add_set_aside(self.step + 1, batch["set_aside"])
        batch = to_device(batch, self.accelerator.device)
        learning_rate = learning_rate_at(self.step, self.arguments, self.max_steps, self.steps_per_epoch)
        set_learning_rate(self.optimizer, learning_rate)
        values = backward(self.model, self.objective, batch, self.arguments.num_micro_batches, self.accelerator)
        grad_norm = self._clip()
        agreed = self._agree(values["loss"], grad_norm, batch, stop)
        if agreed.pop("failed_checkpoints"):
            self._finish_checkpoint()  # raises what went wrong
        if not agreed["rows"]:
            self._skip_without_rows(batch)
        elif agreed["is_finite"]:
            self._update()
            self.skipped_in_a_row = 0
        else:
            self._skip_or_stop(values, grad_norm, batch)
        if not zero.is_engine(self.model):
            self.optimizer.zero_grad()
        self.step += 1
        self.rows_set_aside += int(agreed.pop("set_aside"))
        logged = {name: value for name, value in values.items() if name != "loss"}
        return {"learning_rate": learning_rate, "grad_norm": grad_norm, **logged, **agreed}  # type: ignore[dict-item]

    def _clip(self) -> torch.Tensor:
        """The norm of the gradient, which is clipped; DeepSpeed updates at once, unless the norm is not finite."""
        if zero.is_engine(self.model):
            return zero.update(self.model, self.accelerator.device)
        norm = torch.nn.utils.clip_grad_norm_(self.unwrapped.parameters(), self.arguments.max_grad_norm or math.inf)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _update(self) -> None:
        """Update the weights, and what follows from them."""
        is_engine = zero.is_engine(self.model)
        if not is_engine:
            self.optimizer.step()
        if hasattr(self.unwrapped, "clamp_logit_scales_"):
            with zero.editing(self.model, only="logit_scale") if is_engine else contextlib.nullcontext():
                self.unwrapped.clamp_logit_scales_()
        if isinstance(self.objective, StatefulObjective):
            with sharded.gathered(self.unwrapped):
                self.objective.after_step(self.unwrapped)

    def _whole_weights(self) -> dict[str, torch.Tensor] | None:
        """All weights on the main process; None where the model has them."""
        return zero.whole_weights(self.model) if zero.is_engine(self.model) else sharded.whole_weights(self.unwrapped)

    def _agree(self, loss: torch.Tensor, grad_norm: torch.Tensor, batch: Batch, stop: StopRequest) -> dict[str, float]:
        """What all processes must know alike, in one message: the loss, whether to step, whether to stop."""
        is_finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        has_failed = self.writer is not None and self.writer.has_failed()
        signals = [stop.received == number for number in STOPPING]
        counts = [len(batch["row_ids"]), len(batch["set_aside"]), has_failed, *signals]
        message = torch.cat(
            [
                loss.reshape(1).float(),
                (~is_finite).reshape(1).float(),
                torch.tensor(counts, dtype=torch.float32, device=loss.device),
            ]
        )
        message = self.accelerator.reduce(message, reduction="sum")
        loss_sum, num_not_finite, rows, set_aside, num_failed, *received = message.tolist()
        return {
            "loss": loss_sum / self.accelerator.num_processes if rows else math.nan,
            "is_finite": float(num_not_finite == 0),
            "rows": rows,
            "set_aside": set_aside,
            "failed_checkpoints": num_failed,
            "signal": float(max(number if count else 0 for number, count in zip(STOPPING, received, strict=True))),
        }

    def _skip_or_stop(self, values: Mapping[str, torch.Tensor], grad_norm: torch.Tensor, batch: Batch) -> None:
        """Count a step without a finite loss, or raise an error that helps to find its cause."""
        names = [name for name, value in values.items() if not torch.isfinite(value).all()]
        rows = gather_object(_rows_not_finite(batch))  # of all processes: the log shows the main one's messages
        message = (
            f"step {self.step + 1}: not finite: {', '.join(names) or 'the gradient alone'} (gradient norm "
            f"{float(grad_norm)}). " + (f"Inputs with NaN or infinity: {rows[:_MAX_NAMED_ROWS]}. " if rows else "")
        ) + f"Rows of this process: {batch['row_ids'][:_MAX_NAMED_ROWS]}."
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        has_updated = zero.is_engine(self.model) and bool(torch.isfinite(grad_norm))  # DeepSpeed looks at no loss
        must_stop = self.arguments.on_nonfinite_loss == "stop" or self.skipped_in_a_row > _MAX_SKIPPED_IN_A_ROW
        if must_stop or has_updated:
            raise FloatingPointError(
                f"{message} Lower the learning rate, look at the rows, or set training.on_nonfinite_loss=skip; "
                "the newest checkpoint is from before."
            )
        logger.warning("%s The step is skipped.", message)

    def _skip_without_rows(self, batch: Batch) -> None:
        """Count a step for which no process could read a row; many in a row mean that the data are gone."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        example = batch["set_aside"][:1]
        message = f"step {self.step + 1}: not one row of the batch could be read, here for instance {example}."
        if self.skipped_in_a_row > _MAX_SKIPPED_IN_A_ROW:
            raise NoRowsError(
                f"{message} So were {_MAX_SKIPPED_IN_A_ROW} batches before. See whether the data are still there, then "
                "start again with --resume."
            )
        logger.warning("%s The step is skipped.", message)

    def _loader(self) -> DataLoader[Any]:
        """Batches from the current step to the last, through all epochs."""
        sampler = EpochBatchSampler(
            len(self.dataset),
            self.arguments.batch_size_per_process,
            self.arguments.seed,
            self.max_steps,
            first_step=self.step,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        return DataLoader(
            self.dataset,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=self.collator,
            num_workers=self.arguments.num_workers,
            worker_init_fn=ignore_stop_signals,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator(),  # its own, so that starting it draws nothing from the run's random states
        )

    def _log(self, values: Mapping[str, Any]) -> None:
        """Write one point to all records."""
        shown = {name: float(value) for name, value in values.items() if name not in ("is_finite", "signal")}
        shown |= {
            "epoch": self.step / self.steps_per_epoch,
            "rows_set_aside": float(self.rows_set_aside),
            "skipped_steps": float(self.skipped_steps),
        }
        self._write(shown)

    def _evaluate(self) -> None:
        """Validate; the random states stay as they were."""
        if self.evaluate_fn is None:
            return
        self.watch.enter(f"validating after step {self.step}")
        state = checkpoints.capture_random_state(self.accelerator.device)
        self.model.eval()
        with torch.no_grad():
            values = self.evaluate_fn(self.unwrapped, self.step)
        self.model.train()
        checkpoints.restore_random_state(state, self.accelerator.device)
        self.last_validation = {f"validation_{name}": float(value) for name, value in values.items()}
        self._write(self.last_validation)
        if self.accelerator.is_main_process:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            logger.info("step %d: validation: %s", self.step, shown)
        if self.arguments.best_metric is not None:
            self._keep_if_best(values, self.arguments.best_metric)

    def _progress(self) -> early_stopping.Progress:
        """Where the validations stand; the same on all processes."""
        return early_stopping.judge(self.validations, self.arguments)

    def _keep_if_best(self, values: Mapping[str, float], metric: str) -> None:
        """Note the metric of the main process on all of them, and keep the model where it is better than before."""
        if metric not in values:
            raise ValueError(f"training.best_metric={metric} is none of the validation: it gives {sorted(values)}.")
        value = torch.tensor([float(values[metric])], dtype=torch.float64)
        value = broadcast(value.to(self.accelerator.device), from_process=0)
        self.validations.append((self.step, float(value)))
        if self._progress().best_step != self.step:
            return
        weights = self._whole_weights()
        path = early_stopping.best_model_path(self.output_dir, self.step)

        def write() -> None:
            if self.accelerator.is_main_process:
                path.parent.mkdir(exist_ok=True)
                checkpoints.save_model(path, self.unwrapped, self.processor, weights)

        checkpoints.together(write, path.with_name(f"{path.name}.tmp"), self.accelerator)

    def _save_final_model(self, model_path: Path, weights: dict[str, torch.Tensor] | None) -> None:
        """The model of the best validation, or that of the last step; written by the main process."""
        if not self.accelerator.is_main_process:
            return
        best_step = self._progress().best_step
        best = None if best_step is None else early_stopping.best_model_path(self.output_dir, best_step)
        if best is None or not best.is_dir():
            if best is not None:
                logger.warning("%s is gone: the final model is that of step %d", best, self.step)
            checkpoints.save_model(model_path, self.unwrapped, self.processor, weights)
        else:
            logger.info("the final model is that of step %d", best_step)
            early_stopping.copy_model(best, model_path)

    def _write(self, values: Mapping[str, float]) -> None:
        self.record.add_metrics(self.step, values)
        self.accelerator.log(dict(values), step=self.step)

    def _save(self) -> None:
        """Write a checkpoint of the current step, or begin to where it is written in shards."""
        self._finish_checkpoint()
        self.watch.enter(f"writing the checkpoint of step {self.step}")
        state = RunState(
            step=self.step,
            num_rows=len(self.dataset),
            num_processes=self.accelerator.num_processes,
            arguments=asdict(self.arguments),
            skipped_steps=self.skipped_steps,
            rows_set_aside=self.rows_set_aside,
            recipe=dict(self.recipe),
        )
        path = checkpoints.save_checkpoint(
            self.output_dir,
            state,
            self.unwrapped,
            self.optimizer,
            self.accelerator,
            processor=self.processor,
            objective_state=self.objective.state_dict() if isinstance(self.objective, StatefulObjective) else None,
            keep=self.arguments.keep_checkpoints,
            writer=self.writer,
            whole=(zero.whole_weights(self.model), zero.whole_moments(self.model))
            if zero.is_engine(self.model)
            else None,
        )
        self.unfinished = path if self.writer is not None else None
        self.saved_step = self.step
        if self.accelerator.is_main_process:
            early_stopping.remove_others(self.output_dir, self._progress().best_step)
        self.record.set_status("running", self.step)
        logger.info("saved %s", path) if self.writer is None else logger.info("saving %s", path)

    def _finish_checkpoint(self) -> None:
        """Wait until the checkpoint that is written in the background is whole."""
        if self.writer is not None and self.unfinished is not None:
            self.watch.enter(f"waiting for the checkpoint {self.unfinished.name}")
            checkpoints.finish_checkpoint(self.writer, self.unfinished, self.accelerator)
            self.unfinished = None

    def _plan_steps(self) -> None:
        """How many steps the rows give, once all processes agree on them."""
        num_processes, batch_size = self.accelerator.num_processes, self.arguments.batch_size_per_process
        check_processes_agree(len(self.dataset), self.arguments, self.recipe, self.accelerator)
        check_rows(len(self.dataset), num_processes)
        self.steps_per_epoch = steps_per_epoch(len(self.dataset), batch_size, num_processes)
        self.max_steps = self.arguments.max_steps or int(self.arguments.num_epochs or 0) * self.steps_per_epoch

    def _checkpoint_to_resume(self, resume: bool | str | Path) -> Path | None:
        """Where to continue from: the main process looks, before it writes, and tells the others."""
        looked: list[Any] = [None if isinstance(resume, bool) else Path(resume), None]
        if self.accelerator.is_main_process and looked[0] is None:
            looked[0] = checkpoints.find_checkpoint(self.output_dir)
        elif self.accelerator.is_main_process:
            looked[1] = checkpoints.find_defect(looked[0], in_content=True)
        found, defect = broadcast_object_list(looked)
        checkpoints.require_no_defect(found, defect)
        if resume is False and found is not None:
            raise ValueError(
                f"{self.output_dir} already holds a run ({found.name}). Resume it, or choose another "
                "training.output_dir."
            )
        _make_output_dir(self.output_dir, self.accelerator)
        if resume is True and found is None:
            logger.warning("%s holds no complete checkpoint: the run starts from its beginning", self.output_dir)
        return found

    def _restore(self, checkpoint: Path) -> None:
        """Put the run where the checkpoint left it."""
        state = checkpoints.read_run_state(checkpoint)
        num_processes = self.accelerator.num_processes
        check_continues(checkpoint, state, len(self.dataset), self.arguments, self.recipe, num_processes)
        is_same_world = state.num_processes == num_processes
        checkpoints.restore_checkpoint(
            checkpoint,
            self.unwrapped,
            self.optimizer,
            self.accelerator,
            with_random_state=is_same_world,
            group=None if self.writer is None else self.writer.group,
        )
        if not is_same_world:
            _seed_everything(self.arguments.seed, self.accelerator.process_index, state.step)
            logger.warning(
                "%s was written by %d processes, and %d continue it: with the same rows at each step, but dropout and "
                "rounding differ from a run that was never stopped",
                checkpoint,
                state.num_processes,
                num_processes,
            )
        if isinstance(self.objective, StatefulObjective):
            self.objective.load_state_dict(checkpoints.load_objective_state(checkpoint))
        self.step = self.first_step = self.saved_step = state.step
        self.skipped_steps, self.rows_set_aside = state.skipped_steps, state.rows_set_aside


def _make_output_dir(output_dir: Path, accelerator: Accelerator) -> None:
    """Create the folder of the run; see that it can be written to and that all processes see the same one.

    Raises:
        ValueError: it cannot, or they do not.
    """
    probe = output_dir / ".probe"
    try:
        if accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            probe.touch()
        accelerator.wait_for_everyone()
    except OSError as error:
        raise ValueError(f"training.output_dir={output_dir} cannot be written to: {error}.") from error
    is_visible = probe.exists()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        probe.unlink()
    if not is_visible:
        raise ValueError(
            f"training.output_dir={output_dir} is not the same folder for all processes: checkpoints need one that "
            "every node sees."
        )


def _seed_everything(seed: int, process_index: int, *step: int) -> None:
    """Give each process its own random states, so that no two of them drop the same units."""
    own = np.random.SeedSequence([seed, process_index, *step]).generate_state(1)[0]
    random.seed(int(own))
    np.random.seed(int(own))
    torch.manual_seed(int(own))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def _rows_not_finite(batch: Batch) -> list[str]:
    """Ids of rows of which an input is NaN or infinite."""
    row_ids = batch["row_ids"]
    broken = torch.zeros(len(row_ids), dtype=torch.bool)
    for value in batch.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and len(value) == len(row_ids) > 0:
            broken |= ~torch.isfinite(value).reshape(len(value), -1).all(dim=1).cpu()
    return [row_id for row_id, is_broken in zip(row_ids, broken.tolist(), strict=True) if is_broken]


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
