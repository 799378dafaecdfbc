"""pyproject.toml allows what was tested, and nothing beyond it."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from bench.report import read_lines

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SPECIFIERS = [
    *PROJECT["dependencies"],
    *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
]


def environments():
    spec = importlib.util.spec_from_file_location("environments", ROOT / "tests" / "environments.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bounds(name, specifiers=SPECIFIERS):
    """(lowest, first beyond) of a package, as tuples of integers."""
    line = next(line for line in specifiers if re.match(rf"{name}[><]", line))
    lowest, beyond = re.fullmatch(r"[\w-]+>=([\d.]+),<([\d.]+)(?:;.*)?", line).groups()
    return numbers(lowest), numbers(beyond)


def numbers(version):
    return tuple(int(part) for part in version.partition("+")[0].split("."))


def beyond(version):
    """The next minor version."""
    major, minor, *_ = numbers(version)
    return major, minor + 1


@pytest.mark.parametrize("name", ["numpy", "onnxruntime", "safetensors"])
def test_the_ends_that_ci_tests_are_those_of_pyproject(name):
    ends = environments().ENDS
    assert bounds(name) == (numbers(ends["oldest"][name]), beyond(ends["newest"][name]))


def test_both_runtimes_have_the_same_range():
    assert bounds("onnxruntime-gpu") == bounds("onnxruntime")


of_the_records = pytest.mark.skipif(not environments().RECORD.exists(), reason="no other environment recorded yet")


def records():
    return read_lines(environments().RECORD)


@of_the_records
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_torch_and_triton_were_tested_from_the_oldest_to_the_newest(name):
    tested = {numbers(record[name])[:2] for record in records() if record["exit"] == 0}
    lowest, first_beyond = bounds(name)
    assert (min(tested), beyond(".".join(map(str, max(tested))))) == (lowest[:2], first_beyond)


@of_the_records
def test_every_python_was_tested():
    lowest, first_beyond = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    tested = {numbers(record["python"])[1] for record in records() if record["exit"] == 0}
    assert tested == set(range(int(lowest), int(first_beyond)))
