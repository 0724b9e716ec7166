"""What all explorers are: controls over one background job, news, errors in words, a picture, its export."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from ..job import Job, Request, Work
from ..plots.figure import ENDINGS, DataFigure
from .exporting import written
from .lifetime import close_parts, replace_predecessors
from .offers import offered
from .words import SPINNER, in_red, trace_of

SECONDS_BETWEEN_NEWS = 0.2


def guarded(callback):
    """Show in the widget what goes wrong in a callback: raised into the front end, nobody would see it."""

    @functools.wraps(callback)
    def call(self, *arguments):
        try:
            callback(self, *arguments)
        except Exception as error:
            self._refused(error)

    return call


class Explorer(widgets.VBox):
    """A row of controls, a message, a picture and its export, above one cancellable background job.

    A subclass gives its `controls` by name, and asks for work with `_ask` in `_on_change`, whenever one of
    them has changed, unless it is `_held`. Messages are HTML: what comes from people or files is escaped by
    whoever says it. What went wrong is shown in words, with the traceback folded away; `error` holds the last
    exception, and the controls stay usable. Exports are written into `export_folder` and nowhere else;
    programs write `figure()` with `pk.save_figure`. With `background=False`, for programs and headless runs,
    the same work is done before the control's change returns. `close()` ends the work; so does running the
    notebook's cell again, for what the cell has made before.

    Raises ValueError for an `export_folder` that is no folder.
    """

    # Of exported files.
    name = "explorer"
    children: Sequence[widgets.Widget]
    # Whoever has more than one adds it.
    _jobs: Sequence[Job] = ()

    def __init__(
        self,
        controls: Mapping[str, Any],
        *,
        export_folder: str | Path = "exports",
        background: bool = True,
    ):
        if not isinstance(export_folder, str | Path) or Path(export_folder).is_file():
            raise ValueError(f"the export folder {export_folder!r} is no folder")
        # Its lock guards what the work has made, and the widgets.
        self._job = Job(self._work_failed, background=background)
        self._jobs = [self._job]
        self._figure: DataFigure | None = None
        self._folder = Path(export_folder)
        self.error: Exception | None = None
        # Of the work that was last asked for: whether it has yet to show a first picture, and why it failed.
        self._outstanding = False
        self._failure: Exception | None = None
        self._controls = dict(controls)
        self._held = False
        narrow = widgets.Layout(width="104px")
        self.cancel = widgets.Button(description="Cancel", icon="stop", layout=narrow, disabled=True)
        self.again = widgets.Button(description="Try again", icon="refresh", layout=narrow, disabled=True)
        self.message, self.details, self.exported = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.picture = widgets.Image(
            format="png",
            layout=widgets.Layout(width="720px", max_width="100%", align_self="flex-start", display="none"),
        )
        self.exports = {
            ending: widgets.Button(
                description=ending[1:].upper(),
                icon="download",
                tooltip=f"write the picture to {self._folder / self.name}{ending}",
                layout=widgets.Layout(width="80px"),
                disabled=True,
            )
            for ending in ENDINGS
        }
        for ending, button in self.exports.items():
            button.on_click(functools.partial(self._on_export, ending))
            button.add_class(f"perpkit-export-{ending[1:]}")
        for name in ("cancel", "again", "message", "details", "picture", "exported"):
            getattr(self, name).add_class(f"perpkit-{name}")
        for name, part in self._controls.items():
            part.add_class(f"perpkit-{name}")
        self.cancel.on_click(self._on_cancel)
        self.again.on_click(self._on_again)
        self._work: tuple[str, Work] | None = None
        wrapped = widgets.Layout(flex_flow="row wrap")
        super().__init__(
            [
                widgets.HBox([*controls.values(), self.cancel, self.again], layout=wrapped),
                self.message,
                self.details,
                self.picture,
                widgets.HBox([*self.exports.values(), self.exported], layout=wrapped),
            ]
        )
        replace_predecessors(self)

    def __repr__(self) -> str:
        # What is left of the widget in a notebook that is read without a kernel.
        return f"{type(self).__name__}: moves in a running notebook; its figure() is a picture"

    def close(self) -> None:
        """End the work, and take the explorer with all its parts out of the page."""
        # Also called for what was never wholly made, when it is forgotten.
        for job in self._jobs:
            job.cancel()
        close_parts(self)
        super().close()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything asked for is shown; False when the time, in seconds, is over first."""
        return self._job.wait(timeout)

    def figure(self) -> DataFigure:
        """The picture as a figure, once everything asked for is computed.

        Of what was cancelled it is the picture so far.

        Raises ValueError when what was asked for last has failed, or was stopped before its first picture.
        """
        while True:
            self.wait()
            with self._job.lock:
                # Another thread may have asked for more meanwhile.
                if not all(job.wait(0) for job in self._jobs):
                    continue
                figure = self._current()
                # Else the picture of what was asked for before would be taken for this one's.
                if figure is None or self._outstanding or self._failure is not None:
                    raise self._missing()
                return figure

    # --- for subclasses ----------------------------------------------------------------------------

    def _put(self, **given: Any) -> None:
        """Put the controls where they are told, those that are, and ask once for what they then say.

        Raises ValueError, and leaves all as they were, for what one of them does not offer.
        """
        self._set(self._offered(**given))

    def _set(self, chosen: Mapping[str, Any]) -> None:
        """The same for values that are offered."""
        with self._job.lock:
            self._held = True
            try:
                for name, value in chosen.items():
                    self._controls[name].value = value
            finally:
                self._held = False
        self._on_change()

    def _offered(self, **given: Any) -> dict[str, Any]:
        """The controls' values for what is given; without those that are None."""
        told = {name: value for name, value in given.items() if value is not None}
        return {name: offered(self._controls[name], name, value) for name, value in told.items()}

    def _on_change(self, _=None) -> None:
        """Ask for what the controls say; each subclass has its own."""
        raise NotImplementedError

    def _missing(self) -> ValueError:
        """Why there is no figure."""
        if self._failure is None:
            return ValueError("what was asked for last was stopped before its first picture")
        error = ValueError(f"this has failed: {self._words(self._failure)}")
        error.__cause__ = self._failure
        return error

    def _ask(self, text: str, work: Work) -> None:
        """Start the work, or put it in the place of what runs, saying the text meanwhile."""
        with self._job.lock:
            self._begin(text, work)
            self._say(f"{text} {SPINNER}", busy=True)
            try:
                self._job.submit(work)
            except Exception as error:
                self._failure = error
                raise

    def _begin(self, text: str, work: Work) -> None:
        """Remember what is asked for."""
        self._work, self._outstanding, self._failure = (text, work), True, None

    def _publish(
        self, request: Request, text: str, *, busy: bool = False, figure: DataFigure | None = None
    ) -> None:
        """Say and show what the request has come to, unless nobody waits for it any more."""
        # Drawn before the lock is taken: a slider must not wait for it.
        png = None if figure is None else figure.png()

        def update() -> None:
            if figure is not None and png is not None:
                self._show(figure, png)
            self._say(text, busy=busy)

        request.show(update)

    def _watch(self, request: Request, news: Callable[[int], str]) -> Callable[[], bool]:
        """A `cancelled` for calls that ask it before every step; it shows `news(step)` now and then."""
        step, told = 0, time.monotonic()

        def cancelled() -> bool:
            nonlocal step, told
            step += 1
            if time.monotonic() - told > SECONDS_BETWEEN_NEWS:
                told = time.monotonic()
                self._publish(request, news(step), busy=True)
            return request.cancelled()

        return cancelled

    def _current(self) -> DataFigure | None:
        """The figure of what is shown, for exports; None before there is one.

        An explorer that draws its picture another way draws the figure here, when somebody asks for it.
        """
        return self._figure

    def _show(self, figure: DataFigure | None, png: bytes) -> None:
        self._figure, self._outstanding = figure, False
        self.picture.value = png
        # Hidden until there is one: without a file a browser shows a torn picture.
        self.picture.layout.display = "block"
        self.exported.value = ""
        for button in self.exports.values():
            button.disabled = False

    def _say(self, text: str, *, busy: bool = False, again: bool = False) -> None:
        self.message.value, self.details.value = text, ""
        self.cancel.disabled = not busy
        self.again.disabled = not again

    def _words(self, error: Exception) -> str:
        """An exception in one line, the kind, a colon, and what it says."""
        return f"{type(error).__name__}: {error}"

    # --- callbacks ---------------------------------------------------------------------------------

    def _work_failed(self, error: Exception) -> None:
        with self._job.lock:
            self._failure = error
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        with self._job.lock:
            self.error = error
            self._say(in_red(self._words(error)), again=True)
            self.details.value = trace_of(error)

    def _refused(self, error: Exception) -> None:
        """Say what went wrong in a callback; work that runs goes on, and its news leave the words alone."""
        with self._job.lock:
            if all(job.wait(0) for job in self._jobs):
                self._failed(error)
            else:
                self.error = error
                self.exported.value = in_red(self._words(error))

    @guarded
    def _on_cancel(self, _) -> None:
        with self._job.lock:
            # Enabled means that something runs: a click that comes too late must not hide its result.
            if not self.cancel.disabled:
                self._job.cancel()
                self._say("cancelled; what was finished before is kept", again=True)

    @guarded
    def _on_again(self, _) -> None:
        if self._work is not None:
            self._ask(*self._work)

    def _on_export(self, ending: str, _) -> None:
        try:
            with self._job.lock:
                figure = self._current()
            said = "" if figure is None else written(figure, self._folder / self.name, ending)
        except Exception as error:
            # Said beside the buttons: the picture, and what is said of it, are still right.
            self.error, said = error, in_red(self._words(error))
        with self._job.lock:
            self.exported.value = said
