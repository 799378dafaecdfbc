"""What of a project is built in each checkout before it can be imported: extensions, generated files, plugins."""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.children import TIMEOUT, end
from bench.machine import without_git
from bench.project import ASIDE, MANIFESTS
from ddpm.command_line import debugging
from ddpm.errors import WorkFailed

SETUPTOOLS = ("setuptools.build_meta", "setuptools.build_meta:__legacy__")
# Backends that copy Python files; whatever else they do is said in these tables of pyproject.toml.
HOOKS = {
    "hatchling.build": ("tool.hatch.build.hooks", "tool.hatch.build.targets.wheel.hooks"),
    "flit_core.buildapi": (),
    "poetry.core.masonry.api": ("tool.poetry.build",),
    "pdm.backend": ("tool.pdm.build.run-setuptools", "tool.pdm.build.custom-hook", "tool.pdm.version.write_to"),
    "uv_build": (),
    **dict.fromkeys(
        SETUPTOOLS,
        ("tool.setuptools.ext-modules", "tool.setuptools_scm.version_file", "tool.setuptools_scm.write_to"),
    ),
}
# What an installation says of a project beside its files, and what a process finds its code by.
PLUGINS = ("project.entry-points", "tool.poetry.plugins")
PIPS_OWN = tuple(f"error: {what}" for what in ("subprocess-exited-with-error", "metadata-generation-failed"))
IN_SETUP = re.compile(
    r"\b(ext_modules|\w*Extension\b|cythonize|cmake|cffi_modules|rust_extensions|cmdclass|write_to|version_file)", re.I
)


def _table(project: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise WorkFailed(f"{project / 'pyproject.toml'}: cannot be read ({error})") from error


def _has(table: Mapping[str, Any], dotted: str) -> bool:
    for key in dotted.split("."):
        if not isinstance(table, Mapping) or not table.get(key):
            return False
        table = table[key]
    return True


def is_built(project: Path) -> bool:
    """Whether a project's files alone are not all: it declares extensions, generated files or plugins."""
    table = _table(project)
    backend = table.get("build-system", {}).get("build-backend", SETUPTOOLS[-1])
    if backend not in HOOKS or any(_has(table, hook) for hook in (*PLUGINS, *HOOKS[backend])):
        return True
    setup = project / "setup.py"
    in_setup = setup.is_file() and IN_SETUP.search(setup.read_text(encoding="utf-8", errors="replace"))
    return backend in SETUPTOOLS and bool(in_setup)


def projects(root: Path, files: Sequence[str]) -> list[Path]:
    """The folders with a manifest among a checkout's tracked files that are built, if any has to be."""
    folders = {Path(file).parent for file in files if Path(file).name in MANIFESTS}
    wanted = sorted(folder for folder in folders if not ASIDE & set(folder.parts))
    return [folder for folder in wanted if is_built(root / folder)]


def _is_here(requirement: str) -> bool:
    name = re.match(r"[\w.-]+", requirement.strip())
    try:
        return name is not None and bool(metadata.version(name[0]))
    except metadata.PackageNotFoundError:
        return False


def _default(project: Path, target: Path) -> list[str]:
    """pip's installation of a project into a folder, in this environment if that has all that the build requires."""
    system = _table(project).get("build-system", {})
    backend = system.get("build-backend", SETUPTOOLS[0]).partition(":")[0].partition(".")[0]
    inside = bool(system.get("backend-path")) or find_spec(backend) is not None
    here = inside and all(map(_is_here, system.get("requires", ["setuptools"])))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--use-pep517", *(["--no-build-isolation"] if here else []), "--upgrade", "--target", str(target)]
    return [*command, str(project)]


def told(output: str) -> str:
    """The line of a build's output that says most: its first error, if it names one, else its last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing"]
    return next((line for line in lines if re.search(r"\berror\b", line, re.I) and line not in PIPS_OWN), lines[-1])


def _run(side: str, command: str | list[str], folder: Path, extra: Mapping[str, str]) -> None:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    environment = without_git(os.environ) | extra | {"PATH": path}
    shell = isinstance(command, str)
    late = False
    with tempfile.TemporaryFile() as written:
        # No input: what asks for some would wait for ever.
        how = {"stdin": subprocess.DEVNULL, "stdout": written, "stderr": subprocess.STDOUT, "process_group": 0}
        process = subprocess.Popen(command, shell=shell, cwd=folder, env=environment, **how)  # noqa: S603 (the user's)
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            end(process)
        written.seek(0)
        output = written.read().decode(errors="replace")
    if debugging():
        sys.stderr.write(output)
    if late or process.returncode:
        said = told(output)
        shown = command if shell else " ".join(["python", *command[1:]])
        how = f"no end after {TIMEOUT:g} s" if late else f"exit code {process.returncode}"
        raise WorkFailed(f"{side}: the build failed: {shown}: {how}: {said}")


def build(
    side: str, root: Path, files: Sequence[str], target: Path, command: str | None, extra: Mapping[str, str]
) -> None:
    """Build a checkout: by a command of the shell ("" is none), or into folders of `target` what its projects declare.

    files: the tracked ones. extra: of the environment, beside this process's. Raises WorkFailed with the last line.
    """
    if command is not None:
        if command.strip():
            _run(side, command, root, extra)
        return
    for number, project in enumerate(projects(root, files)):  # pip would replace what two of them share, a namespace
        _run(side, _default(root / project, target / str(number)), root, extra)
