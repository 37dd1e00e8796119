"""CSV tables of the caller, opened so that what is wrong with one is said with its name."""

import csv
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def open_csv(path: Path, *, strict: bool = False) -> "Iterator[csv.DictReader[str]]":
    """A reader of the rows of a table with a header, in UTF-8 with or without a byte order mark.

    Args:
        path: of the table.
        strict: refuse quotes that do not close.

    Raises:
        OSError: there is no such file.
        ValueError: it is no CSV in UTF-8, or two columns have one name, of which a row would hold the last alone.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=strict)
            repeated = [name for name, count in Counter(reader.fieldnames or ()).items() if name and count > 1]
            if repeated:
                raise ValueError(f"{path} has several columns named {repeated[0]!r}: give each a name of its own")
            yield reader
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV in UTF-8: {error}. Save it again as UTF-8.") from error
