"""What works with the core dependencies alone, and what names the extra that it needs."""

import re
import subprocess
import tomllib
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from ddpm.extras import EXTRAS

ROOT = Path(__file__).parent.parent
FORMER = ROOT / "tests" / "ddpm" / "former"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower()


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """The Python of an environment with what `pip install fused-ddpm` brings: links into the one that runs this."""
    folder = tmp_path_factory.mktemp("core")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    seen, wanted = set(), [name_of(line) for line in PROJECT["dependencies"]]
    while wanted:
        name = wanted.pop()
        try:
            found = distribution(name)
        except PackageNotFoundError:  # needed on another system or Python only
            continue
        if name in seen:
            continue
        seen.add(name)
        wanted += [name_of(line) for line in found.requires or () if "extra ==" not in line]
        for top in {Path(file).parts[0] for file in found.files} - {"..", "__pycache__"}:
            link = site / top
            if not link.exists():
                link.symlink_to(Path(found.locate_file(top)).resolve())
    return folder / "bin" / "python"


def call(core, *arguments):
    done = subprocess.run([core, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_the_environment_has_no_extra(core):
    code = f"from importlib.util import find_spec; print([n for n in {list(EXTRAS)} if find_spec(n)])"
    assert subprocess.run([core, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


SUITE = """import torch
from bench import Bench, Candidate, Cost, Workload
def build(device):
    x = torch.randn(300, 300)
    mine = Candidate(make=lambda: torch.relu, error=lambda call: float((call(x) - x.relu()).abs().max()), tolerance=0)
    return Bench([(x,)], torch.relu, {"mine": mine}, Cost(bytes=7e5, flops=1e5), frozen=True)
def workloads(quick):
    return [Workload("relu/300", "speed", build)]
"""


@pytest.mark.long
def test_the_gate_and_sampling_need_no_extra(core, tmp_path):
    (tmp_path / "speed.py").write_text(SUITE)
    out = tmp_path / "now.jsonl"
    asked = ("--suite", tmp_path / "speed.py", "--rounds", 3, "--processes", 2, "--out", out)
    code, _, err = call(core, "bench", "run", *asked)
    assert code == 0, err
    code, _, err = call(core, "ddpm", "sample", FORMER / "run", "--n", 2, "--npy", tmp_path / "x.npy")
    assert code == 0, err
    for program in ("bench", "ddpm"):
        assert call(core, program, "--help")[0] == 0


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        (f"ddpm sample {FORMER}/run --out x.png", "PIL", "pictures"),
        pytest.param(f"ddpm evaluate {FORMER}/run --n 4", "sklearn", "train", marks=pytest.mark.long),
        pytest.param("ddpm train --data digits --out {tmp}/run", "PIL", "train", marks=pytest.mark.long),
        (f"ddpm export-diffusers {FORMER}/run {{tmp}}/pipeline", "diffusers", "diffusers"),
        pytest.param(
            f"bench profile {FORMER}/run --out {{tmp}}/profile", "matplotlib", "pictures", marks=pytest.mark.long
        ),
        pytest.param("bench run --suite export --out {tmp}/x.jsonl", "onnx", "export", marks=pytest.mark.long),
        pytest.param(f"export onnx {FORMER}/run --out {{tmp}}/onnx", "onnx", "export", marks=pytest.mark.long),
        (f"export run {FORMER}/sampler.onnx", "onnxruntime", "onnx"),
    ],
)
def test_a_command_that_lacks_a_package_names_its_extra(core, tmp_path, command, package, extra):
    code, _, err = call(core, *command.format(tmp=tmp_path).split())
    assert code in (1, 2, 4)
    assert err.count("error: ") == 1, err
    assert err.endswith(f"{package} is not installed, needs: pip install 'fused-ddpm[{extra}]'\n")
    assert not any(tmp_path.iterdir())


def test_every_package_is_in_its_extra():
    for package, extra in EXTRAS.items():
        names = {name_of(line) for line in PROJECT["optional-dependencies"][extra]}
        assert DISTRIBUTIONS.get(package, package) in names
