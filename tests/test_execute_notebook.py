"""Executing a notebook: its outputs, its errors, its silence, and Ctrl-C."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import perpkit as pk
from perpkit.interactive.notebooks import WIDGET, execute_notebook, readable

SOON = 60


def notebook_of(*sources):
    return new_notebook(cells=[new_markdown_cell("# A"), *map(new_code_cell, sources)])


def execute(notebook, folder: Path) -> list:
    execute_notebook(notebook, folder, pk.Store(folder / "rows.sqlite"))
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


# --- what is left for a reader --------------------------------------------------------------------


def bar(text: str):
    return new_output("stream", name="stderr", text=text)


@pytest.mark.parametrize(
    ("output", "kept"),
    [
        (bar("\r  0%|   | 0/2\r 50%|#  | 1/2\r100%|###| 2/2\n"), None),
        (bar("\r 50%|#  | 1/2\na warning\n100%|###| 2/2\n"), "a warning"),
        (bar("100 % of it | is lost"), "100 % of it | is lost"),
        (new_output("stream", name="stdout", text=" 50%|#  | 1/2"), "50%|#  | 1/2"),
    ],
)
def test_bars_are_left_out_and_other_messages_kept(output, kept):
    notebook = notebook_of("work()")
    notebook.cells[1].outputs = [output]
    readable(notebook)
    assert [output.text.strip() for output in notebook.cells[1].outputs] == ([] if kept is None else [kept])


def test_of_a_widget_the_words_are_kept():
    view = {WIDGET: {"model_id": "1"}, "text/plain": "an explorer"}
    notebook = notebook_of("explorer")
    notebook.metadata["widgets"] = {"state": {}}
    notebook.cells[1].outputs = [
        new_output("display_data", data=dict(view)),
        new_output("execute_result", data=dict(view), execution_count=1),
    ]
    readable(notebook)
    assert [output.data for output in notebook.cells[1].outputs] == [{"text/plain": "an explorer"}]
    assert "widgets" not in notebook.metadata


# --- execution ------------------------------------------------------------------------------------


def test_the_kernel_starts_in_the_folder_keeps_rows_in_the_store_and_adds_no_words(tmp_path, capfd):
    notebook = notebook_of(
        "import os, sys\nprint(os.getcwd())\nprint(os.environ['PERPKIT_STORE'])",
        "print('  50%|#  | 1/2\\ra warning', file=sys.stderr)",
        "6 * 7",
    )
    first, second, third = execute(notebook, tmp_path)
    assert first[0].text.splitlines() == [str(tmp_path), str(tmp_path / "rows.sqlite")]
    assert [(output.name, output.text) for output in second] == [("stderr", "a warning\n")]
    assert third[0].data == {"text/plain": "42"}
    assert capfd.readouterr() == ("", "")


def test_a_cell_that_fails_is_told_with_its_error(tmp_path):
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        execute(notebook_of("1 / 0"), tmp_path)


def test_a_kernel_that_dies_is_told_with_its_last_words(tmp_path):
    # Past the kernel's own streams, as a library written in C dies.
    dies = "import os, sys\nos.write(sys.__stderr__.fileno(), b'out of luck')\nos._exit(1)"
    with pytest.raises(ValueError, match="DeadKernelError") as error:
        execute(notebook_of(dies), tmp_path)
    assert str(error.value).endswith("out of luck")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_ends_the_kernel(tmp_path):
    number = tmp_path / "number"
    cell = f"import os, time\nopen({str(number)!r}, 'w').write(str(os.getpid()) + '!')\ntime.sleep(10_000)"

    def press():
        deadline = time.monotonic() + SOON
        while time.monotonic() < deadline and not (number.is_file() and number.read_text().endswith("!")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=press)
    pressing.start()
    with pytest.raises(KeyboardInterrupt):
        execute(notebook_of(cell), tmp_path)
    pressing.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text().rstrip("!")), 0)
