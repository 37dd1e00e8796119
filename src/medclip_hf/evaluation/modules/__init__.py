"""Our figures as modules of the `evaluate` library: `evaluate.load(module_path("patient_classification"))`."""

from pathlib import Path

MODULES = ("patient_classification", "retrieval_recall")


def module_path(name: str) -> str:
    """The folder of a module, for `evaluate.load`, which needs no network then.

    Raises:
        ValueError: there is no such module.
    """
    if name not in MODULES:
        raise ValueError(f"there is no module {name!r}; there are {', '.join(MODULES)}")
    return str(Path(__file__).parent / name)
