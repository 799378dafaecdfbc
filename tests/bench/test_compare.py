"""`ddpm-bench compare`: what is an alarm and what is none, on made-up records; real ones in test_compare_long.py."""

import json
import re
import sys
from pathlib import Path

import pytest

from bench import checkouts, children, compare, machine, packages, project, store
from bench.cli import main
from ddpm.errors import BadInput, WorkFailed
from tests.bench.foreign import commit, git
from tests.bench.rows import ROWS, SLOW, broken, slowed


@pytest.fixture
def files(tmp_path, content):
    def write(name, *arguments, **options):
        store.write(tmp_path / name, content(*arguments, **options))
        return str(tmp_path / name)

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
    assert row["low"] < row["ratio"] < row["high"]
    samples = [record for record in stored["records"] if record["workload"] == SLOW]
    assert [(record["round"], record["side"]) for record in samples] == [(1, "base")] * 8 + [(1, "head")] * 8
    assert main(["compare", base, slow, "--json", str(tmp_path / "c.jsonl")]) == 1
    head, *records = map(json.loads, (tmp_path / "c.jsonl").read_text().splitlines())
    assert (head["rows"], records) == (stored["rows"], stored["records"])


@pytest.mark.parametrize("key", ["processor", "cores", "flags", "capability", "torch", "python"])
def test_files_of_another_machine_or_version_are_compared_only_where_asked_for(files, capsys, key):
    base, head, other = files("b.json", ROWS), files("h.jsonl", ROWS, seed=1), files("o.jsonl", ROWS, seed=1)
    stored = [json.loads(line) for line in Path(other).read_text().splitlines()]
    stored[0]["machine"][key] = "another"
    Path(other).write_text("".join(f"{json.dumps(line)}\n" for line in stored))
    assert main(["compare", base, head]) == 0  # both old: neither says how many cores
    capsys.readouterr()
    assert main(["compare", base, other]) == 2
    said = capsys.readouterr().err
    assert f"on {key} " in said
    assert said.endswith("head on another: times do not compare across machines, needs --across-machines\n")
    assert main(["compare", base, other, "--across-machines"]) == 0
    assert f"note: base was measured on {key} " in capsys.readouterr().err


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
        ([base, str(tmp_path / "o.json")], "times do not compare across machines"),
        ([base, "HEAD"], "needs two stored files or two git refs"),
        ([base, base, "--json", str(tmp_path / "no" / "x.json")], "needs a file in a folder that exists"),
        ([base, base, "--markdown", ""], "needs a file in a folder that exists"),
        (["HEAD", "HEAD", "--timeout", "nan"], "'--timeout'"),
        ([base, base, "--threshold", "nan"], "needs numbers > 0"),
        ([base, base, "--threshold", "0"], "needs numbers > 0"),
        ([base, base, "--filter", "softmax"], "--filter: got it with"),
        ([base, base, "--full"], "--quick: got it with"),
        ([base, base, "--suite", "kernels"], "needs two git refs"),
        (["HEAD", "HEAD", "--across-machines"], "--across-machines: got it with HEAD and HEAD, needs two stored files"),
        ([base, base, "--json", "/proc/x.json"], "/proc/x.json: cannot be written"),
        ([base], "HEAD"),
    ):
        assert main(["compare", *arguments]) == 2
        error = capsys.readouterr().err.splitlines()
        assert words in error[-1]
        assert sum(line.startswith("error: ") for line in error) == 1


def test_files_of_a_quick_and_a_whole_measurement_are_not_compared(tmp_path, content, capsys):
    """Under the same names a suite may do less."""
    for name, quick in (("quick", True), ("whole", False)):
        store.write(tmp_path / f"{name}.jsonl", content(ROWS) | {"quick": quick})
    quick, whole = str(tmp_path / "quick.jsonl"), str(tmp_path / "whole.jsonl")
    assert main(["compare", whole, whole]) == 0
    assert main(["compare", quick, whole]) == 2
    assert "base was measured with --quick and head not so, needs the same" in capsys.readouterr().err


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
    monkeypatch.setattr(machine, "busy_warning", lambda: None)  # it watches the machine for half a second
    return root


def test_refs_are_unpacked_under_one_runner_and_removed(repository, monkeypatch):
    listed = {"one": ["a", "b"], "two": ["a"]}

    def names(side, checkout, *_):
        return listed[(checkout.root / "bench" / "runner.py").read_text()]

    monkeypatch.setattr(checkouts, "_names", names)
    with checkouts.checkouts("one", "two", ["kernels"], True, "") as found:
        roots = {side: checkout.root for side, checkout in found.sides.items()}
        markers = {side: (root / "kernels" / "marker.py").read_text() for side, root in roots.items()}
        runners = {(root / "bench" / "runner.py").read_text() for root in roots.values()}
        assert found.gone == ["b"]
    assert markers == {"base": "one", "head": "two"}
    assert runners == {"two"}
    assert not any(root.exists() for root in roots.values())
    assert git(repository, "worktree", "list").count("\n") == 0


