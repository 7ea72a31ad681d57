"""The model against a plain reference: loss and every gradient, through borrowed K/V included."""

from typing import Any

import numpy as np
import torch

from skv_dist.config.policy import build_policy
from skv_dist.config.run import RunConfig
from skv_dist.routing.draw import DrawKey
from tests.model.plain import routed_logits
from tests.support.batches import global_batch
from tests.support.jobs import parity
from tests.support.settings import config


def expected(settings: dict[str, Any], parameters: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of the global batch of step 0 in plain torch, in double precision."""
    run = RunConfig.model_validate(settings)
    policy = build_policy(run.routing, run.model.num_layers)
    weights = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in parameters.items()}
    total, counted = torch.zeros([], dtype=torch.float64), 0.0
    borrowed = 0
    for batch in global_batch(0):
        table = policy.table(DrawKey(run.train.seed, 0, batch.index))
        borrowed += sum(source != layer for layer, source in enumerate(table))
        logits = routed_logits(weights, run.model, batch.tokens, table)
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        total = total + (losses * batch.loss_mask.flatten()).sum()
        counted += batch.loss_mask.sum().item()
    assert borrowed > 4 or run.routing.policy == "none"
    loss = total / counted
    loss.backward()
    return loss.item(), {name: weight.grad.numpy() for name, weight in weights.items()}  # type: ignore[union-attr]


def test_loss_and_every_gradient_equal_the_plain_reference(workers: Any) -> None:
    for tied in (False, True):
        settings = config(parallel={"zero_stage": 0}, model={"tie_embeddings": tied})
        found = workers(1)(parity.train, settings, 0)[0]
        loss, gradients = expected(settings, found["parameters"])
        assert abs(found["losses"][0] - loss) < 1e-6 * loss
        assert found["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = np.abs(found["gradients"][name] - gradient).max() / np.abs(gradient).max()
            assert error < 1e-5, f"{name} is off by {error:.1e}"


def test_gradients_differ_where_borrowed_kv_is_cut_off(workers: Any) -> None:
    """The comparison above can fail: without the gradient through borrowed K/V, sources learn something else."""
    settings = config(parallel={"zero_stage": 0})
    found = workers(1)(parity.train, settings, 0)[0]
    dense = config(parallel={"zero_stage": 0}, routing={"policy": "none", "cross_prob": 0.0})
    _, gradients = expected(dense, found["parameters"])
    name = "layers.0.self_attention.linear_qkv.weight"
    error = np.abs(found["gradients"][name] - gradients[name]).max() / np.abs(gradients[name]).max()
    assert error > 1e-2
