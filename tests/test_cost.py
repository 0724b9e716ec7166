"""What a run costs: seconds by phase, peak memory, and the device's name."""

import os
import platform
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from perpkit.evaluation import cost as measuring
from perpkit.evaluation.cost import Cost, device_name

MIB = 2**20
MARK = Path("/proc/self/clear_refs")


def peak_can_be_reset() -> bool:
    try:
        MARK.write_text("5")
    except OSError:
        return False
    return "VmHWM" in Path("/proc/self/status").read_text()


resettable = pytest.mark.skipif(
    not peak_can_be_reset(), reason="the system keeps the peak of the whole process"
)


def take(mebibytes: int) -> torch.Tensor:
    """Memory that is really used: every page is written."""
    return torch.ones(mebibytes * MIB // 4)


# --- seconds --------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests wind on."""

    class Clock:
        now = 100.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(measuring, "time", clock)
    return clock


def test_phases_are_measured_each_and_add_up(clock):
    with Cost("cpu") as cost:
        clock.now += 50  # in no phase
        for phase, seconds in (("prune", 1), ("retrain", 4), ("prune", 2.5)):
            with cost.phase(phase):
                clock.now += seconds
    assert cost.seconds == {"prune": 3.5, "retrain": 4}
    assert cost.tokens_per_second(1000) == 250


def test_a_phase_that_fails_is_measured_too(clock):
    cost = Cost("cpu")

    def work():
        with cost, cost.phase("prune"):
            clock.now += 3
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert cost.seconds == {"prune": 3}
    assert measuring._open == []


def test_without_retraining_there_is_no_speed(clock):
    with Cost("cpu") as cost, cost.phase("prune"):
        clock.now += 3
    assert cost.tokens_per_second(1000) is None


def test_the_clock_is_that_of_the_wall():
    with Cost("cpu") as cost, cost.phase("measure"):
        time.sleep(0.05)
    assert 0.05 <= cost.seconds["measure"] < 5


# --- memory ---------------------------------------------------------------------------------------


@resettable
def test_the_peak_is_that_of_the_block():
    before = resident()
    with Cost("cpu") as large:
        some = take(160)
        del some
    with Cost("cpu") as small:
        pass
    assert large.peak_memory >= before + 150 * MIB
    assert small.peak_memory <= large.peak_memory - 100 * MIB
    later = large.peak_memory
    some = take(200)
    assert large.peak_memory == later  # the block is over
    del some


@resettable
def test_a_block_inside_does_not_take_the_peak_of_the_outer_one():
    with Cost("cpu") as outer:
        some = take(160)
        del some
        with Cost("cpu") as inner:
            pass
        assert outer.peak_memory >= inner.peak_memory + 100 * MIB
        with Cost("cpu") as inner:
            some = take(240)
            del some
    assert outer.peak_memory == inner.peak_memory


@resettable
def test_a_block_in_another_thread_does_not_either():
    begun, go = threading.Event(), threading.Event()
    found = []

    def first():
        with Cost("cpu") as cost:
            some = take(160)
            del some
            begun.set()
            go.wait(60)
        found.append(cost.peak_memory)

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(60)
    with Cost("cpu") as second:
        go.set()
        thread.join()
    assert found[0] >= second.peak_memory + 100 * MIB


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_where_the_mark_is_not_to_be_had_it_is_the_peak_of_the_process(monkeypatch):
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    with Cost("cpu") as cost:
        pass
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    assert most * unit <= cost.peak_memory <= now * unit
    monkeypatch.setattr("sys.platform", "darwin")
    with Cost("cpu") as cost:
        pass
    assert most <= cost.peak_memory <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- GPUs, played ---------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs as torch would tell of them; every call is noted."""
    calls = []
    peaks = {0: 10, 1: 20}
    index = lambda device: torch.device(device).index  # noqa: E731

    def reset(device):
        calls.append(("reset", index(device)))
        peaks[index(device)] = 1

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[index(device)])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(("wait", index(device))))
    return calls, peaks


def spread(monkeypatch, *devices: str) -> nn.Module:
    """A model whose parameters say that they are on these devices."""

    class Weight:
        def __init__(self, device):
            self.device, self.is_meta = torch.device(device), device == "meta"

    model = nn.Linear(1, 1)
    monkeypatch.setattr(model, "parameters", lambda: map(Weight, devices))
    return model


def test_the_peaks_of_all_gpus_are_summed_and_waited_for(gpus, monkeypatch):
    calls, peaks = gpus
    model = spread(monkeypatch, "cuda:0", "cuda:1", "cuda:0", "meta")
    with Cost(model) as cost:
        assert calls == [("reset", 0), ("reset", 1)]
        with cost.phase("retrain"):
            assert calls[2:] == [("wait", 0), ("wait", 1)]
            peaks[0], peaks[1] = 7, 5
        assert calls[4:] == [("wait", 0), ("wait", 1)]
        with Cost("cuda"):  # the second one, whose mark goes back
            assert calls[6:] == [("reset", 1)]
            peaks[1] = 3
    assert cost.peak_memory == 7 + 5
    peaks[0] = 100
    assert cost.peak_memory == 7 + 5


def test_gpus_are_named_and_counted(gpus, monkeypatch):
    assert device_name("cuda:0") == device_name("cuda") == device_name(torch.device("cuda")) == "NVIDIA H200"
    assert device_name(spread(monkeypatch, "cuda:0", "cuda:1", "cuda:0")) == "2 × NVIDIA H200"
    both = device_name(spread(monkeypatch, "cuda:0", "meta"))
    assert both == f"NVIDIA H200 + {device_name('cpu')}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_real_gpu_the_allocator_counts():
    kept = torch.ones(MIB, device="cuda")
    base = torch.cuda.memory_allocated()
    with Cost("cuda") as cost, cost.phase("retrain"):
        some = torch.ones(16 * MIB, device="cuda")
        del some
    assert cost.peak_memory == base + 64 * MIB
    with Cost(nn.Linear(4, 4).cuda()) as cost:
        pass
    assert base <= cost.peak_memory < base + MIB
    assert device_name("cuda") == torch.cuda.get_device_name()
    del kept


# --- names ----------------------------------------------------------------------------------------


def test_a_cpu_is_named_with_its_threads(monkeypatch):
    name, _, threads = device_name("cpu").rpartition(", ")
    assert name
    assert threads == "1 thread"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    assert device_name(nn.Linear(2, 2)) == f"{name}, 12 threads"
    assert device_name(nn.ReLU()) == f"{name}, 12 threads"  # nothing is anywhere


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("processor\t: 0\nmodel name\t: Made Up 9000 @ 3 GHz\nmodel name\t: Other\n", "Made Up 9000 @ 3 GHz"),
        ("CPU implementer\t: 0x41\n", "arm"),
        (None, "arm"),
    ],
)
def test_a_cpu_has_its_model_name_where_the_system_tells_it(told, name, monkeypatch):
    def read_text(_):
        if told is None:
            raise FileNotFoundError
        return told

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm")
    assert device_name("cpu") == f"{name}, 1 thread"
