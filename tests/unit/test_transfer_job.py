"""A layer-wise transfer without bytes: order, results, waiting, and how it ends."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist import CacheTask, LLMException, LLMStatusCode
from llm_datadist.engine.transfer_job import Destination, LayerTransfer, TransferJob, TransferJobs

SUCCESS = LLMStatusCode.LLM_SUCCESS
INVALID = LLMStatusCode.LLM_PARAM_INVALID
FAILED = LLMStatusCode.LLM_FAILED
NOT_LINKED = LLMStatusCode.LLM_NOT_YET_LINK
RUNNING = LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT

PATIENCE_S = 10.0


def plan(*layers: range, blocks: tuple[list[int], list[int], int] | None = None) -> LayerTransfer:
    """Transfer of layer ranges to clusters 100, 101, ...; tensor t of the source goes to address 1000 * cluster + t."""
    destinations = tuple(
        Destination(
            100 + index,
            wanted,
            tuple(1000 * (100 + index) + tensor for tensor in range(2 * wanted.start, 2 * wanted.stop)),
            None if blocks else index,
        )
        for index, wanted in enumerate(layers)
    )
    return LayerTransfer(7, destinations, *(blocks or (None, None, 0)))


class Model:
    """Notes what the job asks for and pushes; answers as it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, int | None]] = []
        self.answers: dict[int, Any] = {}  # of the synchronizer, by layer; True unless given
        self.faults: dict[tuple[int, int], BaseException] = {}  # by layer and cluster
        self.pushes: list[tuple[Any, ...]] = []

    def synchronize_layer(self, layer: int, timeout: None) -> object:
        self.events.append(("wait", layer, timeout))
        answer = self.answers.get(layer, True)
        if isinstance(answer, BaseException):
            raise answer
        return answer() if callable(answer) else answer

    def push_layer(self, *args: Any) -> None:
        cluster_id, _, (first, _), *_ = args
        self.events.append(("push", first // 2, cluster_id))
        self.pushes.append(args)
        fault = self.faults.get((first // 2, cluster_id))
        if fault is not None:
            raise fault

    def run(self, transfer: LayerTransfer) -> list[LLMStatusCode | None]:
        job = TransferJob(transfer)
        job.run(self.synchronize_layer, self.push_layer)
        return job.get_results(0)

    def waited_for(self) -> list[int]:
        return [layer for event, layer, _ in self.events if event == "wait"]


@pytest.fixture
def model() -> Model:
    return Model()


# ---- layers and results


def test_layers_go_out_in_order_each_after_the_model_has_computed_it(model: Model) -> None:
    assert model.run(plan(range(3))) == [SUCCESS]
    assert model.events == [
        (event, layer, detail) for layer in range(3) for event, detail in (("wait", None), ("push", 100))
    ]


def test_what_is_pushed_of_a_slot(model: Model) -> None:
    model.run(plan(range(1, 3)))
    assert model.pushes == [
        (100, 7, (2, 2), [100_002, 100_003], 0, None, None, 0, None, 0),
        (100, 7, (4, 2), [100_004, 100_005], 0, None, None, 0, None, 0),
    ]


def test_what_is_pushed_of_blocks(model: Model) -> None:
    model.run(plan(range(1), blocks=([0, 1], [5, 6], 64)))
    assert model.pushes == [(100, 7, (0, 2), [100_000, 100_001], None, [0, 1], [5, 6], 64, None, 0)]


def test_a_layer_is_waited_for_once_and_goes_to_each_config_in_order(model: Model) -> None:
    assert model.run(plan(range(1, 2), range(2))) == [SUCCESS, SUCCESS]
    assert model.events == [("wait", 0, None), ("push", 0, 101), ("wait", 1, None), ("push", 1, 100), ("push", 1, 101)]


def test_layers_that_no_config_wants_are_skipped(model: Model) -> None:
    assert model.run(plan(range(4, 5), range(1, 2))) == [SUCCESS, SUCCESS]
    assert model.waited_for() == [1, 4]


@pytest.mark.parametrize("falsy", [False, None, 0, ""])
def test_a_layer_that_the_model_failed_at_ends_the_job(model: Model, falsy: object) -> None:
    model.answers[0] = falsy
    assert model.run(plan(range(3), range(2, 4))) == [INVALID, None]
    assert model.events == [("wait", 0, None)]


def test_configs_that_were_complete_keep_their_success(model: Model) -> None:
    model.answers[2] = False
    assert model.run(plan(range(2), range(3), range(2, 4), range(3, 4))) == [SUCCESS, INVALID, INVALID, None]


def test_a_failed_push_ends_the_job(model: Model) -> None:
    model.faults[1, 101] = LLMException("no link", status_code=NOT_LINKED)
    assert model.run(plan(range(2), range(3), range(3), range(2, 3))) == [SUCCESS, NOT_LINKED, None, None]
    assert model.events[-1] == ("push", 1, 101)


def test_two_configs_of_one_cluster_have_results_of_their_own(model: Model) -> None:
    first, second = plan(range(1), range(2)).destinations
    transfer = LayerTransfer(7, (first, second._replace(cluster_id=100)), None, None, 0)
    model.faults[1, 100] = LLMException("busy", status_code=LLMStatusCode.LLM_LINK_BUSY)
    assert model.run(transfer) == [SUCCESS, LLMStatusCode.LLM_LINK_BUSY]


class UnusableAnswer:
    def __bool__(self) -> bool:
        raise ValueError("neither true nor false")


@pytest.mark.parametrize("raised", [RuntimeError("the model broke"), SystemExit(1), UnusableAnswer()])
def test_an_exception_in_the_synchronizer_is_logged_and_ends_the_job(
    model: Model, caplog: pytest.LogCaptureFixture, raised: object
) -> None:
    model.answers[1] = raised
    with caplog.at_level(logging.ERROR, "llm_datadist"):
        assert model.run(plan(range(1), range(3), range(2, 3))) == [SUCCESS, FAILED, None]
    assert "synchronize_layer(1) raised" in caplog.text
    assert "Traceback" in caplog.text


def test_an_unforeseen_exception_in_a_push_is_logged_and_ends_the_job(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    model.faults[0, 100] = MemoryError()
    with caplog.at_level(logging.ERROR, "llm_datadist"):
        assert model.run(plan(range(2))) == [FAILED]
    assert "MemoryError" in caplog.text


# ---- the task


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "llm_datadist-transfer"]


class Gate:
    """Holds the synchronizer at a layer until the test opens it."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self) -> bool:
        self.reached.set()
        return self._open.wait(PATIENCE_S)

    def wait_until_reached(self) -> None:
        assert self.reached.wait(PATIENCE_S)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate() -> Gate:
    return Gate()


def start(jobs: TransferJobs, model: Model, transfer: LayerTransfer, source: object = None) -> CacheTask:
    return CacheTask(jobs.start(transfer, model.synchronize_layer, model.push_layer, source))


def test_a_running_task_reports_the_timeout_for_every_config(model: Model, gate: Gate) -> None:
    model.answers[1] = gate
    task = start(TransferJobs(), model, plan(range(1), range(2)))
    gate.wait_until_reached()
    for timeout in (0, 1, True):
        assert task.synchronize(timeout) is RUNNING
        assert task.get_results(timeout) == [RUNNING, RUNNING]
    gate.open()
    assert task.synchronize() is SUCCESS
    assert task.get_results() == [SUCCESS, SUCCESS]
    assert task.synchronize(0) is SUCCESS
    assert task.get_results(2**32 - 1) == [SUCCESS, SUCCESS]


def test_a_task_reports_the_first_failure(model: Model) -> None:
    model.answers[1] = False
    task = start(TransferJobs(), model, plan(range(1), range(2, 4), range(2)))
    assert task.get_results() == [SUCCESS, None, INVALID]
    assert task.synchronize() is INVALID


def test_results_belong_to_the_caller(model: Model) -> None:
    task = start(TransferJobs(), model, plan(range(1)))
    task.get_results().clear()
    assert task.get_results() == [SUCCESS]


@pytest.mark.parametrize(
    ("timeout", "kind"), [(-1, ValueError), (2**32, ValueError), ("1", TypeError), (1.5, TypeError)]
)
def test_timeouts_that_cannot_be_used(model: Model, timeout: Any, kind: type[Exception]) -> None:
    task = start(TransferJobs(), model, plan())
    with pytest.raises(kind):
        task.synchronize(timeout)
    with pytest.raises(kind):
        task.get_results(timeout)


def test_several_threads_wait_for_one_task(model: Model, gate: Gate) -> None:
    model.answers[0] = gate
    task = start(TransferJobs(), model, plan(range(1)))
    codes: list[LLMStatusCode] = []
    waiting = [threading.Thread(target=lambda: codes.append(task.synchronize())) for _ in range(3)]
    for thread in waiting:
        thread.start()
    gate.open()
    for thread in waiting:
        thread.join(PATIENCE_S)
    assert codes == [SUCCESS] * 3


def test_a_task_without_configs_has_ended_at_once(model: Model) -> None:
    task = start(TransferJobs(), model, plan())
    assert task.synchronize(0) is SUCCESS
    assert task.get_results(0) == []
    assert model.events == []


# ---- threads


def test_the_synchronizer_runs_in_the_thread_of_the_transfer(model: Model, gate: Gate) -> None:
    seen: list[threading.Thread] = []

    def look() -> bool:
        seen.append(threading.current_thread())
        return gate()

    model.answers[0] = look
    task = start(TransferJobs(), model, plan(range(1)))
    gate.wait_until_reached()
    assert seen == threads()
    assert seen[0].daemon
    gate.open()
    assert task.synchronize() is SUCCESS
    wait_for(lambda: not threads())


def test_the_source_lives_as_long_as_the_transfer(model: Model, gate: Gate) -> None:
    class Source:
        pass

    source = Source()
    watched = weakref.ref(source)
    model.answers[0] = gate
    task = start(TransferJobs(), model, plan(range(1)), source)
    gate.wait_until_reached()
    del source
    assert watched() is not None
    gate.open()
    assert task.synchronize() is SUCCESS
    wait_for(lambda: watched() is None)


def test_closing_waits_for_a_push_and_ends_the_job(model: Model) -> None:
    jobs, pushing, closing = TransferJobs(), threading.Event(), threading.Event()
    finished: list[bool] = []

    def push_layer(*args: Any) -> None:
        model.push_layer(*args)
        pushing.set()
        closing.wait(PATIENCE_S)
        finished.append(True)

    task = CacheTask(jobs.start(plan(range(3)), model.synchronize_layer, push_layer, None))
    assert pushing.wait(PATIENCE_S)
    opener = threading.Timer(0.05, closing.set)
    opener.start()
    jobs.close(PATIENCE_S)
    assert finished == [True], "the memory may go now: nobody pushes any more"
    assert not threads()
    assert task.get_results(0) == [FAILED]
    assert model.waited_for() == [0]
    opener.join()


def test_closing_does_not_wait_longer_than_it_may(model: Model) -> None:
    jobs, pushing, release = TransferJobs(), threading.Event(), threading.Event()

    def push_layer(*args: Any) -> None:
        pushing.set()
        release.wait(PATIENCE_S)

    task = CacheTask(jobs.start(plan(range(1)), model.synchronize_layer, push_layer, None))
    assert pushing.wait(PATIENCE_S)
    started = time.monotonic()
    jobs.close(0.05)
    assert 0.05 <= time.monotonic() - started < PATIENCE_S / 2
    release.set()
    assert task.synchronize() is SUCCESS, "what was under way is reported as it went"


def test_closing_does_not_wait_for_the_program(model: Model, gate: Gate) -> None:
    jobs = TransferJobs()
    model.answers[1] = gate
    task = start(jobs, model, plan(range(1), range(3), range(2, 3)))
    gate.wait_until_reached()
    started = time.monotonic()
    jobs.close(PATIENCE_S)
    assert time.monotonic() - started < PATIENCE_S / 2
    assert task.synchronize(0) is RUNNING
    pushes = len(model.pushes)
    gate.open()
    assert task.get_results() == [SUCCESS, FAILED, None]
    assert len(model.pushes) == pushes, "nothing is pushed after the engine was closed"


def test_the_synchronizer_may_close(model: Model) -> None:
    jobs = TransferJobs()

    def close() -> bool:
        jobs.close(PATIENCE_S)
        return True

    model.answers[0] = close
    assert start(jobs, model, plan(range(1))).get_results() == [FAILED]
    assert model.pushes == []


def test_jobs_run_side_by_side_and_closing_ends_all(gate: Gate) -> None:
    jobs, models = TransferJobs(), [Model() for _ in range(3)]
    gates = [Gate() for _ in models]
    tasks = []
    for model, its_gate in zip(models, gates):
        model.answers[0] = its_gate
        tasks.append(start(jobs, model, plan(range(1))))
    for its_gate in gates:
        its_gate.wait_until_reached()
    gates[1].open()
    assert tasks[1].synchronize() is SUCCESS
    jobs.close(PATIENCE_S)
    for its_gate in gates:
        its_gate.open()
    assert [task.synchronize() for task in tasks] == [FAILED, SUCCESS, FAILED]


def test_no_thread_to_be_had(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    jobs = TransferJobs()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(LLMException, match="can't start new thread") as caught:
            start(jobs, model, plan(range(1)))
    assert caught.value.status_code is FAILED
    jobs.close(0)
