"""What rows share: made once, whichever thread asks first, and never more than there is room for."""

import threading

import pytest

from perpkit.experiments.shared import Cancelled, Shared

SOON = 60


def test_a_value_is_made_once_by_whichever_thread_asks_first():
    shared, made, go = Shared(4, 100, lambda value: 1), [], threading.Event()

    def make():
        made.append(threading.current_thread().name)
        assert go.wait(SOON)
        return object()

    got = []
    threads = [threading.Thread(target=lambda: got.append(shared.get("a", make))) for _ in range(5)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(SOON)
    assert len(made) == 1
    assert len(got) == 5
    assert len(set(map(id, got))) == 1


def test_values_of_other_keys_are_made_side_by_side():
    shared, meet = Shared(4, 100, lambda value: 1), threading.Barrier(2, timeout=SOON)
    threads = [threading.Thread(target=shared.get, args=(key, meet.wait)) for key in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert not meet.broken


def test_who_waits_for_another_thread_can_be_cancelled():
    shared, begun, go = Shared(4, 100, lambda value: 1), threading.Event(), threading.Event()

    def make():
        begun.set()
        assert go.wait(SOON)

    thread = threading.Thread(target=shared.get, args=("a", make))
    thread.start()
    assert begun.wait(SOON)
    with pytest.raises(Cancelled):
        shared.get("a", make, lambda: True)
    go.set()
    thread.join(SOON)


def test_a_failure_is_raised_and_the_next_one_tries_again():
    shared = Shared(4, 100, lambda value: 1)

    def fails():
        raise OSError("no such thing")

    with pytest.raises(OSError, match="no such thing"):
        shared.get("a", fails)
    assert shared.get("a", lambda: 7) == 7


def kept(shared, keys) -> set:
    """The keys whose values need not be made again."""
    made = []
    for key in keys:
        shared.get(key, lambda key=key: made.append(key) or "")
    return set(keys) - set(made)


def test_the_oldest_goes_when_there_are_too_many():
    shared = Shared(2, 100, len)
    for key in ("a", "b", "a", "c"):
        shared.get(key, lambda: "x")
    assert kept(shared, "ca") == {"c", "a"}


@pytest.mark.parametrize(("size", "survivors"), [(3, {"a", "b"}), (5, {"b"}), (20, set())])
def test_room_is_made_before_a_value_as_large_as_the_latest_is_made(size, survivors):
    shared, there = Shared(4, 10, len), []
    shared.get("a", lambda: size * "x")
    shared.get("b", lambda: size * "x")
    shared.get("c", lambda: there.append(set(shared._values)) or "x")
    # One alone may be larger than the limit, but not beside another.
    assert there == [survivors]


def test_everything_can_be_forgotten():
    shared = Shared(4, 100, len)
    shared.get("a", lambda: "x")
    shared.clear()
    assert kept(shared, "a") == set()
