"""Printing measured values against their bars."""

import sys
from dataclasses import dataclass, field


@dataclass
class Bars:
    """Collects lines of measured, reference, ratio and bar; `finish` exits 1 naming the bars missed."""

    missed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        print(f"{'what':58} {'measured':>10} {'reference':>10} {'ratio':>7}  bar")

    def at_most(self, what: str, measured: float, reference: float, ratio: float, unit: str = "") -> None:
        """The measured value may be at most `ratio` times the reference."""
        self._line(what, measured, reference, measured / reference <= ratio, f"<= {ratio:g}", unit)

    def at_least(self, what: str, measured: float, reference: float, ratio: float, unit: str = "") -> None:
        """The measured value must be at least `ratio` times the reference."""
        self._line(what, measured, reference, measured / reference >= ratio, f">= {ratio:g}", unit)

    def _line(self, what: str, measured: float, reference: float, met: bool, bar: str, unit: str) -> None:
        values = f"{measured:>8.3g} {unit:1} {reference:>8.3g} {unit:1} {measured / reference:>7.3g}"
        print(f"{what:58} {values}  {bar}{'' if met else '  MISSED'}", flush=True)
        if not met:
            self.missed.append(what)

    def finish(self) -> None:
        if self.missed:
            print("missed: " + "; ".join(self.missed))
            sys.exit(1)
        print("all bars met")
