"""Peak memory of sampling, of a whole process as the operating system counts it."""

import json
import subprocess
import sys
from pathlib import Path

from bench.machine import ROOT
from bench.run import environment
from ddpm.command_line import debugging
from ddpm.errors import WorkFailed

BATCH, STEPS = 256, 2

# VmHWM, not ru_maxrss: the latter starts at what the parent held when it forked.
CHILD = """import json, sys
import torch
from pathlib import Path
from ddpm import load_run, sample
from ddpm.networks import condition_shape

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

folder, engine, batch, steps, guidance = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
run = load_run(folder)
shape = condition_shape(run.model)
context = torch.eye(shape[0])[torch.arange(batch) % shape[0]] if shape else None
before = status("VmRSS")
options = run.options(steps=steps)
sample(run.model, run.schedule, batch, context=context, guidance=guidance, engine=engine, batch_size=batch, **options)
print(json.dumps({"before": before, "peak": status("VmHWM")}))
"""


def sampling_memory(
    run: Path, engine: str, threads: int, guidance: float = 1.0, batch: int = BATCH, steps: int = STEPS
) -> dict[str, int] | None:
    """{"before", "peak"}: resident bytes of a fresh process, with the run loaded and at most while it sampled.

    None where the operating system has no /proc/self/status. Raises WorkFailed if the process failed.
    """
    if not Path("/proc/self/status").exists():
        return None
    arguments = [str(run.resolve()), engine, *map(json.dumps, (batch, steps, guidance))]
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", CHILD, *arguments],
        cwd=ROOT,
        env=environment(ROOT, threads),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        if debugging():
            sys.stderr.write(done.stderr)
        raise WorkFailed(f"memory of {engine}: {(done.stderr.strip().splitlines() or ['no result'])[-1]}")
    return json.loads(done.stdout)
