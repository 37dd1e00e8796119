"""Silence of libraries that would tell what stands in a file: their warnings quote header values and file names."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_TALKATIVE = ("pydicom", "PIL", "nibabel", "nibabel.global", "tifffile", "presidio-analyzer", "gdcm")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within it, readers of files neither warn nor log, and pydicom does not judge the values it reads."""
    import pydicom.config as pydicom_config

    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    mode = pydicom_config.settings.reading_validation_mode
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        pydicom_config.settings.reading_validation_mode = mode
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
