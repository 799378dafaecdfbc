"""`[tool.ddpm-bench]`: what it says is used, what it cannot say is one line that names the file and the key."""

import subprocess

import pytest

from bench import compare, config, machine
from bench.cli import main
from bench.config import Config
from ddpm.errors import BadInput

ALL = """
[tool.ddpm-bench]
suites = ["speed.py", "more/speed.py"]
threshold = 0.07
thresholds = { "softmax/.*" = 0.1, "a=b" = 1 }
processes = 10
build = ""
timeout = 600
too_noisy = "fail"
"""


def write(folder, text):
    (folder / "pyproject.toml").write_text(text)
    return folder


def test_every_key_is_read_and_suites_lie_beside_the_file(tmp_path):
    found = config.read(write(tmp_path, ALL))
    assert found == Config(
        suites=(str(tmp_path / "speed.py"), str(tmp_path / "more/speed.py")),
        threshold=0.07,
        thresholds={"softmax/.*": 0.1, "a=b": 1},
        processes=10,
        build="",
        timeout=600,
        too_noisy="fail",
        file=tmp_path / "pyproject.toml",
    )
    assert found.rules == ["softmax/.*=0.1", "a=b=1"]


def test_the_nearest_table_of_the_repository_counts(tmp_path):
    inner = tmp_path / "python" / "deep"
    inner.mkdir(parents=True)
    assert config.read(tmp_path, inner) == Config()
    write(tmp_path.parent, ALL)  # outside the repository
    write(tmp_path, "[project]\nname = 'mine'")
    assert config.read(tmp_path, inner) == Config()
    write(tmp_path, ALL)
    assert config.read(tmp_path, inner).file == tmp_path / "pyproject.toml"
    write(inner, "[tool.other]")  # says nothing
    assert config.read(tmp_path, inner).file == tmp_path / "pyproject.toml"
    write(inner.parent, ALL)
    assert config.read(tmp_path, inner).suites[0] == str(inner.parent / "speed.py")
    (tmp_path.parent / "pyproject.toml").unlink()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("suite = 'speed.py'", "got suite, knows suites, threshold, thresholds, processes, build, timeout, too_noisy"),
        ("suites = 'speed.py'", "suites: got 'speed.py', needs a list of files, like [\"speed.py\"]"),
        ("suites = []", "suites: got [], needs a list"),
        ("suites = [1]", "suites: got [1], needs a list"),
        ("threshold = '5%'", "threshold: got '5%', needs a number > 0"),
        ("threshold = true", "threshold: got True, needs a number > 0"),
        ("threshold = inf", "threshold: got inf, needs a number > 0"),
        ("threshold = nan", "threshold: got nan, needs a number > 0"),
        ("threshold = 0", "threshold: got 0, needs a number > 0"),
        ("thresholds = 0.1", "thresholds: got 0.1, needs regular expressions"),
        ("thresholds = { '[' = 0.1 }", "needs regular expressions"),
        ("thresholds = { a = -1 }", "needs regular expressions with numbers > 0"),
        ("processes = 8.0", "processes: got 8.0, needs an integer"),
        ("processes = true", "processes: got True, needs an integer"),
        ("build = ['make']", "build: got ['make'], needs a shell command"),
        ("timeout = 0", "timeout: got 0, needs seconds > 0"),
        ("too_noisy = 'warn'", 'too_noisy: got \'warn\', needs "pass" or "fail"'),
        ("too_noisy = []", 'too_noisy: got [], needs "pass" or "fail"'),
        ("x = [", "not readable TOML"),
    ],
)
def test_what_it_cannot_be_is_one_line_with_file_and_key(tmp_path, line, words):
    write(tmp_path, f"[tool.ddpm-bench]\n{line}\n")
    with pytest.raises(BadInput) as caught:
        config.read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'pyproject.toml'}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[tool]\nddpm-bench = 3", "tool = 3", ""])
def test_other_shapes_of_the_table(tmp_path, text):
    write(tmp_path, text)
    if "ddpm" in text:
        with pytest.raises(BadInput, match="got 3, needs a table"):
            config.read(tmp_path)
    else:
        assert config.read(tmp_path) == Config()


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Of `compare one two OPTIONS` in another repository: the job and the thresholds that it would do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "repository", lambda: tmp_path)
    found = []

    def refs(base, head, job, thresholds):
        found.append((job, thresholds))
        raise BadInput("enough")

    monkeypatch.setattr(compare, "compare_refs", refs)

    def ask(*options):
        assert main(["compare", "one", "two", *options]) == 2
        return found.pop()

    return ask


def test_compare_takes_the_table_and_options_win(tmp_path, asked):
    write(tmp_path, ALL)
    job, limits = asked()
    assert job.suites == [str(tmp_path / "speed.py"), str(tmp_path / "more/speed.py")]
    assert (job.processes, job.timeout, job.build) == (10, 600, "")
    assert (limits.of("softmax/3 mine"), limits.of("a=b"), limits.of("other")) == (0.1, 1, 0.07)
    options = ["--suite", "a.py", "--suite", "b.py", "--processes", "7", "--timeout", "9", "--build", "make"]
    job, limits = asked(*options, "--threshold", "0.2", "--threshold-for", "softmax=0.3")
    assert job.suites == [str(tmp_path / "a.py"), str(tmp_path / "b.py")]
    assert (job.processes, job.timeout, job.build) == (7, 9, "make")
    assert (limits.of("softmax/3 mine"), limits.of("a=b"), limits.of("other")) == (0.3, 1, 0.2)


def test_without_suites_another_project_is_told_what_is_needed(tmp_path, monkeypatch, capsys):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "repository", lambda: tmp_path)
    for text in ("", "[tool.ddpm-bench]\nthreshold = 0.1\n"):
        write(tmp_path, text)
        assert main(["compare", "one", "two"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert 'needs --suite FILE.py, or suites = ["FILE.py"] under [tool.ddpm-bench] in its pyproject.toml' in said
    write(tmp_path, '[tool.ddpm-bench]\nsuites = ["kernels"]\n')
    assert main(["compare", "one", "two"]) == 2
    assert "kernels measures fused-ddpm" in capsys.readouterr().err
    write(tmp_path, '[tool.ddpm-bench]\nsuites = ["speed.py"]\nprocesses = 3\n')
    assert main(["compare", "one", "two"]) == 2
    assert "processes: got 3, needs >= 6" in capsys.readouterr().err
