"""Says in one sentence that transformers is too old, before an import fails on a name that nobody knows."""

import sys

import transformers
from packaging.version import Version

OLDEST_TRANSFORMERS = "5.21"  # as pyproject.toml has it

if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
    print(
        f"transformers {transformers.__version__} is too old: {OLDEST_TRANSFORMERS} is needed. On a machine whose own "
        "packages must stay, install transformers and huggingface_hub into a folder (pip install --target) and name it "
        "first in PYTHONPATH.",
        file=sys.stderr,
    )
    raise SystemExit(2)
