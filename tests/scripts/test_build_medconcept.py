"""The script that builds a training set, run on a small table with the published recipe's sections."""

import importlib.util
import json

import numpy as np
import pytest
from PIL import Image

from medclip_hf.data.parquet import find_shards, read_figure_rows


@pytest.fixture(scope="module")
def script(repository):
    path = repository / "scripts" / "build_medconcept.py"
    spec = importlib.util.spec_from_file_location("build_medconcept", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    lines = ["image,caption"]
    for number in range(6):
        pixels = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((90, 90), Image.Resampling.BICUBIC).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,Chest radiograph with pneumonia of patient {number}.")
    lines.append("missing.png,A figure without its file.")
    path = tmp_path / "table.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(script, repository, table, *more):
    recipe = repository / "scripts" / "recipes" / "medconcept.yaml"
    output = table.parent / "out"
    changes = [f"output.folder={output}", "source.kind=table", f"source.path={table}", "source.licenses=[]", *more]
    arguments = [argument for change in changes for argument in ("--set", change)]
    return script.main(["--config", str(recipe), *arguments]), output


def test_the_recipe_runs_on_a_table(script, repository, table, capsys):
    code, output = run(script, repository, table)
    assert code == 0
    rows = list(read_figure_rows(find_shards(output, "train")))
    assert len(rows) == 5  # of six; a modality gives at least one article to the test set
    assert {row.modality for row in rows} == {"radiograph"}
    assert all(row.concepts for row in rows)
    printed = capsys.readouterr()
    assert "image missing" in printed.out
    assert "collect: 100%" in printed.err
    assert "kept" in printed.err


def test_nothing_kept_is_an_error_of_its_own(script, repository, table, capsys):
    code, _ = run(script, repository, table, "images.min_side=1000")
    assert code == 1
    assert "no figure was kept; the reasons are in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("source.path=nowhere.csv", "no table at nowhere.csv"),
        ("source.kind=table2", "'source.kind' must be one of 'folder', 's3', 'tarballs', 'table'"),
        ("splits.test=0.1", "unknown key 'splits.test'. Did you mean 'test_share'?"),
        ("splits.test_share=1.5", "together below 1"),
        ("figures.keep=medical", "needs model.path"),
        ("concepts.vocabulary=nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_a_mistake_in_the_recipe_is_told_in_one_line(script, repository, table, capsys, change, message):
    code, _ = run(script, repository, table, change)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert error.startswith("error: ")
    assert message in error


def test_the_report_names_every_reason(script, repository, table):
    _, output = run(script, repository, table)
    report = json.loads((output / "report.json").read_text())["report"]
    assert report["tally"] == {"kept": 6, "dropped": {"image missing": 1}}
