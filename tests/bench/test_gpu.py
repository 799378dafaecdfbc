"""`make gpu` at tiny sizes, interpreted on the CPU, so that it cannot rot while no GPU is at hand."""

import json

import pytest
import torch

import kernels
from bench.gpu import run_kernels, table
from bench.kernels import Workload, measure, workloads

NOISE = {"q_sample", "q_sample_rows", "noise_mse", "noise_mse_backward", "solver_step"}
NETWORK = {"group_norm_relu", "bottleneck"}
OPERATORS = NOISE | NETWORK


def test_the_kernel_benchmark_runs_and_records(triton_device, tmp_path):
    sizes, types = (800,), (torch.float32, torch.float16)
    content = run_kernels(tmp_path, triton_device, sizes, types, rounds=1)
    stored = json.loads((tmp_path / "kernels.json").read_text())
    assert stored == content
    records = stored["records"]
    assert stored["complete"]
    assert stored["machine"]["torch"] == torch.__version__
    assert {record["kernel"] for record in records} == OPERATORS
    assert len(records) == len(OPERATORS) * len(sizes) * len(types)
    for record in records:
        assert record["parity"]
        assert len(record["kernel_us"]["samples"]) == 1
        assert record["ratio_to_eager"] > 0
    assert len(table(records).splitlines()) == 1 + len(records)


def test_a_spent_budget_stops_and_is_recorded_as_incomplete(triton_device, tmp_path, capsys):
    content = run_kernels(tmp_path, triton_device, (800,), (torch.float32,), rounds=1, budget=-1)
    assert content["records"] == []
    assert not content["complete"]
    assert "stopped in case 1 of 1" in capsys.readouterr().err


def test_a_kernel_without_parity_gets_no_ratio():
    device = torch.device("cpu")
    good = workloads(800, torch.float32, device)[0]
    bad = Workload(**{**vars(good), "error": lambda arguments: 1.0})
    record = measure(bad, device, rounds=1)
    assert not record["parity"]
    assert "ratio_to_eager" not in record
    assert "parity failed" in table([record])


@pytest.mark.parametrize("name", sorted(NETWORK))
def test_a_network_operator_with_another_eps_loses_parity(name, monkeypatch):
    device = torch.device("cpu")
    operator = getattr(kernels, name)
    monkeypatch.setattr(f"bench.kernels.{name}", lambda *arguments: operator(*arguments, eps=0.1))
    workload = next(w for w in workloads(800, torch.float32, device) if w.name == name)
    assert workload.error(workload.make(0)) > 1e-3
    monkeypatch.undo()
    workload = next(w for w in workloads(800, torch.float32, device) if w.name == name)
    assert workload.error(workload.make(0)) < 2e-5


@pytest.mark.parametrize("name", sorted(NOISE))
def test_a_wrong_kernel_loses_parity(name, monkeypatch):
    """Another noise than the contract's is an error of order one, for every operator."""
    device = torch.device("cpu")
    workload = next(w for w in workloads(800, torch.float32, device) if w.name == name)
    arguments = workload.make(0)
    assert workload.error(arguments) < 2e-5
    monkeypatch.setattr("bench.kernels.SEED", 8)
    if name == "q_sample_rows":
        monkeypatch.setattr("bench.kernels.rows_reference", lambda *a: (torch.zeros(1), torch.zeros(1), None))
    assert workload.error(arguments) > 1e-3
