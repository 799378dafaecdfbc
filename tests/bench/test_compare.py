"""`ddpm-bench compare`: what is an alarm and what is none, on made-up records; real ones in test_compare_long.py."""

import json
import re
import sys

import pytest

from bench import children, compare, machine, packages, sides
from bench.cli import main
from bench.verdicts import Thresholds, confirmed, exit_code, judge, suspects
from ddpm.errors import BadInput, WorkFailed
from tests.bench.prove_compare import commit, git

ROWS = {f"kernels/{name}/fp32/1e5": 1.0 + k for k, name in enumerate("abcdefgh")}
SLOW = "kernels/c/fp32/1e5"


def statuses(verdicts):
    return {verdict.row: verdict.status for verdict in verdicts}


def slowed(factor):
    return ROWS | {SLOW: ROWS[SLOW] * factor}


def broken(content, **facts):
    for record in content["records"]:
        if record["workload"] == SLOW:
            record |= facts
    return content


def test_two_hundred_same_comparisons_raise_no_confirmed_alarm(content):
    """1600 rows with 4% noise in six processes a side, each confirmed by a second round."""
    alarms = 0
    for seed in range(200):
        rounds = [
            judge(content(ROWS, n, 0.04, 4 * seed + k), content(ROWS, n, 0.04, 4 * seed + k + 1), Thresholds())
            for k, n in ((0, 6), (2, 6 * compare.AGAIN))
        ]
        alarms += exit_code(confirmed(*rounds))
    assert alarms == 0


def test_ten_percent_in_one_row_are_found_in_that_row_alone(content):
    found = 0
    for seed in range(50):
        rounds = [
            judge(content(ROWS, n, 0.04, 4 * seed + k), content(slowed(1.1), n, 0.04, 4 * seed + k + 1), Thresholds())
            for k, n in ((0, 6), (2, 6 * compare.AGAIN))
        ]
        final = statuses(confirmed(*rounds))
        found += final.pop(f"{SLOW} operator") == "slower"
        assert "slower" not in final.values()
    assert found >= 48


def test_significance_without_size_and_size_without_significance_are_no_alarm(content):
    small = judge(content(ROWS, spread=0.001), content(slowed(1.03), spread=0.001, seed=1), Thresholds())
    assert statuses(small)[f"{SLOW} operator"] == "same"
    assert min(verdict.p for verdict in small) < 0.01
    noisy = judge(content(ROWS, spread=0.6), content(slowed(1.2), spread=0.6, seed=1), Thresholds())
    assert exit_code(noisy) == 0


def test_thresholds_by_name(content):
    sides = content(ROWS), content(slowed(1.08), seed=1)
    assert exit_code(judge(*sides, Thresholds())) == 1
    assert exit_code(judge(*sides, Thresholds(0.05, ["/c/=0.1"]))) == 0
    assert exit_code(judge(*sides, Thresholds(0.1, ["kernels=0.2", "/c/=0.05"]))) == 1
    for bad in (["[=0.1"], ["c=x"], ["c=-1"], ["c"]):
        with pytest.raises(BadInput, match="threshold"):
            Thresholds(0.05, bad)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda head: broken(head, failed="RuntimeError: x"), "failed"),
        (lambda head: broken(head, parity=False, error=1, tolerance=0), "parity lost"),
        (lambda head: broken(head, against="yardstick"), "failed"),
        (lambda head: head | {"records": [r for r in head["records"] if r["workload"] != SLOW]}, "missing"),
        (
            lambda head: head | {"records": [r for r in head["records"] if (r["workload"], r["process"]) != (SLOW, 3)]},
            "failed",
        ),
    ],
)
def test_a_row_that_did_not_run_fails_the_comparison(content, change, status):
    verdicts = judge(content(ROWS), change(content(slowed(2), seed=1)), Thresholds())
    assert statuses(verdicts)[f"{SLOW} operator"] == status
    assert exit_code(verdicts) == 3


def test_what_base_lacks_is_new_and_nothing_to_compare_is_a_failure(content):
    base = content({name: time for name, time in ROWS.items() if name != SLOW})
    verdicts = judge(base, content(ROWS, seed=1), Thresholds())
    assert statuses(verdicts)[f"{SLOW} operator"] == "new"
    assert exit_code(verdicts) == 0
    mended = judge(broken(content(ROWS), failed="x"), content(ROWS, seed=1), Thresholds())
    assert statuses(mended)[f"{SLOW} operator"] == "new"
    assert exit_code(judge(base | {"records": []}, content(ROWS), Thresholds())) == 3


