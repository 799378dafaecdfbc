"""What run.py understands by `--context`: names first, then whole numbers as classes, then vectors."""

import numpy as np
import pytest

from export import run

SAMPLES = np.arange(2, 7)


def rows(text, *names, size=None):
    shape = None if size == 0 else [size or len(names)]
    metadata = {"format_version": run.FORMAT_VERSION, "condition_shape": shape, "classes": list(names)}
    return run.contexts(text, metadata, SAMPLES)


@pytest.mark.parametrize(
    ("text", "names", "row"),
    [
        ("dog", ("cat", "dog"), [0, 1]),
        ("1", ("cat", "dog"), [0, 1]),
        ("1", ("1", "2"), [1, 0]),  # a name before a number
        ("0", ("1", "2"), [1, 0]),
        ("a,b", ("a,b", "c"), [1, 0]),
        ("all", ("cat",), [1]),
        ("0.5,-1", ("cat", "dog"), [0.5, -1]),
        ("1,0", ("cat", "dog"), [1, 0]),
        ("0", ("cat",), [1]),  # once the vector [0.], which is no condition at all
        ("00", ("cat",), [1]),
        ("0.5", ("cat",), [0.5]),
        ("1.0", ("cat",), [1]),
        ("0.0", ("cat",), [0]),
    ],
)
def test_one_text_is_one_row(text, names, row):
    found = rows(text, *names)
    assert found.dtype == np.float32
    assert found.tolist() == [row] * len(SAMPLES)


def test_classes_without_names_have_numbers():
    assert rows("2", size=3).tolist() == [[0, 0, 1]] * len(SAMPLES)
    assert rows("0", size=1).tolist() == [[1]] * len(SAMPLES)


def test_files_of_format_1_mean_the_same():
    metadata = {"format_version": run.FORMER_VERSION, "n_cfeat": 1, "classes": ["cat"]}
    assert run.contexts("0", metadata, SAMPLES).tolist() == [[1]] * len(SAMPLES)


def test_all_goes_by_the_global_index():
    assert rows("all", "a", "b", "c").argmax(1).tolist() == [2, 0, 1, 2, 0]


def test_nothing_asked_is_no_condition():
    assert rows(None, "a", "b").tolist() == [[0, 0]] * len(SAMPLES)
    assert rows(None, size=0) is None


ONE = r"needs a class by name \(cat\) or number \(0\.\.0\), all, or one finite number with a point \(0\.5\)"
TWO = r"needs a class by name \(cat, dog\) or number \(0\.\.1\), all, or 2 finite numbers"


@pytest.mark.parametrize("text", ["1", "9" * 5000, "dog", "", "nan", "1e39", "1,0"])
def test_what_one_class_cannot_be_is_refused(text):
    with pytest.raises(run.UsageError, match=rf"^--context: got '{text}', {ONE}$"):
        rows(text, "cat")


@pytest.mark.parametrize("text", ["2", "-1", "1.0", "9" * 5000, "cow", "0.5,", "0,0,1", "inf,0"])
def test_what_two_classes_cannot_be_is_refused(text):
    with pytest.raises(run.UsageError, match=rf"^--context: got '{text}', {TWO}$"):
        rows(text, "cat", "dog")


def test_classes_without_names_are_asked_for_by_number():
    with pytest.raises(
        run.UsageError, match=r"got 'cat', needs a class by number \(0\.\.2\), all, or 3 finite numbers$"
    ):
        rows("cat", size=3)
    with pytest.raises(run.UsageError, match="trained without classes"):
        rows("0", size=0)
