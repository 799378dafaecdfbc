"""The job of docs/ci.md, word for word, in a repository that another project's could be.

Nothing in its lines is replaced. What they would get from a package registry is installed already: fused-ddpm and
torch are in the environment, pip is told by its own variables to ask no index and to build with the setuptools that
is there, and so says "Requirement already satisfied".
"""

import re
import subprocess
import textwrap
import tomllib

import pytest

from bench import config
from tests.bench.foreign import FILES, ROOT, commit, git, make_environment, make_repository
from tests.bench.plants import PLANTS

FENCE = re.compile(r"^```(yaml|toml)\n(.*?)^```$", re.S | re.M)
RUN = re.compile(r"^( +)run: (?:\|\n((?:\1  .*\n)+)|(.+)\n)", re.M)
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def blocks(language):
    page = (ROOT / "docs" / "ci.md").read_text("utf-8")
    return [text for name, text in FENCE.findall(page) if name == language]


def steps():
    """The `run:` lines of the job, a script for each step."""
    (job,) = (text for text in blocks("yaml") if "jobs:" in text)
    return [textwrap.dedent(several) if several else one for _, several, one in RUN.findall(job)]


def settings():
    """The section of five minutes, with this repository's suite."""
    return blocks("toml")[0].replace('"speed.py"', '"bench/speed.py"')


@pytest.fixture(scope="module")
def cloned(tmp_path_factory):
    """What actions/checkout leaves of a pull request's branch: a clone with the base's branch at origin/base.

    Returns: the clone, a branch for each pull request, and the variables of the environment.
    """
    folder = tmp_path_factory.mktemp("foreign").resolve()
    upstream = folder / "upstream"
    make_repository(upstream, FILES | {"pyproject.toml": settings()})
    for branch, plant in (("harmless", "a renamed local"), ("slower", "30% in the extension")):
        git(upstream, "checkout", "-q", "--detach", "base")
        PLANTS[plant].change(upstream)
        commit(upstream, branch)
    clone = folder / "clone"
    subprocess.run(["git", "clone", "-q", str(upstream), str(clone)], check=True)
    variables = make_environment(folder / "venv") | OFFLINE | {"GITHUB_BASE_REF": "base"}
    return clone, variables


def job(clone, variables, branch) -> tuple[int, str, str]:
    """(exit code of the step that failed or 0, what was printed, the step summary) of a pull request."""
    git(clone, "checkout", "-q", "--detach", f"origin/{branch}")
    summary = clone.parent / f"{branch}.md"
    summary.touch()
    said = ""
    for script in steps():
        done = subprocess.run(
            ["bash", "-e", "-c", script],
            cwd=clone,
            env=variables | {"GITHUB_STEP_SUMMARY": str(summary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        said += done.stdout
        if done.returncode:
            break
    return done.returncode, said, summary.read_text()


def test_the_job_has_an_installation_and_a_comparison():
    install, compare = steps()
    assert "pip install fused-ddpm" in install
    assert "ddpm-bench compare" in compare


def test_the_settings_are_those_that_there_are():
    assert set(tomllib.loads(blocks("toml")[1])["tool"]["ddpm-bench"]) == set(config.KEYS)


def test_this_project_compares_as_others_are_told_to():
    ours = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    for line in steps()[1].splitlines():
        assert line in ours.replace(".venv/bin/", "")


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.parametrize(("branch", "code"), [("harmless", 0), ("slower", 1)])
def test_the_job_passes_what_is_harmless_and_stops_what_is_slower(cloned, branch, code):
    clone, variables = cloned
    got, said, summary = job(clone, variables, branch)
    assert got == code, said
    assert "Successfully installed mine-1.0" in said or "already satisfied: mine" in said, said
    rows = [line for line in summary.splitlines() if line.startswith("| ")]
    assert any("sine/500000" in row for row in rows) or code == 0, summary
    assert ("slower" in "".join(row for row in rows if "sine/500000" in row)) == bool(code), summary
    assert git(clone, "status", "--porcelain") == ""
    assert git(clone, "worktree", "list").count("\n") == 0
