"""Sharing maps: which layers keep a KV cache at deployment, and who uses it (docs/method.md, "Deployment").

Source of the rule: arXiv 2604.22782. A layer in the cached set uses its own K/V; any other uses those of the
nearest preceding layer in the set. Where layers are of several kinds (`skv_dist.routing.kinds`), that of its own kind.
"""

from collections.abc import Iterable, Sequence

from skv_dist.errors import UserError
from skv_dist.routing.kinds import Kinds, check_kinds, first_layers, layers_by_kind


def map_from_cached_layers(
    num_layers: int, cached_layers: Iterable[int], kinds: Kinds | None = None
) -> tuple[int, ...]:
    """The map in which only ``cached_layers`` keep a cache.

    Raises:
        UserError: the set is empty, misses layer 0 or the first of another kind, or names a layer that does not exist.
    """
    cached = sorted(set(cached_layers))
    outside = [layer for layer in cached if not 0 <= layer < num_layers]
    if outside:
        raise UserError(f"cached_layers names layer {outside[0]}, but the model has layers 0..{num_layers - 1}")
    if not cached or cached[0] != 0:
        raise UserError("cached_layers must contain layer 0: nothing before it could lend it K/V")
    for layer in first_layers(num_layers, kinds):
        if layer not in cached:
            raise UserError(
                f"cached_layers must contain layer {layer}: no layer of its kind ({kinds and kinds[layer]}) is before "
                "it, and only layers of one kind share K/V"
            )
    table = [0] * num_layers
    for of_kind in layers_by_kind(range(num_layers), kinds):
        source = of_kind[0]
        for layer in of_kind:
            source = layer if layer in cached else source
            table[layer] = source
    return tuple(table)


def map_from_retention(num_layers: int, retention: float, kinds: Kinds | None = None) -> tuple[int, ...]:
    """Uniform groups of ``round(1 / retention)`` layers of a kind, each led by its first layer.

    Raises:
        UserError: retention is not in (0, 1].
    """
    _check(retention)
    # Not round(): 1/0.4 is 2.5, and halves go up.
    table = [0] * num_layers
    for of_kind in layers_by_kind(range(num_layers), kinds):
        groups = groups_of(len(of_kind), min(num_layers, int(1.0 / retention + 0.5)))
        for layer, leader in zip(of_kind, groups):
            table[layer] = of_kind[leader]
    return tuple(table)


def map_from_order(order: Sequence[int], retention: float, kinds: Kinds | None = None) -> tuple[int, ...]:
    """The first layers of an order keep a cache, as many as ``retention`` allows, and the first of each kind.

    Raises:
        UserError: retention is not in (0, 1].
    """
    _check(retention)
    return map_from_first_of_order(order, num_kept(len(order), retention), kinds)


def map_from_first_of_order(order: Sequence[int], number: int, kinds: Kinds | None = None) -> tuple[int, ...]:
    """The first ``number`` layers of an order keep a cache, and the first of each kind."""
    return map_from_cached_layers(len(order), {*order[:number], *first_layers(len(order), kinds)}, kinds)


def _check(retention: float) -> None:
    if not 0.0 < retention <= 1.0:
        raise UserError(f"retention must lie in (0, 1], got {retention}")


def num_kept(num_layers: int, retention: float) -> int:
    """How many layers keep their cache where a part of it is kept: rounded, halves up, and at least one."""
    return max(1, int(retention * num_layers + 0.5))


def validate_order(order: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Check an order of the layers in which they keep their cache, the most needed first.

    Raises:
        UserError: it does not name each layer once, or begins with another than layer 0.
    """
    if sorted(order) != list(range(num_layers)):
        raise UserError(f"an order of layers must name each of 0..{num_layers - 1} once, got {list(order)}")
    if order[0] != 0:
        raise UserError(f"an order of layers must begin with layer 0, which cannot borrow, got {list(order)}")
    return tuple(order)


def groups_of(num_layers: int, group_size: int) -> tuple[int, ...]:
    """The map of uniform groups of ``group_size`` layers, each led by its first layer."""
    return tuple(layer - layer % group_size for layer in range(num_layers))


def validate_sharing_map(
    kv_source_layers: Sequence[int], num_layers: int, kinds: Kinds | None = None
) -> tuple[int, ...]:
    """Check an explicit deployment map ``kv_source_layers[l] <= l`` whose sources own their cache.

    Raises:
        UserError: the length is wrong, a source comes later than its reader, is itself a sharer, or of another kind.
    """
    if len(kv_source_layers) != num_layers:
        raise UserError(f"kv_source_layers has {len(kv_source_layers)} entries for a model of {num_layers} layers")
    for layer, source in enumerate(kv_source_layers):
        if not 0 <= source <= layer:
            raise UserError(f"kv_source_layers[{layer}] is {source}, which is not one of 0..{layer}")
        if kv_source_layers[source] != source:
            raise UserError(
                f"kv_source_layers[{layer}] is {source}, but layer {source} keeps no cache of its own "
                f"(it uses that of layer {kv_source_layers[source]})"
            )
    check_kinds(kv_source_layers, kinds)
    return tuple(kv_source_layers)
