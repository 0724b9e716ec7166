"""One background job at a time, cancellable, the latest request wins; and how long its rest takes."""

import atexit
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial

from ..experiments.shared import Cancelled


class Request:
    """One piece of work as it sees itself: whether to stop, and the right to show something.

    `stop` is set and `show` runs under the same lock, so nothing is shown after a cancel or a newer request.
    """

    def __init__(self, lock: "threading.RLock"):
        self._lock = lock
        self._stop = threading.Event()

    def cancelled(self) -> bool:
        """Whether a newer request or a cancel has made this one useless."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Make this request useless."""
        with self._lock:
            self._stop.set()

    def show(self, update: Callable[[], None]) -> None:
        """Run the update, unless this request has become useless; it cannot become so meanwhile."""
        with self._lock:
            if not self._stop.is_set():
                update()


Work = Callable[[Request], None]

_JOBS: "weakref.WeakSet[Job]" = weakref.WeakSet()
# Work asks whether to stop before every step; one that never does must not keep a program from its end.
SECONDS_TO_STOP = 10.0


def _stop_all() -> None:
    """Stop what runs: torch aborts a process that ends in the middle of its work."""
    end, jobs = time.monotonic() + SECONDS_TO_STOP, list(_JOBS)
    for job in jobs:
        # Whoever holds the lock for ever must not keep the program either.
        if job.lock.acquire(timeout=max(0.0, end - time.monotonic())):
            job.cancel()
            job.lock.release()
    for job in jobs:
        job.wait(max(0.0, end - time.monotonic()))


atexit.register(_stop_all)


class Job:
    """Runs requests in a thread: a new one stops the running one and replaces any that waits.

    `work(request)` asks `request.cancelled()` often and may raise Cancelled; what others can see it changes
    only through `request.show(update)`. Any other exception goes to `on_error`, unless nobody waits for this
    request any more. `lock` is held by every update; hold it too to change what they change, and give it to
    every job that changes the same. Without `background` the work is done in the thread that submits it,
    before `submit` returns.

    >>> done = []
    >>> job = Job(on_error=print)
    >>> job.submit(lambda request: request.show(lambda: done.append(1)))
    >>> job.wait(), done
    (True, [1])
    """

    def __init__(
        self,
        on_error: Callable[[Exception], None],
        *,
        background: bool = True,
        lock: "threading.RLock | None" = None,
    ):
        # Reentrant: an update may submit the next request.
        self.lock = threading.RLock() if lock is None else lock
        self._on_error = on_error
        self._background = background
        self._running = Request(self.lock)
        self._waiting: Work | None = None
        self._idle = threading.Event()
        self._idle.set()
        _JOBS.add(self)

    def submit(self, work: Work) -> None:
        """Run the work as soon as the running one has stopped; returns at once, in the background."""
        with self.lock:
            self._running.stop()
            self._waiting = work
            if self._idle.is_set():
                self._idle.clear()
                if self._background:
                    try:
                        threading.Thread(target=self._run, name="perpkit-job", daemon=True).start()
                    except BaseException:
                        # No thread could be had: the next request tries again.
                        self._idle.set()
                        raise
                    return
            else:
                return
        self._run()

    def cancel(self) -> None:
        """Stop the running work and forget the waiting one; returns at once."""
        with self.lock:
            self._running.stop()
            self._waiting = None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs or waits; False when the time, in seconds, is over first."""
        return self._idle.wait(timeout)

    def _run(self) -> None:
        try:
            while work := self._next():
                self._do(work)
        except BaseException:
            # An error in on_error itself ends this thread; the next request starts another.
            self._idle.set()
            raise

    def _next(self) -> Work | None:
        with self.lock:
            work, self._waiting = self._waiting, None
            self._running = Request(self.lock)
            if work is None:
                self._idle.set()
            return work

    def _do(self, work: Work) -> None:
        request = self._running
        try:
            work(request)
        except Cancelled:
            pass
        except Exception as error:
            request.show(partial(self._on_error, error))


class Pace:
    """How long the rest of some work takes, judged by what is done of it since the clock was started.

    >>> pace = Pace(clock=iter([100.0, 104.0]).__next__)
    >>> pace.left(2, 10)
    16.0
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._started = clock()

    def passed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    def left(self, done: float, total: float) -> float | None:
        """Seconds that the rest takes; None while nothing is done, and in the first second: too early."""
        passed = self.passed()
        return passed / done * (total - done) if done > 0 and passed >= 1 else None
