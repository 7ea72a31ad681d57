"""Low-rank additions to the weights of a layer (``lora``)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import parametrize

from skv_dist.config.run import RunConfig

FUSED: Mapping[str, Sequence[str]] = {
    "linear_qkv": ("q", "k", "v"),
    "linear_proj": ("o",),
    "linear_fc1": ("gate", "up"),
    "linear_fc2": ("down",),
}
"""What each linear module of a layer is made of, by the first part of its name in Hugging Face models."""


@dataclass(frozen=True)
class Rows:
    """Where the rows of one projection lie in the fused weight: in each of ``groups``, ``height`` rows.

    The groups of all projections of a module follow one another: (group 0 of each, group 1 of each, ...).
    """

    groups: int
    height: int


def rows_of(module: str, rows: int, run: RunConfig) -> dict[str, Rows]:
    """How a fused weight with so many rows is put together.

    Args:
        module: a key of `FUSED`.
        rows: all of them, or those of a tensor-parallel rank, which holds whole groups of QKV, and a share of either
            half of gate and up.
    """
    model = run.model
    if module == "linear_qkv":
        heads, width = model.num_attention_heads // model.num_kv_heads, model.kv_channels
        groups = rows // ((heads + 2) * width)
        return {"q": Rows(groups, heads * width), "k": Rows(groups, width), "v": Rows(groups, width)}
    if module == "linear_fc1":
        return {"gate": Rows(1, rows // 2), "up": Rows(1, rows // 2)} if model.gated else {"up": Rows(1, rows)}
    return {FUSED[module][0]: Rows(1, rows)}


def added(
    a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], parts: Mapping[str, Rows], weight: torch.Tensor
) -> torch.Tensor:
    """The sum of the products B A, in the place of each projection: float32, of the shape of ``weight`` [rows, in].

    Args:
        a: by projection [rank, in]; those without an adapter are left out.
        b: likewise [rows of the projection, rank].
    """
    blocks = []
    for name, rows in parts.items():
        if name in a:
            product = b[name].float() @ a[name].float()
        else:
            product = weight.new_zeros(rows.groups * rows.height, weight.shape[1], dtype=torch.float32)
        blocks.append(product.view(rows.groups, rows.height, -1))
    return torch.cat(blocks, dim=1).flatten(0, 1)


_WITH_ADAPTER: dict[type, type] = {}  # class of a module -> that of one whose weight has an adapter


class LowRank(torch.nn.Module):
    """Gives a linear module its weight with what was learned added to it, rounded once: what an export holds.

    Parameters are called as in peft: ``lora_A.q`` [rank, in] and ``lora_B.q`` [rows, rank].
    """

    def __init__(self, parts: Mapping[str, Rows], targets: Sequence[str], like: torch.Tensor, run: RunConfig) -> None:
        super().__init__()
        self._parts, self._scale = parts, run.lora.scale
        made: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        rank, chosen = run.lora.rank, [name for name in parts if f"{name}_proj" in targets]
        a = {name: torch.nn.Parameter(torch.zeros(rank, like.shape[1], **made)) for name in chosen}
        b = {
            name: torch.nn.Parameter(torch.zeros(parts[name].groups * parts[name].height, rank, **made))
            for name in chosen
        }
        self.lora_A, self.lora_B = torch.nn.ParameterDict(a), torch.nn.ParameterDict(b)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """weight [rows, in] -> the same shape and dtype."""
        products = added(dict(self.lora_A.items()), dict(self.lora_B.items()), self._parts, weight)
        return (weight.float() + self._scale * products).to(weight.dtype)


def add_adapters(layers: Sequence[Any], run: RunConfig) -> None:
    """Put an adapter on each weight of some `RoutedLayer`s that ``lora`` asks for."""
    for layer in layers:
        for name, module in list(layer.named_modules()):
            kind = name.rpartition(".")[2]
            targets = [f"{part}_proj" for part in FUSED.get(kind, ()) if f"{part}_proj" in run.lora.target_modules]
            if targets:
                parts = rows_of(kind, module.weight.shape[0], run)
                adapter, plain = LowRank(parts, targets, module.weight, run), type(module)
                parametrize.register_parametrization(module, "weight", adapter, unsafe=True)
                # Torch makes a class for each module. One that all layers have in common lets them share what
                # torch.compile makes of a layer, which would otherwise give up on a model of some depth.
                module.__class__ = _WITH_ADAPTER.setdefault(plain, type(module))


def plain_name(name: str) -> str:
    """The name of a parameter without what torch's parametrizations put into it."""
    return name.replace(".parametrizations.weight.original", ".weight").replace(".parametrizations.weight.0.", ".")


def is_adapter(name: str) -> bool:
    """Whether the parameter with this global name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name
