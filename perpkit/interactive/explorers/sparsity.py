"""The sparsity explorer: perplexity and accuracy over sparsity, exploding and coming back."""

import contextlib
import functools
import html
import threading
from pathlib import Path

import ipywidgets as widgets
import pandas as pd

from ...experiments.experiment import Experiment
from ...experiments.grid import Grid
from ...experiments.store import Store
from ...experiments.sweep import NothingComputed, experiments_of, sweep
from ..job import Job, Pace, Request
from ..plots.figure import DataFigure
from ..published import published
from .choices import Choice, Choices
from .controls import Controls
from .explorer import Explorer, guarded
from .filling import Filling
from .offers import UNSTRUCTURED, check_sparsity
from .points import Pictures, draw, draw_curves, in_view, is_in_view, percent, result, rows_table
from .rows import Rows
from .words import SPINNER, bar, in_red, trace_of


class SparsityExplorer(Explorer):
    """Drag the sparsity, choose what is retrained, watch the perplexity explode and come back.

    The curves start with the grid's finished rows; a point that is missing is computed in the background
    when the slider comes to rest on it (with the grid's first seed), and kept in the store. "Compute all"
    computes all that the grid lacks, and the curves fill in meanwhile. Cancel takes effect within one
    training step. What went wrong is shown in words; `error` holds the last exception. A grid with several
    criteria and patterns has a control for each; with `tasks`, the accuracy stands beside the perplexity. For
    the models of the papers their published numbers can be drawn too.

    Raises ValueError when the grid mixes models, texts, lengths or ways to do one retraining, and when the
    store cannot be used.

    >>> import tempfile
    >>> explorer = SparsityExplorer(Grid(sparsity=[0.5]), store=Path(tempfile.mkdtemp()) / "results.sqlite")
    >>> explorer.show(0.7, "none")
    >>> explorer.wait(60), explorer.message.value[:16]
    (True, '70 %: perplexity')
    """

    name = "sparsity"

    def __init__(
        self,
        grid: Grid,
        *,
        store: Store | str | Path | None = None,
        export_folder: str | Path = "exports",
        background: bool = True,
    ):
        experiments = experiments_of(grid)
        if not experiments:
            raise ValueError("the grid is empty: there is nothing to explore")
        self._choices = Choices(experiments)
        self._measures = ["perplexity"] if experiments[0].tasks is None else ["perplexity", "accuracy"]
        self._store = store if isinstance(store, Store) else Store(store)
        found = self._store.get(experiment.key() for experiment in experiments)
        self._rows = Rows(found)
        self._busy = False
        # One thread draws at a time; what is drawn, the rows behind it, and its words.
        self._drawing = threading.Lock()
        self._drawn: tuple | None = None
        self._behind = pd.DataFrame()
        self._pictures = Pictures(self._measures)
        self._result = ""
        self._panel = Controls(self._choices)
        self.sparsity, self.retrain = self._panel.sparsity, self._panel.retrain
        self.criterion, self.pattern = self._panel.criterion, self._panel.pattern
        self.compare = self._panel.compare
        super().__init__(self._panel.all, export_folder=export_folder, background=background)
        filler = Job(self._filling_failed, background=background, lock=self._job.lock)
        self._jobs = [self._job, filler]
        self.filling = Filling(
            experiments,
            self._store,
            filler,
            self._rows,
            on_row=self._fill_in,
            on_click=self._on_fill,
            first=lambda each: is_in_view(each.asdict(), self._panel.choice()),
        )
        self.filling.observe(self._on_filling, names="running")
        self.table = widgets.HTML()
        self.rows = widgets.Accordion([self.table], titles=["no rows yet"], selected_index=None)
        self.rows.add_class("perpkit-rows")
        head, message, details, *rest = self.children
        self.children = [head, message, details, self.filling, *rest, self.rows]
        self._fill_in(Request(self._job.lock))
        for control in self._controls.values():
            control.observe(self._on_change, names="value")
        self._on_change()

    def show(
        self,
        sparsity: float | None = None,
        retrain: str | None = None,
        *,
        criterion: str | None = None,
        pattern: str | None = None,
    ) -> None:
        """Put the controls on a point, as a hand would, and ask for it, again if need be.

        What is not told stays as it is. `pattern` is "unstructured" or one such as "2:4", which says the
        sparsity itself.

        Raises ValueError for what the controls do not offer, and for a sparsity that is not the pattern's.
        """
        chosen = self._offered(retrain=retrain, criterion=criterion, pattern=pattern)
        fixed = chosen.get("pattern", self.pattern.value)
        if isinstance(sparsity, str):
            sparsity = self._offered(sparsity=sparsity)["sparsity"]
        check_sparsity(sparsity, fixed, self.pattern.options)
        # A pattern's own need not be on the slider.
        with contextlib.nullcontext() if fixed == UNSTRUCTURED else contextlib.suppress(ValueError):
            chosen |= self._offered(sparsity=sparsity)
        self._set(chosen)

    def compute_all(self) -> None:
        """Compute all rows that the grid lacks, as the button does."""
        self._on_fill()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything asked for is shown; False when the time, in seconds, is over first."""
        pace = Pace()
        if not self._job.wait(timeout):
            return False
        return self.filling.wait(None if timeout is None else max(0.0, timeout - pace.passed()))

    def figure(self) -> DataFigure:
        """The curves with the chosen point marked, where it is there, once everything asked for is computed.

        Raises ValueError when there is no finished row.
        """
        self.wait()
        with self._job.lock:
            table, choice = self._rows.table(), self._panel.choice()
        if in_view(table, choice).empty:
            raise self._missing()
        return self._draw(table, choice, self.compare.value)

    # --- the controls ------------------------------------------------------------------------------

    @guarded
    def _on_change(self, _=None) -> None:
        if self._held:
            return
        choice = self._panel.choice()
        self.sparsity.disabled = choice.nm is not None
        self.compare.layout.display = "none" if self._published(choice).empty else None
        self._ask(f"{self._head(choice)}: working", functools.partial(self._compute, choice=choice))

    @guarded
    def _on_fill(self, _=None) -> None:
        self.filling.start()

    @guarded
    def _on_filling(self, _) -> None:
        with self._job.lock:
            self.cancel.disabled = not (self._busy or self.filling.running)

    @guarded
    def _on_cancel(self, _) -> None:
        with self._job.lock:
            self.filling.stop()
            # A click that comes too late must not hide a result.
            if self._busy:
                self._job.cancel()
                self._say("cancelled; finished rows are kept", again=True)

    def _filling_failed(self, error: Exception) -> None:
        with self._job.lock:
            self.error = error
            self.filling.tell(after=f"; {in_red(self._words(error))}")
            self.details.value = trace_of(error)

    def _say(self, text: str, *, busy: bool = False, again: bool = False) -> None:
        super()._say(text, busy=busy or self.filling.running, again=again)
        self._busy = busy

    def _words(self, error: Exception) -> str:
        # Of a failed row the row's own error: the widget tries again by itself.
        return error.first if isinstance(error, NothingComputed) else super()._words(error)

    def _head(self, choice: Choice) -> str:
        criterion = f"{html.escape(choice.criterion)}, " if len(self._choices.criteria) > 1 else ""
        return criterion + (percent(choice.sparsity) if choice.nm is None else html.escape(choice.nm))

    # --- in the background -------------------------------------------------------------------------

    def _compute(self, request: Request, choice: Choice) -> None:
        """Compute what is missing of a point and show it; the pruned model before the retraining begins."""
        wanted = (self._choices.pruned(choice), self._choices.experiment(choice))
        missing = {key: each for each in wanted if (key := each.key()) not in self._rows}
        if missing and len(missing) < len({*wanted}):
            self._fill_in(request, busy=True)
        elif missing and self._drawn is not None and self._drawn[0].curves != choice.curves:
            # The other curves are there at once, whatever becomes of the point.
            self._fill_in(request)
        for key, experiment in missing.items():
            before = f"{self._head(choice)}: {result(self._rows.table(), choice)}"
            watch = self._watch(request, functools.partial(_news, before, experiment, Pace()))
            results = sweep(
                [experiment], store=self._store, retry_failed=True, progress=False, cancelled=watch
            )
            self._rows.keep(key, results.to_dict("records")[0])
            if key != [*missing][-1]:
                self._fill_in(request, busy=True)
        self._redraw(request, busy=False)

    def _fill_in(self, request: Request, *, busy: bool | None = None) -> None:
        """Show the rows that are there where the controls now stand."""
        # Without a finite number there is nothing to draw yet; in the end whoever has asked is told.
        with contextlib.suppress(ValueError):
            self._redraw(request, busy=busy)

    def _redraw(self, request: Request, *, busy: bool | None = None) -> None:
        """Draw what the controls and the rows say, and say the result; `busy` None leaves the message."""
        while not (request.cancelled() or self._drew(request, busy)):
            pass

    def _drew(self, request: Request, busy: bool | None) -> bool:
        """The same, unless controls or rows have changed meanwhile: False."""
        # Not held while it is shown: whoever observes that may ask for more.
        with self._drawing:
            with self._job.lock:
                state, table = self._state(), self._rows.table()
                rows = [row for row in self._rows.rows() if is_in_view(row, state[0])]
            new = None
            if rows and state != self._drawn:
                # Drawn without the job's lock: a slider must not wait for it.
                choice, compare, _ = state
                curves = functools.partial(self._draw, table, choice, compare, of=draw_curves)
                png = self._pictures.png((choice.curves, *state[1:]), curves, table, choice)
                new = png, rows_table(rows, self._rows.newest)
        done = False

        def update() -> None:
            nonlocal done
            if self._state() != state:
                return
            done = True
            if new is not None:
                self._drawn, self._behind = state, table
                self._show(None, new[0])
                self.table.value = new[1]
                self.filling.refresh()
                self.rows.titles = [f"rows behind the curves ({len(rows)})"]
            self._tell(table, state[0], busy)

        request.show(update)
        return done

    def _tell(self, table: pd.DataFrame, choice: Choice, busy: bool | None) -> None:
        text = f"{self._head(choice)}: {result(table, choice)}"
        if busy is not None:
            self._say(text, busy=busy)
        elif self._busy or self.message.value != self._result:
            return
        elif text != self._result:
            # Another seed at the same point.
            self._say(text)
        self._result = text

    def _draw(self, table: pd.DataFrame, choice: Choice, compare: bool, of=draw) -> DataFigure:
        numbers = self._published(choice) if compare else None
        return of(table, choice, self._choices.retrainings, self._measures, numbers)

    def _current(self) -> DataFigure | None:
        return None if self._drawn is None else self._draw(self._behind, *self._drawn[:2])

    def _published(self, choice: Choice) -> pd.DataFrame:
        return published(self._choices.pruned(choice), self._choices.retrainings)

    def _state(self) -> tuple[Choice, bool, int]:
        """What the picture depends on; rows are only ever added."""
        choice = self._panel.choice()
        return choice, self.compare.value, len(in_view(self._rows.table(), choice))


def _news(before: str, experiment: Experiment, pace: Pace, step: int) -> str:
    """What is being done, in words, when the sweep has asked for the step-th time whether to stop."""
    if experiment.retrain == "none":
        return f"{before}pruning {SPINNER}"
    if step > experiment.steps:
        return f"{before} → measuring {SPINNER}"
    done = bar(step, experiment.steps, pace.left(step, experiment.steps))
    return (
        f"{before} → retraining {html.escape(experiment.retrain)}, step {step} of {experiment.steps} {done}"
    )
