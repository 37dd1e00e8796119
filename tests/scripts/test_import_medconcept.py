"""The import as a command: what it prints, its exit codes, and a rerun after it was killed."""

import importlib.util
import io
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image


def make_source(folder, num_lines):
    (folder / "images").mkdir()
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((300, 300, 3), np.uint8)).save(buffer, "JPEG")
    (folder / "images" / "x.jpg").write_bytes(buffer.getvalue())
    good = json.dumps({"caption": "a mass", "image": "x.jpg", "umls_meta_info": [[2, 6]]})
    lines = [good if number % 10 else "broken" for number in range(1, num_lines + 1)]
    (folder / "rows.jsonl").write_text("\n".join(lines))


def arguments_for(folder, output="out"):
    paths = ["--source", folder / "rows.jsonl", "--images", folder / "images", "--output", folder / output]
    return [*map(str, paths), "--rows-per-shard", "200"]


@pytest.fixture(scope="module")
def run(repository):
    """The script's main function: starting a process for every test would take longer than the tests."""
    path = repository / "scripts" / "import_medconcept.py"
    spec = importlib.util.spec_from_file_location("import_medconcept", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.main


def test_the_command_prints_what_was_kept_and_why_rows_were_dropped(run, tmp_path, capsys):
    make_source(tmp_path, 20)
    assert run(arguments_for(tmp_path)) == 0
    printed = capsys.readouterr()
    assert "line not JSON" in printed.out
    assert "90.00%" in printed.out
    assert "1 shards in" in printed.out
    assert "90.0% kept" in printed.err  # the progress bar


def test_a_missing_source_is_one_line_of_error(run, tmp_path, capsys):
    assert run(arguments_for(tmp_path)) == 2
    assert f"error: no file {tmp_path / 'rows.jsonl'}" in capsys.readouterr().err


def test_an_import_that_keeps_nothing_fails(run, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "rows.jsonl").write_text("broken\n")
    assert run(arguments_for(tmp_path)) == 1
    assert "no row was kept" in capsys.readouterr().err


def test_a_killed_import_is_finished_by_a_rerun_with_the_same_output(run, repository, tmp_path):
    make_source(tmp_path, 3000)
    script = str(repository / "scripts" / "import_medconcept.py")
    process = subprocess.Popen([sys.executable, script, *arguments_for(tmp_path, "killed")], stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "killed" / "train-00002.parquet").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "train.manifest.json").exists(), "it was over before it could be killed"
    assert run(arguments_for(tmp_path, "killed")) == 0
    assert run(arguments_for(tmp_path, "whole")) == 0
    outputs = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.suffix != ".lock"}
        for name in ("killed", "whole")
    ]
    assert outputs[0] == outputs[1]
