"""One background job at a time, cancellable, the latest request wins."""

import threading
from collections.abc import Callable

from ..experiments.sweep import Cancelled

Work = Callable[[Callable[[], bool]], None]


class Job:
    """Runs requests in a thread: a new one cancels the running one and replaces any that waits.

    `work(cancelled)` is the request; it asks `cancelled()` often and may raise Cancelled. Any other
    exception goes to `on_error`, in the same thread.

    >>> done = []
    >>> job = Job(on_error=print)
    >>> job.submit(lambda cancelled: done.append(1))
    >>> job.wait(), done
    (True, [1])
    """

    def __init__(self, on_error: Callable[[Exception], None]):
        self._on_error = on_error
        self._lock = threading.Lock()
        self._pending: Work | None = None
        self._stop = threading.Event()
        self._idle = threading.Event()
        self._idle.set()

    def submit(self, work: Work) -> None:
        """Run the work as soon as the running one has stopped; returns at once."""
        with self._lock:
            self._stop.set()
            self._pending = work
            if self._idle.is_set():
                self._idle.clear()
                threading.Thread(target=self._run, daemon=True).start()

    def cancel(self) -> None:
        """Stop the running work and forget the waiting one; returns at once."""
        with self._lock:
            self._stop.set()
            self._pending = None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs or waits; False when the time is over first."""
        return self._idle.wait(timeout)

    def _run(self) -> None:
        while True:
            with self._lock:
                work, self._pending = self._pending, None
                if work is None:
                    self._idle.set()
                    return
                stop = self._stop = threading.Event()
            try:
                work(stop.is_set)
            except Cancelled:
                pass
            except Exception as error:
                self._on_error(error)
