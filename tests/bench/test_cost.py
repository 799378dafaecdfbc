"""What a process of `compare` costs before it measures anything: little more than `import torch`, which it needs."""

import resource
import subprocess
import sys

import pytest

from bench.children import environment
from bench.machine import ROOT

# Of the gate's own child; a suite may import what it likes.
NEVER = {"torch._dynamo", "torch._inductor", "triton", "kernels", "scipy", "diffusers", "matplotlib", "PIL", "sklearn"}
NEVER |= {
    "onnx",
    "onnxscript",
    "onnxruntime",
    "export",
    "ddpm.networks",
    "bench.ladder",
    "bench.profile",
    "bench.report",
}
IMPORTS = "import bench.cli, bench.run, bench.measure; from bench import Bench, Candidate, Cost, Workload"
EMPTY = "from bench import Bench, Candidate, Cost, Workload\ndef workloads(quick): return []\n"
ROW = """
import torch
from bench import Bench, Candidate, Cost, Workload

def build(device):
    mine = Candidate(make=lambda: torch.sin, error=lambda call: 0.0, tolerance=0)
    return Bench([(torch.ones(10),)], torch.sin, {"mine": mine}, Cost(bytes=80, flops=10), frozen=True)

def workloads(quick):
    return [Workload("speed/a", "speed", build)]
"""
CHILD = ["run", "--suite", "speed.py", "--rounds", "2", "--quiet", "--out", "r.json"]
LOADED = """
import sys
from bench.cli import main
code = main(sys.argv[2:])
print(*(set(sys.argv[1].split()) & {*sys.modules}))
sys.exit(code)
"""


@pytest.mark.parametrize(("suite", "code"), [(EMPTY, 2), (ROW, 0)])
def test_a_child_loads_nothing_that_it_does_not_need(tmp_path, suite, code):
    (tmp_path / "speed.py").write_text(suite)
    line = [sys.executable, "-P", "-c", LOADED, " ".join(NEVER), *CHILD]
    done = subprocess.run(line, cwd=tmp_path, env=environment([ROOT]), capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout.split() == []


def seconds(line, folder):
    """Processor time of a fresh Python."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-P", *line], cwd=folder, env=environment([ROOT]), capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.long
@pytest.mark.alone
def test_a_child_costs_little_more_than_torch(tmp_path):
    (tmp_path / "speed.py").write_text(EMPTY)
    lines = {"torch": ["-c", "import torch"], "imports": ["-c", IMPORTS], "child": ["-m", "bench", *CHILD]}
    best = dict.fromkeys(lines, float("inf"))
    for _ in range(6):
        for name, line in lines.items():
            best[name] = min(best[name], seconds(line, tmp_path))
    assert best["imports"] < 1.3 * best["torch"], best
    assert best["child"] < 1.5 * best["torch"], best


def test_help_lists_every_command(capfd):
    from bench.cli import COMMANDS, main

    assert main(["--help"]) == 0
    listed = capfd.readouterr().out
    assert all(f"  {name} " in listed for name in COMMANDS)
    assert main(["nonsense"]) == 2
    assert "nonsense" in capfd.readouterr().err
    assert main(["--debug", "static", "--help"]) == 0
    assert "--check" in capfd.readouterr().out
