"""What explorers say, in HTML: how far some work is, and what went wrong."""

import html
import traceback

SPINNER = '<i class="fa fa-spinner fa-spin" title="working"></i>'


def bar(done: float, total: float, seconds: float | None = None) -> str:
    """A progress bar in HTML, with the time that is left where it is known.

    >>> bar(3, 10, 100)
    '<progress value="3" max="10"></progress> about 1.7 min left'
    """
    drawn = f'<progress value="{done:g}" max="{total:g}"></progress>'
    return drawn if seconds is None else f"{drawn} about {spoken(seconds)} left"


def spoken(seconds: float) -> str:
    """A time in the unit that people would use.

    >>> spoken(0.2), spoken(59.7), spoken(5400)
    ('1 s', '1.0 min', '1.5 h')
    """
    if (whole := max(1, round(seconds))) < 60:
        return f"{whole} s"
    minutes = round(seconds / 60, 1)
    return f"{minutes:.1f} min" if minutes < 60 else f"{seconds / 3600:.1f} h"


def in_red(words: str) -> str:
    """What went wrong in one line: the kind, a colon, and what it says.

    >>> in_red("ValueError: <b> is no prompt")[-48:]
    '<b>ValueError</b>: &lt;b&gt; is no prompt</span>'
    """
    kind, _, what = words.partition(": ")
    said = f"<b>{html.escape(kind)}</b>: {html.escape(what)}"
    return f'<span style="color: var(--jp-error-color1, #b00020)">{said}</span>'


def trace_of(error: Exception) -> str:
    """Where an exception comes from, in HTML, folded away."""
    trace = html.escape("".join(traceback.format_exception(error)))
    return f"<details><summary>traceback</summary><pre>{trace}</pre></details>"
