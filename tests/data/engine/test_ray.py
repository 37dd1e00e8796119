"""The engine's tasks on Ray give what processes give."""

import os
import signal
from functools import partial

import pytest

from medclip_hf.data.engine.ray import RayRunner
from medclip_hf.data.stages import Tally
from medclip_hf.data.workers import ProcessRunner, Task, TaskReport

ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")


class Square:
    """Keeps as many records as the square of the task's number, times a factor that it holds; some task may kill it."""

    def __init__(self, factor, deadly=None):
        self.factor, self.deadly = factor, deadly

    def __call__(self, task):
        if task.number == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return TaskReport(task, 1, Tally(kept=self.factor * task.number**2))

    def set_aside(self, task, reason):
        return TaskReport(task, 1, Tally(dropped={reason: 1}))


@pytest.fixture
def cluster():
    light = {"env_vars": {"MEDCLIP_HF_REGISTER": "0"}}  # actors start in a fifth of the time
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=light)
    # Sent by value: a worker of Ray cannot import a test.
    ray.cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["Square"]))
    yield
    ray.shutdown()


@pytest.mark.timeout(600)  # five workers start, each of which imports the package
def test_every_task_is_done_once_and_one_that_kills_its_workers_is_set_aside(cluster):
    tasks = [Task(number, "train") for number in range(6)]
    reports = sorted(RayRunner(1)(partial(Square, 3, 0), tasks), key=lambda report: report.task.number)
    assert reports[0] == TaskReport(tasks[0], 1, Tally(dropped={"worker process killed": 1}))
    assert reports[1:] == list(ProcessRunner(0)(partial(Square, 3), tasks[1:]))
