"""The fast tests in other environments than the pinned one: `python tests/environments.py oldest newest`.

`oldest` and `newest` lay numpy, onnxruntime and safetensors, as old and as new as pyproject.toml allows, over the
environment that runs this: seconds to make, so CI runs both, on the tests that touch them. `--python PROGRAM` instead
runs all fast tests with an environment that somebody made (another torch, another Python: gigabytes, so by hand), and
`--record FILE` adds a line with its versions and the result; `test_versions.py` holds pyproject.toml to these records.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "bench" / "results" / "environments.jsonl"
ENDS = {
    "oldest": {"numpy": "1.26.4", "onnxruntime": "1.21.1", "safetensors": "0.4.3"},
    "newest": {"numpy": "2.4.6", "onnxruntime": "1.32.0", "safetensors": "0.8.0"},
}
# What touches these three: files of weights, arrays in and out, exported files.
TOUCHED = (
    "tests/export", "tests/ddpm/test_checkpoints.py", "tests/ddpm/test_data.py", "tests/ddpm/test_table.py",
    "tests/ddpm/test_former_runs.py", "tests/kernels/test_philox.py", "tests/bench/test_run.py",
)  # fmt: skip
VERSIONS = """import json, platform
from importlib.metadata import PackageNotFoundError, version
def found(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
names = "torch triton numpy safetensors onnx onnxscript onnxruntime onnxruntime-gpu typer rich".split()
print(json.dumps({"python": platform.python_version()} | {name: found(name) for name in names}))
"""


def overlay(folder: Path, packages: dict[str, str]) -> Path:
    """An environment with these packages over the one that runs this. Returns its Python."""
    venv.create(folder, with_pip=True)
    site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (site / "beneath.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    wanted = [f"{name}=={version}" for name, version in packages.items()]
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--ignore-installed", "--no-deps"]
    subprocess.run([python, *pip, *wanted], check=True)
    return python


def run_tests(python: Path, tests: tuple[str, ...]) -> tuple[int, dict]:
    """pytest's exit code, and what a record says."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = subprocess.run([python, "-c", VERSIONS], env=environment, capture_output=True, text=True, check=True)
    versions = json.loads(said.stdout)
    print(" ".join(f"{name} {version}" for name, version in versions.items() if version), flush=True)
    line = [
        python,
        "-m",
        "pytest",
        "-m",
        "not long",
        "-n",
        "2",
        "--dist",
        "loadfile",
        "--benchmark-disable",
        "-q",
        *tests,
    ]
    done = subprocess.run(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout[-6000:], flush=True)
    counts = {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)\b", done.stdout.splitlines()[-1])
    }
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return done.returncode, {"date": date, "commit": commit} | versions | {"exit": done.returncode} | counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ends", nargs="*", choices=[*ENDS, []], help="oldest, newest")
    parser.add_argument("--python", type=Path, help="the Python of an environment that is there")
    parser.add_argument("--record", type=Path, nargs="?", const=RECORD, help=f"add the result to {RECORD.name}")
    asked = parser.parse_args()
    codes = []
    if asked.python:
        code, record = run_tests(asked.python, ())
        codes.append(code)
        if asked.record:
            with asked.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    for end in asked.ends:
        with tempfile.TemporaryDirectory(prefix=f"environment-{end}-") as folder:
            codes.append(run_tests(overlay(Path(folder), ENDS[end]), TOUCHED)[0])
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