def test_a_suspect_that_is_not_seen_again_is_no_alarm(content):
    first = judge(content(ROWS), content(slowed(1.2), seed=1), Thresholds())
    same = judge(content(ROWS, seed=2), content(ROWS, seed=3), Thresholds())
    crashed = judge(content(ROWS, seed=2), broken(content(ROWS, seed=3), failed="x"), Thresholds())
    assert statuses(confirmed(first, same))[f"{SLOW} operator"] == "unconfirmed"
    assert exit_code(confirmed(first, same)) == 0
    assert exit_code(confirmed(first, first)) == 1
    assert exit_code(confirmed(first, crashed)) == 3
    assert exit_code(confirmed(first, [])) == 3


def test_a_suspect_without_significance_is_decided_by_the_second_round(content):
    first = judge(content(ROWS, spread=0.2), content(slowed(1.15), spread=0.2, seed=6), Thresholds())
    assert statuses(first)[f"{SLOW} operator"] == "same"
    assert f"{SLOW} operator" in suspects(first)
    again = judge(content(ROWS, 16, seed=2), content(slowed(1.15), 16, seed=3), Thresholds())
    same = judge(content(ROWS, 16, seed=2), content(ROWS, 16, seed=3), Thresholds())
    assert statuses(confirmed(first, again))[f"{SLOW} operator"] == "slower"
    assert statuses(confirmed(first, same))[f"{SLOW} operator"] == "same"


@pytest.fixture
def files(tmp_path, content):
    def write(name, *arguments, **options):
        path = tmp_path / name
        path.write_text(json.dumps(content(*arguments, **options)))
        return str(path)

    return write


def test_stored_files_from_the_command_line(files, tmp_path, capsys):
    base, same, slow = files("b.json", ROWS), files("s.json", ROWS, seed=1), files("h.json", slowed(1.2), seed=1)
    assert main(["compare", base, same]) == 0
    assert "no row is slower" in capsys.readouterr().out
    markdown, result = tmp_path / "c.md", tmp_path / "c.json"
    assert main(["compare", base, slow, "--markdown", str(markdown), "--json", str(result)]) == 1
    assert "REGRESSION" in capsys.readouterr().out
    text = markdown.read_text()
    assert text.index("REGRESSION") < text.index(SLOW) < text.index("<details>")
    assert "7 rows the same" in text
    stored = json.loads(result.read_text())
    assert stored["exit"] == 1
    row = next(row for row in stored["rows"] if row["row"] == f"{SLOW} operator")
    assert row["status"] == "slower"
    assert row["ratio"] == pytest.approx(1.2, rel=0.03)


