"""`python -m bench.gpu PART OUT UNTIL [FILTER]`: one part that measures, in a process of its own, until a Unix time."""

import sys
import time
from pathlib import Path

import torch

from bench.gpu.command import CHILDREN

if __name__ == "__main__":
    part, out, until, *pattern = sys.argv[1:]
    CHILDREN[part](Path(out), torch.device("cuda"), float(until) - time.time(), *pattern or [""])
