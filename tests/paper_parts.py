"""What tests of the papers' figures share: a scale of seconds, and the command line."""

from typer.testing import CliRunner

from perpkit import cli
from perpkit.experiments.paper.scales import Scale, Vision

TINY = Scale(
    "tiny",
    sparsities=(0.5, 0.7),
    asked_sparsities=(0.7,),
    tasks="facts",
    seeds=(0, 1),
    steps=3,
    iterations=(1,),
    batch=2,
    unit_steps=1,
    vision=Vision(
        counts={"train": 64, "validation": 20, "test": 20}, batch=16, epoch=1, sparsities=(0.7, 0.9)
    ),
)


def figures(store, *arguments):
    out = store.parent / "out"
    common = ("figures", "--scale", "quick", "--store", store, "--out", out, "--workers", "1")
    return CliRunner().invoke(cli.main, list(map(str, [*common, *arguments])))
