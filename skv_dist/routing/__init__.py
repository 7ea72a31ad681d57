"""Route tables, policies and sharing maps. Pure Python: nothing here knows torch or Megatron."""

from skv_dist.routing.plan import RoutePlan
from skv_dist.routing.policies import Policy
from skv_dist.routing.sharing import (
    map_from_cached_layers,
    map_from_order,
    map_from_retention,
    num_kept,
    validate_sharing_map,
)

__all__ = [
    "Policy",
    "RoutePlan",
    "map_from_cached_layers",
    "map_from_order",
    "map_from_retention",
    "num_kept",
    "validate_sharing_map",
]
