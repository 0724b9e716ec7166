"""The report of `perpkit figures`: one HTML page with everything inside."""

import base64
import html
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..experiments.paper.recipe import Recipe
    from ..experiments.paper.reproduce import Reproduced
    from ..experiments.paper.scales import Scale
    from ..interactive.paper import PaperFigure

PERCENT = ("accuracy", "trainable_share")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem;
  margin: 0 auto; padding: 1.5rem; }
h1, h2 { line-height: 1.25; } h2 { margin-top: 3rem; border-top: 1px solid #ddd; padding-top: 1.2rem; }
figure { margin: 1rem 0; } figure img { width: 100%; max-width: 46rem; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .75rem .2rem 0; text-align: right; white-space: nowrap; }
th { border-bottom: 1px solid #999; font-weight: 600; vertical-align: bottom; white-space: normal; }
td.key, th.key { text-align: left; } tr:nth-child(even) td { background: #f6f6f6; }
.note { border-left: 4px solid #0072B2; padding: .1rem 1rem; background: #f2f7fb; }
.bad { border-left-color: #D55E00; background: #fdf3ec; }
.small { color: #555; font-size: .88rem; } li { margin: .15rem 0; }
"""


def report(
    drawn: Sequence["PaperFigure"],
    left_out: Sequence["Recipe"],
    scale: "Scale",
    files: Mapping[str, Sequence[Path]],
) -> str:
    """The page: for each figure the picture, what it shows, protocol, deviations, device and time."""
    parts = [_head(drawn, left_out, scale)]
    parts += [_section(each, files.get(each.reproduced.name, ())) for each in drawn]
    if left_out:
        parts.append(_left_out(left_out, scale))
    title = f"Figures of the papers, scale {html.escape(scale.name)}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _head(drawn: Sequence["PaperFigure"], left_out: Sequence["Recipe"], scale: "Scale") -> str:
    from importlib.metadata import version

    import torch
    import transformers

    versions = (
        f"{date.today()}, perpkit {version('perpkit')}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}"
    )
    words = (
        "The published numbers are those of the papers' models, beside this kit's of the same: values may be "
        "compared as far as the protocol under each figure is the papers', and within what its section says "
        "is done otherwise."
        if scale.of_the_papers
        else "But for what is counted on the papers' own networks, the published numbers are of other, much "
        "larger models, trained on other data: this is a comparison of shapes, not of values. So figures "
        "show every value by its model's dense one (or what the axis names); the tables have both."
    )
    links = "".join(
        f'<li><a href="#{html.escape(each.reproduced.name)}">{html.escape(_title(each))}</a> '
        f'<span class="small">{html.escape(each.reproduced.recipe.source)}</span></li>'
        for each in drawn
    )
    return (
        f'<p class="small">{versions}</p>\n<p class="note">{words}</p>\n'
        f"<p>{len(drawn)} tables and figures"
        + (f", {len(left_out)} left out" if left_out else "")
        + f".</p>\n<ul>{links}</ul>"
    )


def _title(drawn: "PaperFigure") -> str:
    found = drawn.reproduced
    several = len(found.recipe.pairs(found.scale)) > 1
    return f"{found.recipe.title}: {Path(found.ours).name}" if several else found.recipe.title


def _section(drawn: "PaperFigure", files: Sequence[Path]) -> str:
    found = drawn.reproduced
    recipe, name = found.recipe, html.escape(found.name)
    parts = [f'<h2 id="{name}">{html.escape(_title(drawn))}</h2>', _source(drawn)]
    if found.errors:
        listed = "".join(f"<li>{html.escape(error.strip().splitlines()[0])}</li>" for error in found.errors)
        parts.append(f'<div class="note bad"><p>Not everything could be computed:</p><ul>{listed}</ul></div>')
    if drawn.figure is not None:
        picture = base64.b64encode(drawn.figure.png(dpi=150)).decode()
        links = ", ".join(
            f'<a href="{html.escape(file.name)}">{file.suffix[1:].upper()}</a>' for file in files
        )
        parts.append(
            f'<figure><img alt="{html.escape(recipe.title)}" src="data:image/png;base64,{picture}">'
            f'<figcaption class="small">{html.escape(_beside(drawn))} Files: {links}.</figcaption></figure>'
        )
    if len(found.table):
        parts.append(_table(drawn))
    if recipe.differs:
        listed = "".join(f"<li>{html.escape(words)}</li>" for words in recipe.differs)
        parts.append(f"<p>What is done otherwise than in the paper:</p><ul>{listed}</ul>")
    if len(found.rows):
        parts.append(_protocol(found))
    return "\n".join(parts)


def _protocol(found: "Reproduced") -> str:
    said = "; ".join(found.protocols) or "counted, not measured"
    budget = ""
    if {"steps", "batch", "accumulate"} <= set(found.rows) and (most := int(found.rows["steps"].max())):
        windows = int((found.rows["batch"] * found.rows["accumulate"]).max())
        budget = f" Retraining: {most} steps of {windows} windows."
    return (
        f'<p class="small">Protocol: {html.escape(said)}.{budget} Device: '
        f"{html.escape(', '.join(found.devices))}. Time: {_spoken(found.seconds)} of one worker, rows shared "
        "with other figures included.</p>"
    )


def _source(drawn: "PaperFigure") -> str:
    found = drawn.reproduced
    beside = f", beside {found.theirs}" if not found.published.empty and not found.same else ""
    said = f"{found.recipe.source}. Computed for {Path(found.ours).name}{beside}."
    return f'<p class="small">{html.escape(said)}</p><p>{html.escape(found.recipe.caption)}</p>'


def _beside(drawn: "PaperFigure") -> str:
    found = drawn.reproduced
    if found.published.empty:
        return found.recipe.unpublished
    shapes = "" if found.same else " A comparison of shapes, not of values."
    return f"Published numbers, of {found.theirs}: open markers.{shapes}"


def _table(drawn: "PaperFigure") -> str:
    """Ours, published, difference; points that only the paper has are counted below."""
    found = drawn.reproduced
    recipe, table = found.recipe, found.table
    ours = table[table["ours"].notna()]
    related = bool(recipe.base) and not found.same
    heads = [*recipe.keys, "here", "published"]
    # Of other models only what is related can be compared.
    heads += [f"here: {recipe.relative}", "published: likewise"] if related else []
    heads.append("difference")
    if found.published.empty:
        heads = [*recipe.keys, "here"]
    head = "".join(
        f'<th class="{"key" if i < len(recipe.keys) else ""}">{html.escape(_words(each))}</th>'
        for i, each in enumerate(heads)
    )
    rows = []
    for row in ours.to_dict("records"):
        cells = [f'<td class="key">{html.escape(_key(key, row[key]))}</td>' for key in recipe.keys]
        numbers = [_measured(recipe.value, row), _number(recipe.value, row["published"])]
        if related:
            both = row["ours_relative"], row["published_relative"]
            numbers += [*map(_plain, both), _plain(both[0] - both[1], sign="+")]
        else:
            numbers.append(_difference(recipe.value, row["difference"]))
        cells += [f"<td>{each}</td>" for each in numbers[: len(heads) - len(recipe.keys)]]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    more = int(table["ours"].isna().sum() - table[["ours", "published"]].isna().all(axis=1).sum())
    below = (
        f'<p class="small">{more} more published points have none of ours beside them.</p>' if more else ""
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table>{body}</table></div>{below}'


def _words(name: str) -> str:
    return {"retrain": "retrained"}.get(name, name.replace("_", " "))


def _key(name: str, value: object) -> str:
    if name == "sparsity" and isinstance(value, float):
        return f"{100 * value:g} %"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _measured(value: str, row: Mapping) -> str:
    number = _number(value, row["ours"])
    if row["seeds"] < 2:
        return number
    spread = _number(value, row["std"])
    return f"{number} ± {spread.removesuffix(' %')} ({row['seeds']})"


def _number(column: str, value: float) -> str:
    """A value as the papers print it.

    >>> _number("perplexity", 16.857), _number("accuracy", 0.4512), _number("tokens_per_second", 3512.4)
    ('16.86', '45.12 %', '3512')
    """
    if value != value:
        return "–"
    if column in PERCENT:
        return f"{100 * value:.3g} %" if column == "trainable_share" else f"{100 * value:.2f} %"
    if column == "tokens_per_second" or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.2f}"


def _difference(column: str, value: float) -> str:
    if value != value:
        return "–"
    if column in PERCENT:
        # No -0.00.
        return f"{round(100 * value, 2) + 0.0:+.2f} points"
    return f"{value:+.0f}" if column == "tokens_per_second" or abs(value) >= 1000 else f"{value:+.2f}"


def _plain(value: float, sign: str = "") -> str:
    return "–" if value != value else f"{value:{sign}.4g}"


def _left_out(recipes: Sequence["Recipe"], scale: "Scale") -> str:
    listed = "".join(f"<li>{html.escape(each.title)} ({html.escape(each.source)})</li>" for each in recipes)
    return (
        f"<h2>Left out</h2><p>The scale {html.escape(scale.name)} has no image classifier. With "
        "<code>--classifier</code> and <code>--images</code> these are computed too:</p>"
        f"<ul>{listed}</ul>"
    )


def _spoken(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
