"""Tasks in processes: all of them done, whatever dies."""

import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest

from medclip_hf.data.stages import Tally
from medclip_hf.data.workers import ProcessRunner, Task, TaskReport, as_plain, from_plain

TASKS = [Task(number, "numbers") for number in range(7)]


class Count:
    """Reports its task; kills its process at a task that the folder does not let pass."""

    def __init__(self, folder=None, deaths=0):
        self.folder, self.deaths = folder, deaths

    def __call__(self, task):
        if task.number == 3 and self.deaths:
            died = len(list(self.folder.iterdir()))
            if died < self.deaths:
                (self.folder / str(died)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return TaskReport(task, 1, Tally(kept=task.number))

    def set_aside(self, task, reason):
        return TaskReport(task, 1, Tally(dropped={reason: 1}))


class Broken:
    def __init__(self):
        raise ValueError("no model at this path")


def numbers(reports):
    return sorted(report.task.number for report in reports)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_task_is_done_once(num_workers):
    assert numbers(ProcessRunner(num_workers)(Count, TASKS)) == list(range(7))


def test_a_worker_that_is_killed_once_loses_nothing(tmp_path):
    reports = list(ProcessRunner(1)(partial(Count, tmp_path, 1), TASKS))
    assert numbers(reports) == list(range(7))
    assert sum(report.tally.kept for report in reports) == sum(range(7))


def test_a_task_that_kills_every_worker_is_set_aside(tmp_path):
    reports = list(ProcessRunner(1)(partial(Count, tmp_path, 100), TASKS))
    assert numbers(reports) == list(range(7))
    (lost,) = [report for report in reports if report.tally.dropped]
    assert (lost.task.number, dict(lost.tally.dropped)) == (3, {"worker process killed": 1})


def test_the_death_of_the_server_that_workers_are_forked_from_loses_nothing(monkeypatch):
    submit, calls = ProcessPoolExecutor.submit, []

    def submit_once_without_server(pool, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise EOFError("unexpected EOF")  # as multiprocessing says where its server died before it forked
        return submit(pool, *arguments)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit_once_without_server)
    assert numbers(ProcessRunner(1)(Count, TASKS)) == list(range(7))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_step_that_cannot_start_says_why(num_workers):
    with pytest.raises(ValueError, match="no model at this path"):
        list(ProcessRunner(num_workers)(Broken, TASKS))


class CountModels(Count):
    def __call__(self, task):
        return TaskReport(task, 1, Tally(kept=int("medclip_hf.registration" in sys.modules)))


def test_workers_start_without_the_models():
    assert "medclip_hf.registration" in sys.modules
    (report,) = ProcessRunner(1)(CountModels, TASKS[:1])
    assert report.tally.kept == 0


class Sleep(Count):
    def __call__(self, task):
        (self.folder / str(os.getpid())).touch()
        time.sleep(60)
        return TaskReport(task)


def _run_sleepers(folder):
    list(ProcessRunner(1)(partial(Sleep, folder), TASKS))


def test_workers_leave_with_a_parent_that_is_killed(tmp_path):
    import multiprocessing

    parent = multiprocessing.get_context("spawn").Process(target=_run_sleepers, args=(tmp_path,))
    parent.start()
    deadline = time.monotonic() + 180  # the imports of two processes on a busy machine
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    (worker,) = [int(path.name) for path in tmp_path.iterdir()]
    os.kill(parent.pid, signal.SIGKILL)  # and not joined: nobody has collected its exit code yet
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{worker}/status") and time.monotonic() < deadline:  # noqa: PTH110
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{worker}/status")  # noqa: PTH110
    parent.join()


def test_a_report_survives_as_plain_values():
    report = TaskReport(Task(4, "train"), 9, Tally(kept=3))
    report.tally.dropped["image damaged"] = 6
    assert from_plain(as_plain(report)) == report
