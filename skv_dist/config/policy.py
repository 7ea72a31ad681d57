"""From the ``routing`` section to a policy. `skv_dist.routing` itself knows no configuration."""

from collections.abc import Callable, Sequence

from skv_dist.config.routing import RoutingConfig
from skv_dist.errors import UserError
from skv_dist.routing.policies import (
    AlwaysOwn,
    Fixed,
    Nested,
    Policy,
    Ramped,
    RandomCLA,
    RandomFixedTarget,
    RandomSubset,
    WithinStages,
)
from skv_dist.routing.sharing import (
    groups_of,
    map_from_order,
    map_from_retention,
    num_kept,
    validate_order,
    validate_sharing_map,
)


def _suffix(config: RoutingConfig, num_layers: int) -> Policy:
    if config.shared_layers >= num_layers:
        raise UserError(
            f"routing.shared_layers is {config.shared_layers}, but of {num_layers} layers at most {num_layers - 1} "
            "can share: lower routing.shared_layers"
        )
    last_owner = num_layers - config.shared_layers - 1
    return Fixed(num_layers, tuple(min(layer, last_owner) for layer in range(num_layers)))


def _subset(config: RoutingConfig, num_layers: int) -> Policy:
    keep_probs = None if config.keep_probs == "uniform" else tuple(config.keep_probs)
    return RandomSubset(num_layers, keep_probs, tuple(config.always_own))


def _nested(config: RoutingConfig, num_layers: int) -> Policy:
    if config.order is None:
        raise UserError("routing.policy 'nested' needs an order of the layers: set routing.order")
    order = validate_order(config.order, num_layers)
    return Nested(num_layers, order, tuple(num_kept(num_layers, budget) for budget in config.budgets))


def _fixed(config: RoutingConfig, num_layers: int) -> Policy:
    if config.kv_source_layers is None:
        raise UserError("routing.policy 'fixed' needs a map: set routing.kv_source_layers")
    return Fixed(num_layers, validate_sharing_map(config.kv_source_layers, num_layers))


_BUILDERS: dict[str, Callable[[RoutingConfig, int], Policy]] = {
    "none": lambda config, n: Fixed(n, tuple(range(n))),
    "r_cla": lambda config, n: RandomCLA(n, config.cross_prob, config.window),
    "cla": lambda config, n: Fixed(n, groups_of(n, config.group_size)),
    "rd_cla": lambda config, n: RandomFixedTarget(n, groups_of(n, config.group_size), config.cross_prob),
    "suffix": _suffix,
    "subset": _subset,
    "nested": _nested,
    "fixed": _fixed,
}


def build_policy(
    config: RoutingConfig, num_layers: int, stages: Sequence[range] | None = None, num_steps: int = 0
) -> Policy:
    """The policy that the ``routing`` section asks for.

    Args:
        stages: the layers of each pipeline stage; None for one stage.
        num_steps: ``train.steps``, of which ``start``, ``ramp`` and ``stop`` may be a part.

    Raises:
        UserError: the section does not fit the number of layers, or ends before it begins.
    """
    policy = _unscheduled(config, num_layers, stages)
    if config.start == config.ramp == 0 and config.stop is None:
        return policy

    def steps(value: float) -> int:
        return round(value * num_steps) if value < 1 else int(value)

    begin = steps(config.start)
    end = None if config.stop is None else steps(config.stop)
    if end is not None and end <= begin:
        raise UserError(
            f"routing.stop (step {end}) is not behind routing.start (step {begin}): raise the first or lower the second"
        )
    return Ramped(num_layers, policy, begin, begin + steps(config.ramp), end)


def deployment_map(config: RoutingConfig, num_layers: int, retention: float) -> tuple[int, ...]:
    """See `RunConfig.sharing_map`."""
    if config.order is None:
        return map_from_retention(num_layers, retention)
    return map_from_order(config.order, retention)


def _unscheduled(config: RoutingConfig, num_layers: int, stages: Sequence[range] | None) -> Policy:
    if unknown := [layer for layer in config.always_own if layer >= num_layers]:
        raise UserError(
            f"routing.always_own names layer {unknown[0]}, but the layers of the model are 0 to {num_layers - 1}"
        )
    if config.within_stage and stages is not None and len(stages) > 1:
        return WithinStages(num_layers, tuple(_over(stage, config) for stage in stages))
    return _over(range(num_layers), config)


def _over(layers: range, config: RoutingConfig) -> Policy:
    """The policy over some consecutive layers, which it numbers from 0."""
    own = [layer - layers.start for layer in config.always_own if layer in layers]
    policy = _BUILDERS[config.policy](config.model_copy(update={"always_own": own}), len(layers))
    return AlwaysOwn(len(layers), policy, frozenset(own)) if own else policy
