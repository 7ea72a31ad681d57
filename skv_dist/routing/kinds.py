"""Kinds of layers: only layers of one kind may share K/V.

A layer with a window has no use for what a layer without one would keep, nor one without rotary positions for keys that
were rotated. A kind is anything that can be compared; models with one kind of layer need none of this.
"""

from collections.abc import Hashable, Iterable, Sequence

from skv_dist.errors import UserError

Kinds = Sequence[Hashable]  # of each layer


def layers_by_kind(layers: Iterable[int], kinds: Kinds | None) -> list[tuple[int, ...]]:
    """``layers``, in ascending order, by their kind; without kinds all of them together."""
    found: dict[Hashable, list[int]] = {}
    for layer in layers:
        found.setdefault(None if kinds is None else kinds[layer], []).append(layer)
    return [tuple(of_kind) for of_kind in found.values()]


def first_layers(num_layers: int, kinds: Kinds | None) -> list[int]:
    """The first layer of each kind, which has nobody to borrow from: it keeps its cache under every map."""
    return sorted(of_kind[0] for of_kind in layers_by_kind(range(num_layers), kinds))


def check_kinds(table: Sequence[int], kinds: Kinds | None) -> None:
    """Raises UserError where a layer borrows from one of another kind; naming the nearest map that may be."""
    for layer, source in enumerate(table):
        if kinds is not None and kinds[layer] != kinds[source]:
            raise UserError(
                f"kv_source_layers[{layer}] is {source}, but layer {layer} has {kinds[layer]} and layer {source} has "
                f"{kinds[source]}, and only layers of one kind share K/V: the nearest map that may be is "
                f"{' '.join(map(str, _nearest(table, kinds)))}"
            )


def _nearest(table: Sequence[int], kinds: Kinds) -> list[int]:
    """``table`` with each wrong source replaced by the nearest owner of the layer's own kind, if there is one."""
    nearest: list[int] = []
    for layer, source in enumerate(table):
        owners = [owner for owner in range(layer) if nearest[owner] == owner and kinds[owner] == kinds[layer]]
        stays = source == layer or source in owners
        nearest.append(source if stays else max(owners, default=layer))
    return nearest
