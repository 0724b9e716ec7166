"""The command line. Heavy libraries are imported where a command needs them: `--help` answers at once."""

import typer

from . import bench, demo, doctor, figures, results, sweep
from .axes import AxesCommand
from .exits import EPILOG

main = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, epilog=EPILOG)


@main.callback()
def _perpkit() -> None:
    """See what pruning does to a neural network, and get its quality back cheaply."""


main.command(epilog=EPILOG)(demo.demo)
main.command(epilog=EPILOG, cls=AxesCommand)(sweep.sweep)
main.command(epilog=EPILOG)(figures.figures)
main.command(epilog=EPILOG)(results.results)
main.command(epilog=EPILOG)(doctor.doctor)
main.command(epilog=EPILOG)(bench.bench)
