"""The hub: quick answers when it cannot be reached, and the cache used without it."""

import contextlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from perpkit.sources.embedded import data_folder
from perpkit.sources.hub import hub_reachable, reading_dataset

# The imports are not counted: they take as long with a hub as without.
ASK = """
import json, sys, time
import datasets, transformers
import perpkit as pk
_, tokenizer = pk.load_model("tiny-opt", device="cpu")
answers = []
for call in (
    lambda: pk.load_text("wikitext2", tokenizer),
    lambda: pk.load_text("c4", tokenizer),
    lambda: pk.load_model("facebook/opt-125m", device="cpu"),
):
    switch, started = datasets.config.HF_HUB_OFFLINE, time.perf_counter()
    try:
        call()
    except ValueError as error:
        answers.append([time.perf_counter() - started, str(error)])
    assert datasets.config.HF_HUB_OFFLINE == switch
print(json.dumps(answers))
"""


def run(program, home, **variables):
    """The standard output of a program that knows only the hub it is told of."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**inherited, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def listening():
    """A port that takes connections and never answers; the list fills with them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = []

        def take():
            with contextlib.suppress(OSError):
                while True:
                    taken.append(server.accept()[0])

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", taken
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        for connection in taken:
            connection.close()


@contextlib.contextmanager
def answering(status):
    """A server that gives every question the same answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join(10)


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


# --- nothing to be had ------------------------------------------------------------------------------


def check(answers, why):
    assert len(answers) == 3
    for (seconds, words), what in zip(answers, ("'wikitext2'", "'c4'", "'facebook/opt-125m'"), strict=True):
        assert seconds < 5
        assert f"{what} is not in the local cache and the hub cannot be reached ({why})" in words
        for way_out in ("'tiny-opt'", "'storyworld'", "local folder", "hf download", "proxy", "HF_ENDPOINT"):
            assert way_out in words


@pytest.mark.slow
def test_a_refused_connection_is_told_within_five_seconds(tmp_path):
    endpoint = closed_port()
    answers = json.loads(run(ASK, tmp_path, HF_ENDPOINT=endpoint))
    check(answers, f"{endpoint} does not answer")


@pytest.mark.slow
def test_a_silent_hub_is_given_up_within_five_seconds(tmp_path):
    with listening() as (endpoint, taken):
        answers = json.loads(run(ASK, tmp_path, HF_ENDPOINT=endpoint))
        assert taken, "the hub was never asked"
    check(answers, f"{endpoint} does not answer")


@pytest.mark.slow
def test_a_hub_out_of_order_is_given_up_within_five_seconds(tmp_path):
    # the hub's own client would try such a hub again for half a minute
    with answering(503) as endpoint:
        answers = json.loads(run(ASK, tmp_path, HF_ENDPOINT=endpoint))
    check(answers, f"{endpoint} does not answer")


@pytest.mark.slow
def test_offline_by_choice_asks_nobody(tmp_path):
    with listening() as (endpoint, taken):
        answers = json.loads(run(ASK, tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1"))
        assert not taken
    check(answers, "HF_HUB_OFFLINE is set")
    assert max(seconds for seconds, _ in answers) < 3


# --- what is here already ---------------------------------------------------------------------------


@pytest.mark.slow
def test_embedded_and_local_things_ask_nobody(tmp_path):
    program = f"""
import perpkit as pk
for name in ("tiny-opt", "tiny-opt-outliers", {str(data_folder("models", "tiny-opt"))!r}):
    model, tokenizer = pk.load_model(name, device="cpu")
pk.load_text("storyworld", tokenizer, windows={{"train": 1, "calibration": 1, "test": 1}})
"""
    with listening() as (endpoint, taken):
        run(program, tmp_path, HF_ENDPOINT=endpoint)
        assert not taken


@pytest.mark.slow
def test_a_cached_model_loads_without_the_hub(tmp_path):
    cached = tmp_path / "hub" / "models--somebody--tiny"
    shutil.copytree(data_folder("models", "tiny-opt"), cached / "snapshots" / "0123abcd")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abcd")
    program = """
import perpkit as pk
model, tokenizer = pk.load_model("somebody/tiny", device="cpu")
print(sum(parameter.numel() for parameter in model.parameters()), len(tokenizer))
"""
    parameters = json.loads(data_folder("models", "tiny-opt", "recipe.json").read_text())["measured"][
        "parameters"
    ]
    assert run(program, tmp_path, HF_ENDPOINT=closed_port()).split() == [str(parameters), "1024"]
    assert run(program, tmp_path, HF_HUB_OFFLINE="1").split() == [str(parameters), "1024"]


# --- asking -----------------------------------------------------------------------------------------


@pytest.fixture
def constants(monkeypatch):
    """The hub's client, told that it may go online."""
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return constants


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (404, True), (500, False), (503, False)])
def test_any_answer_but_a_servers_failure_is_an_answer(constants, monkeypatch, status, reachable):
    with answering(status) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert hub_reachable() == reachable


def test_offline_by_choice_is_not_reachable(constants, monkeypatch):
    with answering(200) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not hub_reachable()


def test_a_closed_port_is_not_reachable(constants, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", closed_port())
    started = time.perf_counter()
    assert not hub_reachable()
    assert time.perf_counter() - started < 4


def test_threads_without_a_hub_leave_the_dataset_client_as_it_was():
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    entered, leave = threading.Event(), threading.Event()

    def read():
        with reading_dataset("a text", False):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=read)
    with reading_dataset("another", False):
        thread.start()
        assert entered.wait(10)
        assert datasets.config.HF_HUB_OFFLINE
    # The other thread is still inside.
    assert datasets.config.HF_HUB_OFFLINE
    leave.set()
    thread.join(10)
    assert before == datasets.config.HF_HUB_OFFLINE


def test_a_name_look_up_that_hangs_is_not_waited_for(constants, monkeypatch):
    released = threading.Event()

    class Session:
        def head(self, url, timeout):
            released.wait(60)

    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    started = time.perf_counter()
    assert not hub_reachable()
    assert 1 < time.perf_counter() - started < 4.5
    released.set()
