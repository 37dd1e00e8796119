"""The tasks of the MedConcept engine on a Ray cluster: Ray Data spreads them over actors that hold the models.

Ray places the work, restarts actors that die and streams the reports back; the steps and their files are those of one
machine. All nodes must see the output folder, and the source where it is a folder, under the same path.

What an actor had in hand when it died is done again, each task by a worker of its own; a task that kills that as well
is set aside, as on one machine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from medclip_hf.data.workers import DEATHS_ALONE, MakeStep, Task, TaskReport, as_plain, from_plain

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayRunner:
    """Runs tasks on the actors of a Ray cluster.

    Args:
        num_actors: None takes as many as the cluster has CPUs.
        address: of the cluster, ``"auto"`` for the one this node belongs to; None starts one on this machine.
        gpus_per_actor: share of a GPU that each actor holds, for steps with a model.

    Raises:
        ValueError: where Ray is not installed.
    """

    num_actors: int | None = None
    address: str | None = None
    gpus_per_actor: float = 0.0

    def __call__(self, make_step: MakeStep, tasks: Sequence[Task]) -> Iterator[TaskReport]:
        """The reports of all tasks, in the order in which they are done."""
        ray_data = self._connect()
        missing = set(tasks)
        for report in self._run_actors(ray_data, make_step, tasks):
            missing.remove(report.task)
            yield report
        yield from self._run_apart(make_step, sorted(missing, key=lambda task: task.number))

    def _run_actors(self, ray_data: Any, make_step: MakeStep, tasks: Sequence[Task]) -> Iterator[TaskReport]:
        """Reports of the tasks, but for those that an actor had in hand when it died."""
        import ray

        rows = ray_data.from_items(
            [{"number": task.number, "name": task.name} for task in tasks], override_num_blocks=len(tasks)
        )
        reports = rows.map(
            _StepActor,
            fn_constructor_args=(make_step,),
            compute=ray_data.ActorPoolStrategy(size=min(self.num_actors or self._num_cpus(), len(tasks))),
            num_cpus=1,
            num_gpus=self.gpus_per_actor or None,
            max_task_retries=0,  # by default Ray repeats for ever a task that kills its actor
        )
        try:
            yield from map(from_plain, reports.iter_rows())
        except ray.exceptions.ActorDiedError as error:
            raise RuntimeError(f"no actor could be started: {str(error).strip().splitlines()[-1]}") from error

    def _run_apart(self, make_step: MakeStep, tasks: Sequence[Task]) -> Iterator[TaskReport]:
        """Reports of tasks that have a worker each; one of which it dies is set aside."""
        import ray

        do = ray.remote(num_cpus=1, num_gpus=self.gpus_per_actor, max_retries=DEATHS_ALONE - 1)(_do)
        under_way = {do.remote(make_step, task): task for task in tasks}
        while under_way:
            (done,), _ = ray.wait(list(under_way), num_returns=1)
            task = under_way.pop(done)
            try:
                yield from_plain(ray.get(done))
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
                logger.warning("task %d killed its worker", task.number)
                yield make_step().set_aside(task, "worker process killed")

    def _connect(self) -> Any:
        try:
            import ray
            import ray.data as ray_data
        except ImportError as error:
            raise ValueError("--engine ray needs Ray: install medclip-hf[ray]") from error
        if not ray.is_initialized():
            ray.init(
                address=self.address,
                num_cpus=self.num_actors if self.address is None else None,
                include_dashboard=False if self.address is None else None,
                log_to_driver=False,
                runtime_env={"env_vars": {"MEDCLIP_HF_REGISTER": "0"}},  # actors handle data
            )
        context = ray_data.DataContext.get_current()
        context.enable_progress_bars = False  # ours counts items, not blocks
        context.max_errored_blocks = -1  # one block is one task: those without a report are done again
        return ray_data

    def _num_cpus(self) -> int:
        import ray

        return max(int(ray.cluster_resources().get("CPU", 1)), 1)


class _StepActor:
    """Holds a step; one task after another comes as a row of plain values."""

    def __init__(self, make_step: MakeStep) -> None:
        self.step = make_step()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return as_plain(self.step(Task(int(row["number"]), str(row["name"]))))


def _do(make_step: MakeStep, task: Task) -> dict[str, Any]:
    return as_plain(make_step()(task))