def test_base_falls_back_to_its_own_benchmarks(repository, monkeypatch, capsys):
    def names(side, checkout, *_):
        if side == "base" and (checkout.root / "bench" / "runner.py").read_text() == "two":
            raise WorkFailed("ImportError: no new_operator")
        return ["a"]

    monkeypatch.setattr(checkouts, "_names", names)
    with checkouts.checkouts("one", "two", ["kernels"], True, "") as found:
        assert (found.sides["base"].root / "bench" / "runner.py").read_text() == "one"
        assert (found.sides["head"].root / "bench" / "runner.py").read_text() == "two"
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
    side = checkouts.Checkout(tmp_path, tmp_path, (tmp_path,), {}, ("kernels",))
    kernels = checkouts._Suites(("kernels",))
    if reason is None:
        assert checkouts._names("head", side, kernels, True, 60) == ["a"]
    else:
        with pytest.raises(WorkFailed, match=reason):
            checkouts._names("head", side, kernels, True, 60)


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
    with pytest.raises(BadInput, match=r"HEAD: .* fatal: not a git repository"):
        checkouts.commit_of("HEAD")


def test_the_second_round_measures_the_suspects_alone(repository, monkeypatch, content, capsys):
    """The whole command with made-up processes: interleaved, then twice as many more for what looked slower."""
    calls = []

    def run_child(root, process, arguments, *, paths, extra, side, timeout, on_row):
        assert paths == (root,)
        assert Path(extra[project.VARIABLE]).is_file()
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
    monkeypatch.setattr(checkouts, "_names", lambda *_: ["a"])
    assert main(["compare", "one", "two", "--processes", "6", "--timeout", "77"]) == 1
    first, second = calls[:12], calls[12:]
    for part, processes in ((first, 6), (second, 2 * 6)):
        assert sorted((side, process) for side, process, _ in part) == sorted(
            (side, process) for side in ("base", "head") for process in range(processes)
        )
        assert len({side for side, _, _ in part[::2]}) == 2  # not always the same side first
    assert second[0][2][:3] == ("--suite", "kernels", "--filter")
    assert second[0][2][3] == "^(" + re.escape(SLOW) + ")$"
    assert "slower (18 and 18 processes)" in capsys.readouterr().out


def test_suspects_are_measured_again_whatever_their_names(repository, monkeypatch, content):
    named = {f"two words {name}": time for name, time in ROWS.items()}
    filters = []

    def run_child(root, process, arguments, **_):
        pattern = arguments[arguments.index("--filter") + 1]
        filters.append(pattern)
        slow = named | {f"two words {SLOW}": named[f"two words {SLOW}"] * (1.3 if root.name == "head" else 1)}
        made = content({name: time for name, time in slow.items() if re.search(pattern, name)}, 1, 0.01, len(filters))
        for record in made["records"]:
            record["process"] = process
        return made

    monkeypatch.setattr(compare, "run_child", run_child)
    monkeypatch.setattr(checkouts, "_names", lambda *_: list(named))
    assert main(["compare", "one", "two", "--processes", "6"]) == 1
    assert set(filters) == {"", f"^({re.escape(f'two words {SLOW}')})$"}


def test_an_error_after_the_verdicts_is_none(files, monkeypatch, capsys):
    base = files("b.json", ROWS)
    monkeypatch.setattr(compare, "compare_table", lambda result: result["nothing"])
    assert main(["compare", base, base]) == 3
    assert capsys.readouterr().err.splitlines()[-1] == "error: KeyError: 'nothing'"


@pytest.mark.parametrize("error", [WorkFailed("exit code -11"), KeyError("exit code -11")])
def test_a_process_that_dies_fails_closed(repository, monkeypatch, tmp_path, capsys, error):
    def run_child(*arguments, **options):
        raise error

    monkeypatch.setattr(compare, "run_child", run_child)
    monkeypatch.setattr(checkouts, "_names", lambda *_: ["a"])
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
        monkeypatch.setattr(checkouts, "_names", lambda *_: ["a"])
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


def test_a_module_that_base_lacks_is_new_in_head_or_was_not_installed(planted, repository, capsys):
    """A dependency that head drops is not where head is installed: that base then runs nothing is no news of head."""
    for name, code in (("kernels.marker", 0), ("runner", 0), ("nobody_has_it.at_all", 3)):
        why = f"ModuleNotFoundError: No module named '{name}'"
        planted({"base": {process: {"failed": why} for process in range(8)}})
        assert main(["compare", "one", "two"]) == code
        said = " ".join(capsys.readouterr().out.split())
        assert ("SOMETHING DID NOT RUN" in said) == bool(code)


def test_a_benchmark_that_vanished_is_told_before_anything_is_measured(repository, monkeypatch, tmp_path):
    listed = {"one": ["a", "b"], "two": ["a"]}
    monkeypatch.setattr(
        checkouts, "_names", lambda side, checkout, *_: listed[(checkout.root / "bench" / "runner.py").read_text()]
    )
    monkeypatch.setattr(compare, "run_child", lambda *_, **__: pytest.fail("measured"))
    assert main(["compare", "one", "two", "--json", str(tmp_path / "c.json")]) == 3
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert [(row["row"], row["status"]) for row in rows] == [("b", "missing")]
