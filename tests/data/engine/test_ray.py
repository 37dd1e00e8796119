"""The engine's tasks on Ray give what processes give."""

from functools import partial

import pytest

from medclip_hf.data.engine.ray import RayRunner
from medclip_hf.data.stages import Tally
from medclip_hf.data.workers import ProcessRunner, Task, TaskReport

ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")


class Square:
    """Keeps as many records as the square of the task's number, times a factor that it holds."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, task):
        return TaskReport(task, 1, Tally(kept=self.factor * task.number**2))


@pytest.fixture
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_every_task_is_done_once_with_the_same_report(cluster):
    # Sent by value: a worker of Ray cannot import a test.
    ray.cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["Square"]))
    tasks = [Task(number, "train") for number in range(6)]
    reports = sorted(RayRunner(1)(partial(Square, 3), tasks), key=lambda report: report.task.number)
    assert reports == list(ProcessRunner(0)(partial(Square, 3), tasks))
