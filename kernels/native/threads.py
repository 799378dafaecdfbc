"""PyTorch's operators by the calling thread alone, where they have so little to do that to wake others costs more."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

# The second is what the function of C is called; in lower case it is that of Fortran.
OPENMP, MKL = "omp_set_num_threads", "MKL_Set_Num_Threads_Local"


@cache
def _setters() -> dict[str, ctypes._CFuncPtr]:
    """Those that PyTorch has, which set the calling thread's count alone; MKL's returns the one before."""
    library = ctypes.CDLL(torch._C.__file__)
    return {name: getattr(library, name) for name in (OPENMP, MKL) if hasattr(library, name)}


@contextmanager
def single_threaded() -> Iterator[None]:
    """The calling thread has one thread of PyTorch's; others keep theirs.

    A product of 2 by 128 by 128 takes MKL two threads: 4 to 8 ms where they slept (two cores of an EPYC), else 20 us.
    """
    threads, setters = torch.get_num_threads(), _setters()
    before = {name: set_threads(1) for name, set_threads in setters.items()} | {OPENMP: threads}
    try:
        yield
    finally:
        for name, set_threads in setters.items():
            set_threads(before[name])
