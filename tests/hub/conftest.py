"""A Hub of our own for tests, and small folders to push to it."""

import importlib.util
import sys
from pathlib import Path

import pytest

HUB_SERVER = Path(__file__).parent / "hub_server.py"


@pytest.fixture(scope="session")
def hub_server():
    """The module `hub_server`."""
    spec = importlib.util.spec_from_file_location("hub_server", HUB_SERVER)
    module = importlib.util.module_from_spec(spec)
    sys.modules["hub_server"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(hub_server):
    """An empty Hub that listens on 127.0.0.1; accounts "clinic" (token hf_clinic) and "guest" (hf_guest)."""
    server = hub_server.HubServer()
    yield server
    server.close()
