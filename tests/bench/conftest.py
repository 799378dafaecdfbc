"""A small registry and made-up records, so that run, compare and history are tested in seconds."""

import random
import sys
import types

import pytest
import torch

from bench import checkouts, children, machine
from bench.registry import SUITES, Bench, Candidate, Workload
from kernels.backend import Cost
from tests.bench.places import LIST, Place

MACHINE = {"processor": "test", "device": "cpu", "threads": 1, "torch": "0", "commit": "c0ffee", "dirty": False}


def _crash(*arguments):
    raise RuntimeError("planted\ncrash")


def _bench(candidates, device):
    x = torch.ones(2000, device=device)
    cost = Cost(bytes=4 * 2 * 2000, flops=2000)
    return Bench([(x,), (x + 1,)], torch.sin, candidates, cost, calls=2, images=3, frozen=True)


def _double(x):
    return torch.sin(torch.sin(x)) * 0 + torch.sin(x)


def workloads(quick):
    good = Candidate(lambda: _double, lambda call: float((call(torch.ones(3)) - torch.sin(torch.ones(3))).max()), 1e-6)
    wrong = Candidate(lambda: torch.cos, lambda call: 0.3, 1e-6)
    nan = Candidate(lambda: torch.cos, lambda call: float("nan"), 1e-6)
    signed = Candidate(lambda: torch.cos, lambda call: -0.3, 1e-6)
    crash = Candidate(lambda: _crash, lambda call: 0.0, 1e-6)
    late = Candidate(_crash, lambda call: 0.0, 1e-6)
    makes = {
        "good": {"double": good},
        "wrong": {"cosine": wrong, "nan": nan, "signed": signed, "double": good},
        "crashes": {"called": crash, "made": late, "double": good},
    }
    found = [Workload(f"step/{name}", "step", lambda device, c=c: _bench(c, device)) for name, c in makes.items()]
    return [*found, Workload("step/unbuilt", "step", _crash)]


@pytest.fixture
def small_registry(monkeypatch):
    """Suite `step` is the one above, seed 21; `kernels` needs a package that nobody has; the others are not written."""
    step = types.ModuleType("small_step")
    step.workloads, step.SEED = workloads, 21
    monkeypatch.setitem(sys.modules, "small_step", step)
    needs = types.ModuleType("small_kernels")

    def missing(quick):
        raise ModuleNotFoundError("No module named 'nobody_has_it'", name="nobody_has_it")

    needs.workloads = missing
    monkeypatch.setitem(sys.modules, "small_kernels", needs)
    for name in SUITES:
        monkeypatch.setitem(SUITES, name, {"step": "small_step", "kernels": "small_kernels"}.get(name, f"not_{name}"))


def _records(times, processes, spread, seed):
    draw = random.Random(seed)  # noqa: S311 (no secret)
    return [
        {
            "process": process,
            "workload": name,
            "suite": "kernels",
            "candidate": "operator",
            "parity": True,
            "kernel_us": 100 * time,
            "gate": time * (1 + draw.uniform(-spread, spread)),
            "against": "eager",
            "speed_up": 1 / time,
        }
        for process in range(processes)
        for name, time in times.items()
    ]


@pytest.fixture
def content():
    """content({row: time}, processes=8, spread=0.02, seed=0) -> a stored content with that much noise."""

    def make(times, processes=8, spread=0.02, seed=0, date="2026-01-01T00:00:00+00:00", commit="c0ffee"):
        return {
            "format_version": 1,
            "kind": "fused-ddpm benchmark",
            "date": date,
            "machine": MACHINE | {"commit": commit},
            "processes": processes,
            "skipped": {},
            "records": _records(times, processes, spread, seed),
        }

    return make


@pytest.fixture
def place(tmp_path, monkeypatch):
    """place() -> a repository of another project and the environment whose Python lists what its sides would run."""

    def make(environment=tmp_path / "venv"):
        made = Place(tmp_path / "theirs", environment)
        monkeypatch.chdir(made.root)
        monkeypatch.delenv("PYTHONPATH", raising=False)
        monkeypatch.setattr(machine, "repository", lambda: made.root)
        monkeypatch.setattr(children, "PYTHON", (str(made.python), "-P"))
        monkeypatch.setattr(checkouts, "LIST", LIST)
        monkeypatch.setattr(checkouts, "_rows", lambda *_: {})  # its environment has no PyTorch
        return made

    return make
