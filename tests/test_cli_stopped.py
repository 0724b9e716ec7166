"""The demonstration as somebody meets it who presses Ctrl-C, kills it, or starts it again."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")]

SOON = 120
MESSAGE = "Stopped. The finished rows are kept: the same command goes on from there."
DRIVER = """
import sys
import perpkit as pk
from perpkit import cli, demo


def grid():
    return pk.Grid(
        retrain=["none", "biases+norms", "full"], sparsity=[0.5, 0.7], steps=int(sys.argv[2]),
        length=16, batch=4, seed=range(2),
    )


if __name__ == "__main__":
    demo.demo_grid = grid
    if sys.argv[3] == "alone":
        demo._execute_notebook = lambda out, store: None
    cli.demo.cores = lambda: {0, 1}
    cli.main(["demo", "--out", sys.argv[1]])
"""


class Demo:
    """A demonstration of ten rows in a process group of its own, as a terminal has it."""

    def __init__(self, folder: Path, steps: int, notebook: str = "alone"):
        self.out = folder / "out"
        self.said = folder / "said"
        driver = folder / "driver.py"
        driver.write_text(DRIVER)
        command = [sys.executable, str(driver), str(self.out), str(steps), notebook]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                command, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )

    def rows(self) -> dict[str, str]:
        file = self.out / "results.sqlite"
        # Until its first table is made the file is empty, or locked.
        if not file.is_file() or file.stat().st_size == 0:
            return {}
        with closing(sqlite3.connect(file, timeout=30)) as connection:
            try:
                return dict(connection.execute("SELECT key, row FROM rows"))
            except sqlite3.OperationalError:
                return {}

    def wait_until(self, moment) -> None:
        deadline = time.monotonic() + SOON
        while not moment():
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < deadline, self.said.read_text()
            time.sleep(0.02)

    def press_ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> tuple[int, str]:
        code = self.process.wait(SOON)
        return code, self.said.read_text()

    def has_processes(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True


@pytest.fixture
def start(tmp_path):
    started = []

    def start(*arguments) -> Demo:
        started.append(Demo(tmp_path, *arguments))
        return started[-1]

    yield start
    for demo in started:
        if demo.has_processes():
            os.killpg(demo.process.pid, signal.SIGKILL)
        demo.process.wait(SOON)


@pytest.mark.parametrize("begun", [False, True], ids=["while the workers start", "while rows are in work"])
def test_ctrl_c_twice_ends_with_one_message_and_no_process_left(start, begun):
    demo = start(1_000_000)  # steps: the rows in work never finish

    # A row without retraining comes first; those that share its pruned model follow.
    demo.wait_until((lambda: len(demo.rows()) == 1) if begun else (demo.out / "results.sqlite").is_file)
    demo.press_ctrl_c()
    time.sleep(0.3)
    if demo.has_processes():
        demo.press_ctrl_c()
    code, said = demo.end()
    assert code == 130
    assert said.rstrip().splitlines()[-1] == MESSAGE
    assert "Traceback" not in said, said
    assert len(demo.rows()) == 1 * begun
    demo_gone(demo)
    assert [file.name for file in demo.out.glob("*stop*")] == []


def demo_gone(demo: Demo) -> None:
    deadline = time.monotonic() + SOON
    while demo.has_processes():
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.05)


def test_the_next_demonstration_goes_on_where_one_was_stopped(start):
    demo = start(60)
    demo.wait_until(lambda: len(demo.rows()) >= 2)
    demo.press_ctrl_c()
    assert demo.end()[0] == 130
    kept = demo.rows()
    assert 2 <= len(kept) < 10
    code, said = start(60).end()
    assert code == 0, said
    assert "At 50 % sparsity" in said
    assert f"{len(kept)}/10" in said
    rows = demo.rows()
    assert len(rows) == 10
    # The seconds in a row would differ if it had been computed again.
    assert {key: rows[key] for key in kept} == kept


def test_ctrl_c_while_the_notebook_is_executed(start):
    demo = start(1, "notebook")
    demo.wait_until(lambda: "Executing the first notebook" in demo.said.read_text())
    time.sleep(1)
    demo.press_ctrl_c()
    code, said = demo.end()
    assert code == 130
    assert said.rstrip().splitlines()[-1] == MESSAGE
    assert "Traceback" not in said
    assert (demo.out / "perplexity_by_sparsity.png").is_file()


def test_the_workers_of_a_killed_demonstration_end_too(start):
    demo = start(1_000_000)
    demo.wait_until(lambda: len(demo.rows()) == 1)
    demo.process.kill()
    demo.process.wait(SOON)
    demo_gone(demo)
