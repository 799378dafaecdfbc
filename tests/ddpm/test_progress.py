"""The bar: a line every tenth of the way where stderr is no terminal, a live bar where it is; neither divides by 0."""

import re

import pytest

from ddpm.progress import Bar


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_line_every_tenth_and_one_at_the_end(capsys):
    with Bar("sample", 40, "steps/s") as bar:
        for done in range(1, 41):
            assert bar.due(done) == (done % 4 == 0)
            bar.update(done, "x")
    found = lines(capsys)
    assert [line.split()[1] for line in found] == [f"{10 * k}%" for k in range(1, 11)]
    assert re.fullmatch(r"sample 100%  40/40  x  \S+ steps/s  0 s left", found[-1])


def test_fewer_steps_than_tenths(capsys):
    with Bar("sample", 3, "steps/s") as bar:
        for done in (1, 2, 3):
            bar.update(done)
    assert [line.split()[1:3] for line in lines(capsys)] == [["33%", "1/3"], ["66%", "2/3"], ["100%", "3/3"]]


def test_the_end_is_said_once(capsys):
    """Sampling that ran out of memory goes over its last steps again."""
    with Bar("sample", 10, "steps/s") as bar:
        for done in (9, 10, 10, 10):
            bar.update(done)
    assert len(lines(capsys)) == 2


def test_a_bar_goes_on_where_it_was(capsys):
    with Bar("train", 100, "images/s", start=55) as bar:
        assert not bar.due(59)
        bar.update(60)
    (line,) = lines(capsys)
    assert line.startswith("train  60%  60/100")


@pytest.mark.parametrize(("total", "start"), [(0, 0), (0, 3), (5, 5), (5, 7)])
def test_nothing_to_do_is_no_line_and_no_error(capsys, total, start):
    with Bar("train", total, "images/s", start=start) as bar:
        for done in (start, start + 1):
            assert not bar.due(done)
            bar.update(done)
    assert lines(capsys) == []


@pytest.mark.parametrize(("total", "start", "dones"), [(0, 0, (0, 1)), (5, 7, (7, 8)), (5, 0, (1, 5, 5))])
def test_the_live_bar(monkeypatch, capsys, total, start, dones):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("ddpm.progress.REFRESH_SECONDS", 0.0)
    with Bar("train", total, "images/s", start=start) as bar:
        assert bar.live
        for done in dones:
            bar.update(done)
    assert f"{dones[-1]}/{total}" in capsys.readouterr().err


def test_quiet_says_nothing(capsys):
    with Bar("train", 1, "images/s", quiet=True) as bar:
        assert not bar.due(1)
        bar.update(1)
    assert lines(capsys) == []
