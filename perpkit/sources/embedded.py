"""Where the embedded models, question sets and published tables lie."""

from pathlib import Path

EMBEDDED_MODELS = ("tiny-opt", "tiny-opt-outliers")
EMBEDDED_CLASSIFIERS = ("shapes-resnet",)


def data_folder(*parts: str) -> Path:
    """The path of something embedded, in a clone (`data/`) or in an installed wheel (`perpkit/data/`).

    Raises ValueError when it is not there.

    >>> data_folder("models", "tiny-opt").is_dir()
    True
    """
    package = Path(__file__).parents[1]
    for root in (package / "data", package.parent / "data"):
        if root.joinpath(*parts).exists():
            return root.joinpath(*parts)
    raise ValueError(f"the embedded data {'/'.join(parts) or 'folder'} is missing; reinstall perpkit")
