"""One process or many: `World` is what training and sampling see of torchrun."""

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpm.errors import BadInput

# gloo's threads free tensors and take the interpreter's lock for it. Whoever frees a process group waits for them:
# Python lets the lock go first, DistributedDataParallel does not (torch 2.13: one process in ten never ended). And a
# thread that wants the lock of an interpreter that is ending is killed, which aborts the process (one in two where
# little is computed). So Python keeps each group, and frees it before the interpreter ends.
_groups: list[dist.ProcessGroup | None] = []


@atexit.register
def _free_groups() -> None:
    gc.collect()  # a DistributedDataParallel in a cycle
    _groups.clear()


@dataclass(frozen=True)
class World:
    """rank of size; a lone process is rank 0 of 1 and communicates with nobody."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, network: nn.Module, device: torch.device) -> nn.Module:
        """DistributedDataParallel where there are several ranks; BatchNorm statistics are those of rank 0."""
        if self.size == 1:
            return network
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(network, device_ids=ids)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over ranks."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.size
        return value

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set on any rank."""
        return flag if self.size == 1 else bool(self.mean(torch.tensor(float(flag), device=device)) > 0)

    def share(self, n: int, rank: int | None = None) -> slice:
        """The contiguous part of range(n) of a rank, default this one; the parts differ by at most one."""
        rank = self.rank if rank is None else rank
        return slice(n * rank // self.size, n * (rank + 1) // self.size)

    def gather(self, part: Tensor, n: int) -> Tensor:
        """All ranks' `share` parts joined to [n, ...], on every rank."""
        if self.size == 1:
            return part
        shares = [self.share(n, rank) for rank in range(self.size)]
        sizes = [share.stop - share.start for share in shares]
        padded = part.new_zeros(max(sizes), *part.shape[1:])
        padded[: part.shape[0]] = part
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([whole[:size] for whole, size in zip(parts, sizes, strict=True)])


def _set_by_torchrun(name: str, unset: int, low: int) -> int:
    text = os.environ.get(name, str(unset))
    if not text.isdecimal() or int(text) < low:
        raise BadInput(f"{name}: got {text!r} in the environment, needs an integer >= {low}, as torchrun sets it")
    return int(text)


@contextmanager
def world(device: torch.device) -> Iterator[World]:
    """The world that torchrun's environment variables describe: gloo on the CPU, nccl on CUDA."""
    size = _set_by_torchrun("WORLD_SIZE", 1, 1)
    if size == 1:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    _groups.append(dist.group.WORLD)
    try:
        yield World(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """auto = CUDA where there is one; under torchrun cuda means this rank's own. Raises ValueError."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device: got {name!r}, needs auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, but this PyTorch sees no CUDA device")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", _set_by_torchrun("LOCAL_RANK", 0, 0))
