"""The proof of `ddpm-bench compare`, on real operators and a busy machine; `test_compare_long.py` runs a part of it.

    PYTHONPATH=. python tests/bench/prove_compare.py same --times 10 --out bench/results/MACHINE/compare_proof.json
    PYTHONPATH=. python tests/bench/prove_compare.py slower --times 10 --out (the same file)

A repository is made of the working tree: commit `base`, and commits that plant something into one operator. Each
comparison appends one line to the record, so the proof can be made in parts. Nothing here is synthetic: the compared
processes are those of the command line.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from bench.machine import ROOT, describe
from bench.packages import OURS
from ddpm.files import read_json, write_json

OPERATORS = ("q_sample", "solver_step", "group_norm_relu")
FILTER = f"^kernels/({'|'.join(OPERATORS)})/"
PROCESSES = 6
LOAD_SECONDS = 900

# Burns a share of the processor time that the operator itself took: that much slower at any size on any machine.
SLOWER = """

import time as _time

_as_it_was = {name}


def {name}(*arguments, **options):
    began = _time.process_time()
    result = _as_it_was(*arguments, **options)
    now = _time.process_time()
    while _time.process_time() - now < {share} * (now - began):
        pass
    return result
"""
CRASHING = """

def {name}(*arguments, **options):
    raise RuntimeError("planted")
"""
# In place or not, the result is no longer the reference's.
WRONG = """

_as_it_was = {name}


def {name}(*arguments, **options):
    return _as_it_was(*arguments, **options) + 0.01
"""
GONE = """

_as_it_was = workloads


def workloads(quick):
    return [workload for workload in _as_it_was(quick) if "/noise_mse/" not in workload.name]
"""
LOAD = """
import random, sys, time
import numpy
draw, matrix = random.Random(int(sys.argv[1])), numpy.ones((300, 300))
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    burst = time.monotonic() + draw.uniform(0.05, 1.0)
    while time.monotonic() < burst:
        matrix @ matrix
    time.sleep(draw.uniform(0, 1.0))
"""


def git(root, *arguments):
    names = {f"GIT_{who}_{what}": "prove" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | names).stdout.strip()


def commit(root, branch):
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", branch)
    git(root, "branch", branch)


def make_repository(root):
    """The working tree's packages as commit `base` of a repository of their own."""
    for name in OURS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
    (root / ".gitignore").write_text("__pycache__/\n")
    git(root, "init", "-q")
    commit(root, "base")


def plant(root, branch, planted, share=0.1):
    """A commit on top of base; planted: {operator: text appended to its file}, share: of its time, for SLOWER."""
    git(root, "checkout", "-q", "--detach", "base")
    for name, text in planted.items():
        with (root / "kernels" / f"{name}.py").open("a") as file:
            file.write(text.format(name=name, share=share))
    commit(root, branch)


@contextmanager
def busy(workers=1):
    """So many processes that each keep a core busy half of the time, in bursts of up to a second."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    load = [
        subprocess.Popen([sys.executable, "-c", LOAD, str(seed), str(LOAD_SECONDS)], env=environment)
        for seed in range(workers)
    ]
    try:
        yield
    finally:
        for process in load:
            process.kill()
            process.wait()


def compare(root, head, *options, pattern=FILTER, processes=PROCESSES):
    """(exit code, the JSON of `compare`, seconds, what it printed) of base against a branch, which is checked out."""
    git(root, "checkout", "-q", head)
    result = root.parent / f"{head}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench", "compare", "base", head, "--filter", pattern]
    command += ["--processes", str(processes), "--json", str(result), *options]
    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(root), "COLUMNS": "160"}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=environment)
    content = json.loads(result.read_text()) if result.exists() else None
    return done.returncode, content, time.monotonic() - began, done.stdout + done.stderr


def same(root, workers=1):
    """One A/A comparison on the busy machine: base against another commit of the same files."""
    with busy(workers):
        return compare(root, "same")


def slower(root, branch, workers=1):
    """One comparison with a branch into which slowness was planted, on the busy machine."""
    with busy(workers):
        return compare(root, branch)


def branches(root):
    """All commits that the proof needs."""
    make_repository(root)
    git(root, "branch", "same")
    for name in OPERATORS:
        plant(root, f"slower_{name}", {name: SLOWER})
    plant(root, "much_slower", {"solver_step": SLOWER}, share=0.3)
    plant(root, "broken", {"q_sample": CRASHING, "group_norm_relu": WRONG})
    git(root, "checkout", "-q", "--detach", "base")
    with (root / "bench" / "suites" / "kernels.py").open("a") as file:
        file.write(GONE)
    commit(root, "gone")


def line_of(kind, operator, done, commit, workers):
    """What the record keeps of a comparison."""
    code, content, seconds, output = done
    if content is None:
        raise RuntimeError(f"compare wrote nothing: {output[-2000:]}")
    keys = ("row", "status", "ratio", "p", "detail")
    rows = [{key: row[key] for key in keys} for row in content["rows"]]
    how = {"kind": kind, "operator": operator, "commit": commit, "processes": PROCESSES, "workers": workers}
    return how | {"exit": code, "seconds": round(seconds), "rows": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("same", "slower"))
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1, help="processes that keep the machine busy")
    asked = parser.parse_args()
    import torch

    machine = describe(torch.device("cpu"))
    record = read_json(asked.out) if asked.out.exists() else {"machine": machine, "comparisons": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "repository"
        root.mkdir()
        branches(root)
        for _ in range(asked.times):
            turn = sum(line["kind"] == "slower" for line in record["comparisons"])
            operator = None if asked.kind == "same" else OPERATORS[turn % len(OPERATORS)]
            done = same(root, asked.workers) if operator is None else slower(root, f"slower_{operator}", asked.workers)
            record["comparisons"].append(line_of(asked.kind, operator, done, machine["commit"], asked.workers))
            write_json(asked.out, record)
            print(record["comparisons"][-1], flush=True)


if __name__ == "__main__":
    main()
