"""What this machine computes in hardware, by type."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# oneDNN, PyTorch's convolutions on CPUs, is held back by these; PyTorch itself does not look at them.
ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; taken for granted where it is no x86."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    limit = next((os.environ[name] for name in ISA_LIMITS if name in os.environ), "")
    if limit.upper() in WITHOUT_BFLOAT16:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def has_float16() -> bool:
    """Whether oneDNN computes float16 on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def computed_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What an inference form computes in: float32 for bfloat16 on a CPU that emulates it, which is slower and coarser.

    37 ms a guided step instead of 265 at batch 32 (n_feat 64, 16x16, two cores with AVX-512 and without AVX512-BF16).
    """
    emulated = dtype == torch.bfloat16 and device.type == "cpu" and not has_bfloat16()
    return torch.float32 if emulated else dtype


def float32_on_cuda() -> tuple[str, str]:
    """What convolutions and products of float32 are computed in on CUDA, "tf32" or another.

    The older flags `allow_tf32` cannot be read where the newer ones were set.
    """
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@contextmanager
def reproducible_convolutions() -> Iterator[None]:
    """cuDNN takes the same algorithms every time, and those that sum in one order: a resumed run repeats its bits."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
