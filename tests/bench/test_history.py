"""`ddpm-bench history`: change points where a level changed, none in noise, and a page that stands alone."""

import json
import random

import pytest

from bench.cli import main
from bench.history import change_points

ROW = "kernels/a/fp32/1e5"


def levels(*parts, seed=0):
    draw = random.Random(seed)  # noqa: S311 (no secret)
    return [level * (1 + draw.uniform(-0.02, 0.02)) for level, count in parts for _ in range(count)]


def test_change_points_are_where_levels_change():
    assert change_points(levels((1, 10), (1.2, 10))) == [10]
    assert change_points(levels((1, 12), (1.3, 12), (0.9, 12))) == [12, 24]
    assert change_points(levels((1, 10), (1.02, 10))) == []  # under 5%
    assert change_points([1.0] * 3) == []


def test_noise_alone_has_no_change_points():
    assert sum(len(change_points(levels((1, 30), seed=seed))) for seed in range(50)) == 0


@pytest.fixture
def folder(tmp_path, content):
    for k in range(16):
        time = 1.0 if k < 9 else 1.3
        made = content({ROW: time, "kernels/b/fp32/1e5": 2}, 2, seed=k, date=f"2026-01-{k + 1:02}", commit=f"commit{k}")
        (tmp_path / f"{15 - k:02}.json").write_text(json.dumps(made))  # names in another order than dates
    (tmp_path / "foreign.json").write_text("{}")
    return tmp_path


def test_the_page_names_the_commit_and_needs_no_network(folder, capsys):
    assert main(["history", str(folder)]) == 0
    printed = capsys.readouterr()
    assert "since commit9" in printed.out
    assert "16 records, 1 change point(s)" in printed.out
    assert "foreign.json" in printed.err
    page = (folder / "history.html").read_text()
    assert page.count("<svg") == 1
    assert "src=" not in page
    assert "<link" not in page
    assert ROW in page


def test_bad_folders_are_one_line(tmp_path, folder, capsys, content):
    assert main(["history", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["history", str(empty)]) == 2
    assert "found 0 file(s)" in capsys.readouterr().err
    other = content({ROW: 1})
    other["machine"] = other["machine"] | {"processor": "another"}
    (folder / "other.json").write_text(json.dumps(other))
    assert main(["history", str(folder)]) == 2
    assert "found 2 machines" in capsys.readouterr().err
