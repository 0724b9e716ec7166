"""The background job: the latest request wins, nothing stale is shown, an error ends nothing."""

import random
import threading
import time

import pytest

from perpkit.experiments.sweep import Cancelled
from perpkit.interactive.job import Job, Pace

SOON = 10


@pytest.fixture
def errors() -> list:
    return []


@pytest.fixture
def job(errors):
    job = Job(errors.append)
    yield job
    job.cancel()
    assert job.wait(SOON)


def until_cancelled(started: threading.Event):
    """Work that goes on until it is told to stop, and then tries to show something."""

    def work(request):
        started.set()
        while not request.cancelled():
            time.sleep(0.001)
        request.show(lambda: pytest.fail("a stale request was shown"))

    return work


def test_submit_returns_at_once_and_wait_waits(job):
    go, done = threading.Event(), []

    def work(request):
        assert go.wait(SOON)
        request.show(lambda: done.append(threading.current_thread().name))

    job.submit(work)
    assert not job.wait(0.01)
    go.set()
    assert job.wait(SOON)
    assert done == ["perpkit-job"]


def test_the_latest_request_wins(job):
    started, done = threading.Event(), []
    job.submit(until_cancelled(started))
    assert started.wait(SOON)
    for number in range(20):
        job.submit(lambda request, number=number: request.show(lambda: done.append(number)))
    assert job.wait(SOON)
    assert done[-1] == 19
    # The others are replaced while they wait, or show their number before the next is asked for.
    assert done == sorted(done)


def test_a_waiting_request_is_replaced_without_being_run(job):
    started, hold, done = threading.Event(), threading.Event(), []

    def stubborn(request):
        started.set()
        assert hold.wait(SOON)
        request.show(lambda: done.append("stubborn"))

    job.submit(stubborn)
    assert started.wait(SOON)
    job.submit(lambda request: done.append("replaced"))
    job.submit(lambda request: done.append("last"))
    hold.set()
    assert job.wait(SOON)
    assert done == ["last"]


def test_cancel_stops_the_running_and_forgets_the_waiting(job, errors):
    started = threading.Event()
    job.submit(until_cancelled(started))
    assert started.wait(SOON)
    job.submit(lambda request: pytest.fail("a cancelled request was run"))
    job.cancel()
    assert job.wait(SOON)
    assert errors == []


def test_cancelled_is_no_error(job, errors):
    def work(request):
        raise Cancelled

    job.submit(work)
    assert job.wait(SOON)
    assert errors == []


def test_an_error_is_told_and_the_next_request_runs(job, errors):
    done = []
    job.submit(lambda request: 1 / 0)
    assert job.wait(SOON)
    job.submit(lambda request: done.append(1))
    assert job.wait(SOON)
    assert [type(error) for error in errors] == [ZeroDivisionError]
    assert done == [1]


def test_an_error_of_a_stale_request_is_not_told(job, errors):
    started = threading.Event()

    def work(request):
        started.set()
        while not request.cancelled():
            time.sleep(0.001)
        raise RuntimeError("too late")

    job.submit(work)
    assert started.wait(SOON)
    job.submit(lambda request: None)
    assert job.wait(SOON)
    assert errors == []


def test_an_error_in_telling_an_error_does_not_end_the_job(monkeypatch):
    told, done = threading.Event(), []
    monkeypatch.setattr(threading, "excepthook", lambda _: told.set())

    def on_error(error):
        raise error

    job = Job(on_error)
    job.submit(lambda request: 1 / 0)
    assert told.wait(SOON)
    assert job.wait(SOON)
    job.submit(lambda request: done.append(1))
    assert job.wait(SOON)
    assert done == [1]


def test_the_next_request_runs_when_no_thread_could_be_had(job, monkeypatch):
    done = []
    with monkeypatch.context() as short:
        short.setattr(
            threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("no thread"))
        )
        with pytest.raises(RuntimeError, match="no thread"):
            job.submit(lambda request: done.append(1))
    job.submit(lambda request: done.append(2))
    assert job.wait(SOON)
    assert done == [2]


def test_an_update_may_ask_for_the_next_request(job):
    done = []
    job.submit(lambda request: request.show(lambda: job.submit(lambda request: done.append(1))))
    assert job.wait(SOON)
    assert done == [1]


def test_nothing_is_shown_once_cancel_has_returned(job):
    for _ in range(200):
        shown = []
        job.submit(lambda request, shown=shown: [request.show(lambda: shown.append(1)) for _ in range(50)])
        job.cancel()
        before = len(shown)
        assert job.wait(SOON)
        assert len(shown) == before


def test_many_threads_may_ask_at_once(job, errors):
    running, most, done = [], [], []

    def work(request):
        running.append(1)
        most.append(len(running))
        time.sleep(random.Random(len(most)).random() / 500)
        running.pop()
        request.show(lambda: done.append(1))

    def ask():
        for number in range(50):
            job.cancel() if number % 7 == 0 else job.submit(work)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert job.wait(SOON)
    # On a busy machine every request may have been cancelled before it began; this one is not.
    job.submit(work)
    assert job.wait(SOON)
    assert errors == []
    assert max(most) == 1, "two requests ran at the same time"
    assert done


def test_without_a_background_the_work_is_done_when_submit_returns():
    errors, threads = [], []
    job = Job(errors.append, background=False)

    def work(request):
        threads.append(threading.current_thread())
        if len(threads) < 3:
            job.submit(work)

    job.submit(work)
    assert threads == [threading.current_thread()] * 3
    assert job.wait(0)
    job.submit(lambda request: 1 / 0)
    assert [type(error) for error in errors] == [ZeroDivisionError]


def test_two_jobs_may_share_one_lock(errors):
    first = Job(errors.append)
    second = Job(errors.append, lock=first.lock)
    shown, held, go = [], threading.Event(), threading.Event()

    def show_first():
        held.set()
        assert go.wait(SOON)
        shown.append("first")

    def show_second(request):
        assert held.wait(SOON)
        request.show(lambda: shown.append("second"))

    second.submit(show_second)
    first.submit(lambda request: request.show(show_first))
    assert held.wait(SOON)
    assert not second.wait(0.05), "an update ran beside that of the other job"
    go.set()
    assert first.wait(SOON)
    assert second.wait(SOON)
    assert shown == ["first", "second"]
    assert errors == []


def test_the_rest_takes_as_long_as_what_is_done():
    now = [0.0]
    pace = Pace(clock=lambda: now[0])
    now[0] = 0.9
    assert pace.left(4, 10) is None, "too early to tell"
    now[0] = 6.0
    assert pace.passed() == 6.0
    assert pace.left(0, 10) is None
    assert pace.left(4, 10) == pytest.approx(9.0)
    assert pace.left(10, 10) == 0
    assert pace.left(0.5, 1) == pytest.approx(6.0)
