"""Misspelt names are refused with the right one, where `**kwargs` would swallow them without a word."""

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

from transformers.utils import TransformersKwargs

Method = TypeVar("Method", bound=Callable[..., Any])


# Same as in fvlm, from here on.


def check_spelling(owner: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Refuse what can only be a misspelt name; other unknown ones pass, as tools of the Hub add their own.

    Raises:
        ValueError: with the name that is meant.
    """
    for name in names:
        if meant := get_close_matches(name, known, n=1, cutoff=0.8):
            raise ValueError(f"{owner} knows no {name!r}. Did you mean {meant[0]!r}?")


def refuse_misspelt(method: Method) -> Method:
    """The method, which refuses misspelt names of its arguments."""
    known = [*signature(method).parameters, *TransformersKwargs.__annotations__, "return_dict"]

    @wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check_spelling(method.__qualname__, [name for name in kwargs if name not in known], known)
        return method(*args, **kwargs)

    return checked  # type: ignore[return-value]


__all__ = ["check_spelling", "refuse_misspelt"]
