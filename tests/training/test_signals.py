import subprocess
import sys
import time
from pathlib import Path

import pytest

from medclip_hf.training import signals

CHILD = """
import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("signals", sys.argv[1])
signals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(signals)
with signals.StopRequest() as stop:
    signals.stop_with_launcher()
    pathlib.Path(sys.argv[2]).touch()
    deadline = time.monotonic() + 60
    while stop.received is None and time.monotonic() < deadline:
        time.sleep(0.01)
pathlib.Path(sys.argv[3]).write_text(str(stop.received))
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a child of its parent's end")
@pytest.mark.parametrize(
    "environment", [{"ACCELERATE_MIXED_PRECISION": "no"}, {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "1"}]
)
def test_a_training_whose_launcher_is_killed_is_asked_to_stop(tmp_path, environment):
    ready, ended = tmp_path / "ready", tmp_path / "ended"
    command = [sys.executable, "-c", LAUNCHER, CHILD, str(Path(signals.__file__)), str(ready), str(ended)]
    launcher = subprocess.Popen(command, env=environment)
    wait_for(ready.exists)
    launcher.kill()
    launcher.wait()
    wait_for(lambda: ended.exists() and ended.read_text())
    assert ended.read_text() == "15"
