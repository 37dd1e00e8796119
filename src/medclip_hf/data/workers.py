"""Tasks spread over the processes of one machine: results as they come, and a run that survives dying workers.

A step is an object that is made once in each process (there it loads its models) and called with one task after
another. Every task writes its own files and can be repeated, so the order of the results carries no meaning.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any, Protocol

from medclip_hf.data.stages import Tally

logger = logging.getLogger(__name__)

# What the steps of the MedConcept engine need; spaCy, which they load only where they look for concepts, takes seconds.
PRELOADED = ("medclip_hf.data.engine.steps", "medclip_hf.data.concepts.extraction", "spacy", "scispacy.abbreviation")

DEATHS_ALONE = 2  # of the process that works on one task and nothing else, until the task is set aside


@dataclass(frozen=True)
class Task:
    """One piece of work of a step: its number, and what it is about (``"train"``)."""

    number: int
    name: str = ""


@dataclass(frozen=True)
class TaskReport:
    """What came of a task: how many items of the source it had, and what became of the records."""

    task: Task
    num_items: int = 0
    tally: Tally = field(default_factory=Tally)


class Step(Protocol):
    """What runs in a worker."""

    def __call__(self, task: Task) -> TaskReport:
        """Do the task; its last act puts the result under its name."""

    def set_aside(self, task: Task, reason: str) -> TaskReport:
        """Write the result of a task that cannot be done: everything dropped for this reason."""


MakeStep = Callable[[], Step]
Runner = Callable[[MakeStep, Sequence[Task]], Iterator[TaskReport]]


@dataclass(frozen=True)
class ProcessRunner:
    """Runs tasks in `num_workers` processes, or in this one where it is 0.

    A process that dies (killed for memory, a decoder that crashes) takes the whole pool with it, and nobody knows which
    task was to blame. The tasks that were under way are then repeated one by one in a process of their own; one that
    kills it again is set aside, with a reason in the drops, and the others go on.
    """

    num_workers: int = 0

    def __call__(self, make_step: MakeStep, tasks: Sequence[Task]) -> Iterator[TaskReport]:
        """The reports of all tasks, in the order in which they are done."""
        if self.num_workers <= 0:
            step = make_step()
            yield from map(step, tasks)
            return
        remaining = list(reversed(tasks))
        while remaining:
            suspects: list[Task] = []
            yield from self._run_pool(make_step, remaining, suspects)
            yield from _run_one_by_one(make_step, suspects)

    def _run_pool(self, make_step: MakeStep, remaining: list[Task], suspects: list[Task]) -> Iterator[TaskReport]:
        """Take tasks off the end of `remaining` until none is left or the pool breaks; then name the suspects."""
        in_flight: dict[Future[TaskReport], Task] = {}
        pool = _pool(make_step, min(self.num_workers, len(remaining)))
        try:
            while remaining or in_flight:
                while remaining and len(in_flight) < 2 * self.num_workers:
                    in_flight[_submit(pool, remaining[-1])] = remaining[-1]
                    remaining.pop()
                done, _ = wait(in_flight, return_when=FIRST_COMPLETED)
                for future in done:
                    task = in_flight.pop(future)
                    try:
                        yield future.result()
                    except BrokenProcessPool:
                        suspects.append(task)
                if suspects:
                    raise BrokenProcessPool
        except BrokenProcessPool:
            suspects += [task for task in in_flight.values() if task not in suspects]
            logger.warning("a worker process died; repeating %d tasks one by one", len(suspects))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _run_one_by_one(make_step: MakeStep, suspects: list[Task]) -> Iterator[TaskReport]:
    """The reports of tasks of which at least one kills its process: that one is set aside."""
    deaths = 0
    while suspects:
        with _pool(make_step, 1) as pool:
            try:
                while suspects:
                    yield _submit(pool, suspects[0]).result()
                    suspects.pop(0)
                    deaths = 0
            except BrokenProcessPool:
                deaths += 1
                logger.warning("task %d killed its process", suspects[0].number)
        if deaths == DEATHS_ALONE:
            yield make_step().set_aside(suspects.pop(0), "worker process killed")
            deaths = 0


_step: Step | Exception | None = None  # of this worker process; what went wrong where it could not be made


def _pool(make_step: MakeStep, num_workers: int) -> ProcessPoolExecutor:
    context = fork_server(*PRELOADED)
    return ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(make_step,))


def fork_server(*modules: str) -> ForkServerContext:
    """The way to start processes that are copies of a server which has imported these modules, and not our models.

    They start at once and share its memory, while a fork of this process would copy locks of threads that it has not.
    A process has one server: modules named after it has started are imported by each worker.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    before = os.environ.get("MEDCLIP_HF_REGISTER")
    os.environ["MEDCLIP_HF_REGISTER"] = "0"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["MEDCLIP_HF_REGISTER"]
        else:
            os.environ["MEDCLIP_HF_REGISTER"] = before
    return context


def _submit(pool: ProcessPoolExecutor, task: Task) -> Future[TaskReport]:
    try:
        return pool.submit(_call_step, task)
    except (EOFError, ConnectionError) as error:  # the server was killed before it had forked the worker
        raise BrokenProcessPool("the server that workers are forked from died") from error


def _start_worker(make_step: MakeStep) -> None:
    global _step
    end_with_the_run()
    try:
        _step = make_step()
    except Exception as error:  # told to whoever asks: an initializer that fails looks like a death
        _step = error


def end_with_the_run() -> None:
    """Have this worker end when the run that started it does, were that killed.

    A pool's processes outlive a run that was killed, and would write beside the next one. The end of a pipe tells that
    the run is gone even while nobody has collected its exit code, as its process number would not: who waits for the
    output of the run (`subprocess.run`) would wait for the worker.
    """
    threading.Thread(target=_wait_for_the_end, daemon=True).start()


def _wait_for_the_end() -> None:
    run = multiprocessing.parent_process()
    assert run is not None
    run.join()
    os._exit(1)


def _call_step(task: Task) -> TaskReport:
    assert _step is not None
    if isinstance(_step, Exception):
        raise _step
    return _step(task)


def as_plain(report: TaskReport) -> dict[str, Any]:
    """A report as plain values, for frameworks that carry rows and not objects."""
    return {
        "number": report.task.number,
        "name": report.task.name,
        "num_items": report.num_items,
        "tally": json.dumps(report.tally.as_dict()),  # its keys differ from report to report
    }


def from_plain(values: dict[str, Any]) -> TaskReport:
    """The report that `as_plain` took apart."""
    task = Task(int(values["number"]), str(values["name"]))
    return TaskReport(task, int(values["num_items"]), Tally.from_dict(json.loads(values["tally"])))
