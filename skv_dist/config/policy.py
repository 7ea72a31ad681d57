"""From the ``routing`` section to a policy. `skv_dist.routing` itself knows no configuration."""

from collections.abc import Callable, Sequence

from skv_dist.config.routing import RoutingConfig
from skv_dist.errors import UserError
from skv_dist.routing.kinds import Kinds, first_layers, layers_by_kind
from skv_dist.routing.policies import (
    AlwaysOwn,
    Fixed,
    Nested,
    Policy,
    Ramped,
    RandomCLA,
    RandomFixedTarget,
    RandomSubset,
    WithinParts,
)
from skv_dist.routing.sharing import (
    groups_of,
    map_from_cached_layers,
    map_from_order,
    map_from_retention,
    num_kept,
    validate_order,
    validate_sharing_map,
)


def _none(config: RoutingConfig, kinds: Kinds) -> Policy:
    return Fixed(len(kinds), tuple(range(len(kinds))))


def _r_cla(config: RoutingConfig, kinds: Kinds) -> Policy:
    return RandomCLA(len(kinds), config.cross_prob, config.window)


def _cla(config: RoutingConfig, kinds: Kinds) -> Policy:
    return Fixed(len(kinds), groups_of(len(kinds), config.group_size))


def _rd_cla(config: RoutingConfig, kinds: Kinds) -> Policy:
    return RandomFixedTarget(len(kinds), groups_of(len(kinds), config.group_size), config.cross_prob)


def _subset(config: RoutingConfig, kinds: Kinds) -> Policy:
    keep_probs = None if config.keep_probs == "uniform" else tuple(config.keep_probs)
    return RandomSubset(len(kinds), keep_probs, tuple(config.always_own))


def _suffix(config: RoutingConfig, kinds: Kinds) -> Policy:
    num_layers, fewest = len(kinds), max(first_layers(len(kinds), kinds)) + 1
    if config.shared_layers > num_layers - fewest:
        raise UserError(
            f"routing.shared_layers is {config.shared_layers}, but of {num_layers} layers at most "
            f"{num_layers - fewest} can share: lower routing.shared_layers"
        )
    return Fixed(num_layers, map_from_cached_layers(num_layers, range(num_layers - config.shared_layers), kinds))


def _nested(config: RoutingConfig, kinds: Kinds) -> Policy:
    if config.order is None:
        raise UserError("routing.policy 'nested' needs an order of the layers: set routing.order")
    order = validate_order(config.order, len(kinds))
    return Nested(len(kinds), order, tuple(num_kept(len(kinds), budget) for budget in config.budgets), tuple(kinds))


def _fixed(config: RoutingConfig, kinds: Kinds) -> Policy:
    if config.kv_source_layers is None:
        raise UserError("routing.policy 'fixed' needs a map: set routing.kv_source_layers")
    return Fixed(len(kinds), validate_sharing_map(config.kv_source_layers, len(kinds), kinds))


_Builder = Callable[[RoutingConfig, Kinds], Policy]  # over as many layers as there are kinds
# Policies over layers of one kind: a model of several kinds has one for each.
_OF_ONE_KIND: dict[str, _Builder] = {"none": _none, "r_cla": _r_cla, "cla": _cla, "rd_cla": _rd_cla, "subset": _subset}
_OF_ALL_KINDS: dict[str, _Builder] = {"suffix": _suffix, "nested": _nested, "fixed": _fixed}


def build_policy(
    config: RoutingConfig,
    num_layers: int,
    stages: Sequence[range] | None = None,
    num_steps: int = 0,
    kinds: Kinds | None = None,
) -> Policy:
    """The policy that the ``routing`` section asks for.

    Args:
        stages: the layers of each pipeline stage; None for one stage.
        num_steps: ``train.steps``, of which ``start``, ``ramp`` and ``stop`` may be a part.
        kinds: of the layers; None where they are of one kind.

    Raises:
        UserError: the section does not fit the number of layers, or ends before it begins.
    """
    policy = _unscheduled(config, kinds or [None] * num_layers, stages)
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


def deployment_map(
    config: RoutingConfig, num_layers: int, retention: float, kinds: Kinds | None = None
) -> tuple[int, ...]:
    """See `RunConfig.sharing_map`."""
    if config.order is None:
        return map_from_retention(num_layers, retention, kinds)
    return map_from_order(config.order, retention, kinds)


def _unscheduled(config: RoutingConfig, kinds: Kinds, stages: Sequence[range] | None) -> Policy:
    num_layers = len(kinds)
    if unknown := [layer for layer in config.always_own if layer >= num_layers]:
        raise UserError(
            f"routing.always_own names layer {unknown[0]}, but the layers of the model are 0 to {num_layers - 1}"
        )
    parts: list[tuple[int, ...]] = [tuple(range(num_layers))]
    if config.within_stage and stages is not None:
        parts = [tuple(stage) for stage in stages]
    if config.policy in _OF_ONE_KIND:
        parts = [of_kind for part in parts for of_kind in layers_by_kind(part, kinds)]
    policies = tuple(_over(part, config, kinds) for part in parts)
    return policies[0] if len(parts) == 1 else WithinParts(num_layers, policies, tuple(parts))


def _over(layers: Sequence[int], config: RoutingConfig, kinds: Kinds) -> Policy:
    """The policy over some layers, in ascending order, which it numbers from 0."""
    own = [number for number, layer in enumerate(layers) if layer in config.always_own]
    build = (_OF_ONE_KIND | _OF_ALL_KINDS)[config.policy]
    policy = build(config.model_copy(update={"always_own": own}), [kinds[layer] for layer in layers])
    return AlwaysOwn(len(layers), policy, frozenset(own)) if own else policy
