"""The tasks of the MedConcept engine on a Ray cluster: Ray Data spreads them over actors that hold the models.

Ray places the work, restarts what dies and streams the reports back; the steps and their files are those of one
machine. All nodes must see the output folder, and the source where it is a folder, under the same path.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from medclip_hf.data.workers import MakeStep, Task, TaskReport, as_plain, from_plain

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
        num_actors = min(self.num_actors or self._num_cpus(), len(tasks))
        rows = ray_data.from_items(
            [{"number": task.number, "name": task.name} for task in tasks], override_num_blocks=len(tasks)
        )
        reports = rows.map(
            _StepActor,
            fn_constructor_args=(make_step,),
            compute=ray_data.ActorPoolStrategy(size=num_actors),
            num_cpus=1,
            num_gpus=self.gpus_per_actor or None,
        )
        for report in reports.iter_rows():
            yield from_plain(report)

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
            )
        context = ray_data.DataContext.get_current()
        context.enable_progress_bars = False  # ours counts items, not blocks
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
