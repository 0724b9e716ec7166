"""The sign by which a sweep stops the rows in work."""

import atexit
import uuid
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path


class Stop:
    """Tells the rows in work to stop: by a file, which the workers of any executor can look for.

    >>> import tempfile
    >>> stop = Stop(Path(tempfile.mkdtemp()) / "results.sqlite")
    >>> before = stop()
    >>> stop.set()
    >>> before, stop()
    (False, True)
    """

    def __init__(self, store: Path):
        # Beside the store: the temporary folder is another one on another machine.
        self._file = store.absolute().with_name(f"{store.name}.stop-{uuid.uuid4().hex[:8]}")

    def __call__(self) -> bool:
        return self._file.exists()

    def set(self) -> None:
        """Tell them."""
        # On a full disk the rows in work are not told and finish.
        with suppress(OSError):
            self._file.touch()

    def clear_after(self, running: list[Future]) -> None:
        """Tidy up when the last of them has ended, which may be after the sweep."""

        def clear(_: Future | None = None) -> None:
            if all(future.done() for future in running):
                self._file.unlink(missing_ok=True)

        for future in running:
            future.add_done_callback(clear)
        clear()

    def clear_at_exit(self) -> None:
        """Tidy up when this process ends, where nobody can say when the rows do."""
        atexit.register(self._file.unlink, missing_ok=True)