def test_bad_files_are_one_line(files, tmp_path, capsys, content):
    base, few = files("b.json", ROWS), files("f.json", ROWS, processes=5)
    other = content(ROWS)
    other["machine"] = other["machine"] | {"processor": "another"}
    (tmp_path / "o.json").write_text(json.dumps(other))
    (tmp_path / "foreign.json").write_text("{}")
    (tmp_path / "nan.json").write_text(json.dumps(broken(content(ROWS), gate=float("nan"))))
    (tmp_path / "cut.json").write_text(json.dumps({k: v for k, v in content(ROWS).items() if k != "machine"}))
    for arguments, words in (
        ([base, str(tmp_path / "none.json")], "no such file"),
        ([str(tmp_path / "foreign.json"), base], "wrote"),
        ([base, str(tmp_path / "nan.json")], "has no times above 0"),
        ([base, str(tmp_path / "cut.json")], "lacks machine, needs a whole file"),
        ([base, few], "needs at least 6"),
        ([base, str(tmp_path / "o.json")], "times never compare across machines"),
        ([base, "HEAD"], "needs two stored files or two git refs"),
        ([base, base, "--json", str(tmp_path / "no" / "x.json")], "folder does not exist"),
        ([base, base, "--threshold", "0"], "needs numbers > 0"),
        ([base], "HEAD"),
    ):
        assert main(["compare", *arguments]) == 2
        error = capsys.readouterr().err.splitlines()
        assert words in error[-1]
        assert sum(line.startswith("error: ") for line in error) == 1


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of two commits with a file each, and bench/ as the runner."""
    root = tmp_path / "repository"
    (root / "bench").mkdir(parents=True)
    (root / "kernels").mkdir()
    for name in ("one", "two"):
        (root / "kernels" / "marker.py").write_text(name)
        (root / "bench" / "runner.py").write_text(name)
        if name == "one":
            git(root, "init", "-q")
        commit(root, name)
    monkeypatch.setattr(packages, "ROOT", root)
    monkeypatch.setattr(machine, "repository", lambda: root)
    return root


def test_refs_are_unpacked_under_one_runner_and_removed(repository, monkeypatch):
    listed = {"one": ["a", "b"], "two": ["a"]}
    monkeypatch.setattr(sides, "_names", lambda root, *_: listed[(root / "bench" / "runner.py").read_text()])
    with sides.checkouts("one", "two", ["kernels"], True, "") as found:
        markers = {side: (root / "kernels" / "marker.py").read_text() for side, root in found.roots.items()}
        runners = {(root / "bench" / "runner.py").read_text() for root in found.roots.values()}
        assert found.gone == ["b"]
    assert markers == {"base": "one", "head": "two"}
    assert runners == {"two"}
    assert not any(root.exists() for root in found.roots.values())
    assert git(repository, "worktree", "list").count("\n") == 0


def test_base_falls_back_to_its_own_benchmarks(repository, monkeypatch, capsys):
    def names(root, *_):
        if root.name == "base" and (root / "bench" / "runner.py").read_text() == "two":
            raise WorkFailed("ImportError: no new_operator")
        return ["a"]

    monkeypatch.setattr(sides, "_names", names)
    with sides.checkouts("one", "two", ["kernels"], True, "") as found:
        assert (found.roots["base"] / "bench" / "runner.py").read_text() == "one"
        assert (found.roots["head"] / "bench" / "runner.py").read_text() == "two"
    assert "base runs its own benchmarks" in capsys.readouterr().err


@pytest.mark.parametrize(("run", "reason"), [("", None), ("from ddpm import gone", "No module named 'ddpm'")])
def test_what_a_run_needs_and_a_side_lacks_shows_when_it_is_listed(tmp_path, monkeypatch, run, reason):
    """Not only what the benchmarks need: the command imports more."""
    files = {"__init__": "", "run": run, "registry": "class W: name = 'a'\ndef selected(*_): return [W], {}\n"}
    (tmp_path / "bench").mkdir()
    for name, text in files.items():
        (tmp_path / "bench" / f"{name}.py").write_text(text)
    monkeypatch.setattr(children, "PYTHON", (sys.executable, "-P", "-S"))  # no packages but these
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if reason is None:
        assert sides._names(tmp_path, ["kernels"], True, "") == ["a"]
    else:
        with pytest.raises(WorkFailed, match=reason):
            sides._names(tmp_path, ["kernels"], True, "")


def test_bad_refs_are_one_line_each(repository, capsys):
    assert main(["compare", "one", "nowhere"]) == 2
    assert "nowhere: neither a file nor a commit of this repository" in capsys.readouterr().err
    assert main(["compare", "one", "two", "--suite", "nonsense"]) == 2
    assert "needs one of" in capsys.readouterr().err
    (repository / "kernels" / "marker.py").write_text("three")
    assert main(["compare", "one", "two"]) == 2
    assert "kernels/marker.py: is changed in no ref" in capsys.readouterr().err


def test_outside_a_checkout_refs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "repository", lambda: tmp_path)
    with pytest.raises(BadInput, match="no git checkout"):
        sides.commit_of("HEAD")


def test_the_second_round_measures_the_suspects_alone(repository, monkeypatch, content, capsys):
    """The whole command with made-up processes: interleaved, then twice as many more for what looked slower."""
    calls = []

    def run_child(root, process, arguments, *, paths, side, timeout, on_row):
        assert paths == [root, root / "src"]
        assert side == root.name
        assert timeout == 77
        calls.append((root.name, process, tuple(arguments)))
        slow = root.name == "head"
        made = content(slowed(1.3) if slow else ROWS, 1, 0.01, seed=len(calls)) | {
            "seed": 7,
            "suite": "kernels",
            "quick": True,
            "filter": "",
            "product_flops_per_s": 1,
        }
        for record in made["records"]:
            record["process"] = process
        pattern = re.compile(arguments[arguments.index("--filter") + 1])
        made["records"] = [record for record in made["records"] if pattern.search(record["workload"])]
        return made

    monkeypatch.setattr(compare, "run_child", run_child)
    monkeypatch.setattr(sides, "_names", lambda *_: ["a"])
    assert main(["compare", "one", "two", "--processes", "6", "--timeout", "77"]) == 1
    first, second = calls[:12], calls[12:]
    for part, processes in ((first, 6), (second, 2 * 6)):
        assert sorted((side, process) for side, process, _ in part) == sorted(
            (side, process) for side in ("base", "head") for process in range(processes)
        )
        assert len({side for side, _, _ in part[::2]}) == 2  # not always the same side first
    assert second[0][2][3] == "^(" + re.escape(SLOW) + ")$"
    assert "in the first round" in capsys.readouterr().out


@pytest.mark.parametrize("error", [WorkFailed("exit code -11"), KeyError("exit code -11")])
def test_a_process_that_dies_fails_closed(repository, monkeypatch, tmp_path, capsys, error):
    def run_child(*arguments, **options):
        raise error

    monkeypatch.setattr(compare, "run_child", run_child)
    monkeypatch.setattr(sides, "_names", lambda *_: ["a"])
    assert main(["compare", "one", "two", "--markdown", str(tmp_path / "c.md")]) == 3
    assert "Nothing was compared" in (tmp_path / "c.md").read_text()
    assert "exit code -11" in (tmp_path / "c.md").read_text()
    said = capsys.readouterr().err
    assert "exit code -11" in said
    assert "Traceback" not in said
    assert main(["compare", "one", "two", "--debug"]) == 3
    said = capsys.readouterr().err
    assert "    raise error\n" in said
    last = said.splitlines()[-1]
    assert last.startswith("error: ")
    assert "exit code -11" in last


@pytest.fixture
def planted(repository, monkeypatch, content):
    """planted({side: {process: facts}}) -> the processes that `compare one two` ran, where SLOW has these facts."""

    def plant(facts):
        calls = []

        def run_child(root, process, arguments, *, side, **options):
            calls.append((side, process))
            made = content(ROWS, 1, 0.01, seed=len(calls))
            for record in made["records"]:
                record["process"] = process
            return broken(made, **facts.get(side, {}).get(process, {}))

        monkeypatch.setattr(compare, "run_child", run_child)
        monkeypatch.setattr(sides, "_names", lambda *_: ["a"])
        return calls

    return plant


@pytest.mark.parametrize("facts", [{"failed": "RuntimeError: x"}, {"parity": False, "error": 1, "tolerance": 0}])
@pytest.mark.parametrize("process", [0, 3])
def test_the_first_certain_failure_ends_it_and_is_all_that_is_told(planted, facts, process, tmp_path, capsys):
    calls = planted({"head": {process: facts}})
    assert main(["compare", "one", "two", "--json", str(tmp_path / "c.json")]) == 3
    assert calls[-1] == ("head", process)
    assert len(calls) <= 2 * (process + 1)
    assert "note: stopped at the first certain failure" in capsys.readouterr().err
    stored = json.loads((tmp_path / "c.json").read_text())
    assert stored["exit"] == 3
    assert [row["row"] for row in stored["rows"]] == [f"{SLOW} operator"]
    assert stored["head"]["processes"] == process + 1


def test_what_never_ran_in_base_is_no_failure_and_what_ran_once_is(planted, capsys):
    calls = planted({"base": {process: {"failed": "RuntimeError: x"} for process in range(8)}})
    assert main(["compare", "one", "two"]) == 0
    assert len(calls) >= 16
    calls = planted({"base": {2: {"failed": "RuntimeError: x"}}})
    assert main(["compare", "one", "two"]) == 3
    assert calls[-1] == ("base", 2)


def test_a_benchmark_that_vanished_is_told_before_anything_is_measured(repository, monkeypatch, tmp_path):
    listed = {"one": ["a", "b"], "two": ["a"]}
    monkeypatch.setattr(sides, "_names", lambda root, *_: listed[(root / "bench" / "runner.py").read_text()])
    monkeypatch.setattr(compare, "run_child", lambda *_, **__: pytest.fail("measured"))
    assert main(["compare", "one", "two", "--json", str(tmp_path / "c.json")]) == 3
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert [(row["row"], row["status"]) for row in rows] == [("b", "missing")]
