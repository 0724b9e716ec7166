"""How far some work is, in HTML."""

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

    >>> spoken(0.2), spoken(59), spoken(5400)
    ('1 s', '59 s', '1.5 h')
    """
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
