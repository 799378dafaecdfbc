"""The fused operators of fused-ddpm, each with its reference; imports nothing of the floors above.

`philox` is the noise contract; `q_sample`, `noise_mse` and `solver_step` are the operators that
training and sampling consist of beside the network; `convolution`, `winograd`, `group_norm_relu` and
`bottleneck` are parts of the network's inference form.
"""

from importlib import metadata


def _refuse_namesake() -> None:
    """Raise if the Hugging Face distribution `kernels` is installed: it owns a folder of this name."""
    try:
        namesake = metadata.distribution("kernels")
    except metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"the installed distribution 'kernels' {namesake.version} (Hugging Face) has the same import name as "
        "fused-ddpm's folder 'kernels': install only one of them in an environment "
        "(pip uninstall kernels, then reinstall fused-ddpm)"
    )


_refuse_namesake()

from kernels import philox  # noqa: E402
from kernels.bottleneck import bottleneck  # noqa: E402
from kernels.convolution import convolution  # noqa: E402
from kernels.group_norm_relu import group_norm_relu  # noqa: E402
from kernels.noise_mse import noise_mse  # noqa: E402
from kernels.q_sample import q_sample  # noqa: E402
from kernels.q_sample_rows import q_sample_rows  # noqa: E402
from kernels.solver_step import solver_step  # noqa: E402
from kernels.winograd import winograd  # noqa: E402
