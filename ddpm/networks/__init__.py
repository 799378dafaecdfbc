"""The networks, one file each, by the name under which config.json knows them.

A network is an `nn.Module` that states what everything above it needs (see `ddpm.networks.protocol`); a class joins by
`@network("name")` in any file that is imported.
"""

from ddpm.networks.context_unet import ContextUnet, load_context_unet_weights
from ddpm.networks.mlp import PointMLP
from ddpm.networks.protocol import NETWORKS, condition_shape, network, network_times, null_condition, sample_shape
from ddpm.networks.simple_unet import SimpleUNet
from ddpm.networks.unet import Unet
from ddpm.networks.unet2d import UNet2D
