"""The fused operators of fused-ddpm, each with its reference; imports nothing of the floors above.

`philox` is the noise contract; `q_sample`, `noise_mse` and `solver_step` are the operators that training and sampling
consist of beside the network, `guidance_rescale` may come before the last; `convolution`, `winograd`, `group_norm_relu`
and `bottleneck` are parts of the network's inference form. All raise a TypeError or ValueError that names the argument,
what it was and what it must be.
"""

from contextlib import suppress
from importlib import metadata

with suppress(metadata.PackageNotFoundError):  # of the Hugging Face distribution, which owns a folder of this name
    raise ImportError(
        f"the installed distribution 'kernels' {metadata.version('kernels')} (Hugging Face) has the same import name "
        "as fused-ddpm's folder 'kernels': install only one of them in an environment "
        "(pip uninstall kernels, then reinstall fused-ddpm)"
    )

from kernels import philox
from kernels.bottleneck import bottleneck
from kernels.convolution import convolution
from kernels.group_norm_relu import group_norm_relu
from kernels.guidance_rescale import guidance_rescale
from kernels.noise_mse import noise_mse
from kernels.q_sample import q_sample
from kernels.q_sample_rows import q_sample_rows
from kernels.solver_step import solver_step
from kernels.winograd import winograd
