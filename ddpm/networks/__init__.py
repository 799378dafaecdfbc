"""The networks, one file each, by the name under which config.json knows them.

A network is an `nn.Module` that states what everything above it needs (see `ddpm.networks.protocol`); a class joins by
`@network("name")` in any file that is imported.
"""

from ddpm.networks.context_unet import ContextUnet, load_context_unet_weights
from ddpm.networks.mlp import PointMLP
from ddpm.networks.protocol import (
    NETWORKS,
    build_network,
    condition_shape,
    fit_state_dict,
    name_of,
    network,
    network_for,
    network_times,
    null_condition,
    one_hot_conditions,
    sample_shape,
)
