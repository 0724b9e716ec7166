"""Asking the model hub without hanging when it cannot be reached."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

REACH_SECONDS = 3.0
EMBEDDED = "model 'tiny-opt' and text 'storyworld'"
EMBEDDED_VISION = "classifier 'shapes-resnet' and images 'shapes'"
# How many threads have the dataset client offline, and what it was before the first.
_SWITCHING = threading.Lock()
_inside, _before = 0, False


def hub_reachable() -> bool:
    """Whether the hub answers within three seconds; False at once when `HF_HUB_OFFLINE` is set.

    Loading through the hub's own client retries an unreachable hub for up to a minute; asking first is what
    turns that into a quick answer. It runs in a thread because a name look-up has no time limit of its own.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            answer = get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS)
            # The hub's own client would also retry one that is out of order.
            healthy = answer.status_code < 500
        except Exception:
            return
        if healthy:
            answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS + 0.5)
    return answered.is_set()


@contextmanager
def reading_dataset(
    what: str, reachable: bool, *, source: str = "", ways: str = "", embedded: str = EMBEDDED
) -> Iterator[None]:
    """Inside, the Hub's data sets come from the local cache alone when the Hub cannot be reached.

    Raises ValueError for one that cannot be loaded; `source` says where from, where it could
    be elsewhere, and `ways` are further ways out when it is in neither place, beside what is `embedded`.
    """
    try:
        with nullcontext() if reachable else _offline():
            yield
    except (OSError, ValueError) as error:
        if not reachable:
            raise ValueError(f"{unreachable(what, embedded)}{ways}") from error
        raise ValueError(f"cannot load {what}{source}: {error}") from error


@contextmanager
def _offline() -> Iterator[None]:
    """Inside, the dataset client asks nobody; several threads may be inside."""
    import datasets

    global _inside, _before
    # It reads its switch once, at import; it has no local_files_only.
    with _SWITCHING:
        if not _inside:
            _before = datasets.config.HF_HUB_OFFLINE
        _inside += 1
        datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        with _SWITCHING:
            _inside -= 1
            if not _inside:
                datasets.config.HF_HUB_OFFLINE = _before


def unreachable(what: str, embedded: str = EMBEDDED) -> ValueError:
    """The error for something neither here nor to be had from the hub; `embedded` is here in its place."""
    from huggingface_hub import constants

    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
    return ValueError(
        f"{what} is not in the local cache and the hub cannot be reached ({why}). Ways out: use the embedded "
        f"{embedded}, name a local folder or file, download on a machine with a "
        "network (`hf download …`) and copy the folder, or check the network, proxy and HF_ENDPOINT"
    )
