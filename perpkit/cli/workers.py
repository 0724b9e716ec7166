"""Worker processes that leave Ctrl-C to their parent, end with it, and have a GPU of their own."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, InvalidStateError, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import cycle, islice
from multiprocessing.queues import SimpleQueue


@contextmanager
def worker_processes(
    count: int, *, threads: int = 1, devices: Sequence[str] = ()
) -> Iterator[Executor | None]:
    """An executor of `count` processes of some `threads` each, or None for one: the rows run here.

    Several CUDA `devices`, as `cuda_devices` names them, are dealt out in turn.
    """
    if count < 2:
        yield None
        return
    # spawn: forking a process that runs threads, as torch does, can deadlock.
    context = multiprocessing.get_context("spawn")
    own: SimpleQueue[str] | None = None
    # Only where it is needed: its lock is a semaphore of the system's, which a hasty end leaves behind.
    if len(devices) > 1:
        own = context.SimpleQueue()
        for device in dealt_out(devices, count):
            own.put(device)
    executor = ProcessPoolExecutor(
        count, mp_context=context, initializer=_start_worker, initargs=(threads, own)
    )
    with _born_deaf_to_ctrl_c():
        for _ in range(count):
            executor.submit(os.getpid)
    try:
        yield executor
    except BaseException:
        threading.excepthook = _unless_already_cancelled
        # A worker that is loading torch does not listen yet, and shutdown() would wait for it.
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        executor.shutdown()


def cores() -> range | set[int]:
    """The cores that this process may use."""
    # macOS cannot say which.
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def cuda_devices() -> list[str]:
    """The CUDA devices of this process, as `CUDA_VISIBLE_DEVICES` calls them."""
    import torch

    return named_devices(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())


def named_devices(visible: str | None, count: int) -> list[str]:
    """The names of `count` devices: those that `CUDA_VISIBLE_DEVICES` lists, else their numbers.

    >>> named_devices(None, 2), named_devices("3, GPU-5a", 2)
    (['0', '1'], ['3', 'GPU-5a'])
    """
    names = visible.split(",") if visible else map(str, range(count))
    # CUDA ignores what follows a name that is no device.
    return [name.strip() for name in names][:count]


def dealt_out(devices: Sequence[str], workers: int) -> list[str]:
    """The device of each worker, in turn.

    >>> dealt_out(["0", "1"], 3)
    ['0', '1', '0']
    """
    return list(islice(cycle(devices), workers))


def _start_worker(threads: int, own: "SimpleQueue[str] | None") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    if own is not None:
        # CUDA reads it once, when it is first used.
        os.environ["CUDA_VISIBLE_DEVICES"] = own.get()
    import torch
    from tqdm import tqdm

    torch.set_num_threads(threads)
    # tqdm's own lock is a semaphore of the system's, which a worker that is stopped would leave behind.
    tqdm.set_lock(threading.RLock())


def _end_with_the_parent() -> None:
    # Killed, it cannot stop its workers, which would wait for work for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _born_deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started inside are spared Ctrl-C, which goes to all of a terminal: this one decides."""
    if not hasattr(signal, "pthread_sigmask"):
        # On Windows only once they run `_start_worker`.
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _unless_already_cancelled(failed: threading.ExceptHookArgs) -> None:
    """Report what went wrong in a thread, but not what the executor's own stumbles over.

    When its workers are ended, Python up to 3.12 gives the error to cancelled rows too, which refuse it.
    """
    if not isinstance(failed.exc_value, InvalidStateError):
        threading.__excepthook__(failed)
