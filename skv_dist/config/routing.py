"""``routing``: which layer's K/V each layer attends to while training."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from skv_dist.config.section import Section
from skv_dist.routing.found import read_found

Probability = Annotated[float, Field(ge=0, le=1)]
Step = Annotated[int, Field(ge=0)]
Layer = Annotated[int, Field(ge=0)]
Budget = Annotated[float, Field(gt=0, le=1)]
StepOrPart = Annotated[float, Field(ge=0)]


class RoutingConfig(Section):
    """Which layer's K/V each layer attends to while training. For every micro-batch a policy draws one route table, a
    pure function of train.seed, step and micro-batch, in which each layer uses its own K/V or borrows those of an
    earlier layer, its source. Evaluations do not read it: they use the fixed maps of eval.retention."""

    policy: Literal["none", "r_cla", "cla", "rd_cla", "suffix", "subset", "nested", "fixed"] = "r_cla"
    """The rule that makes the route tables.

    - none: each layer uses its own K/V (dense training).
    - r_cla: each layer but the first borrows with probability cross_prob, from a source drawn uniformly from all
      earlier layers (arXiv 2604.22782).
    - cla: fixed groups of group_size layers that share the K/V of their first layer.
    - rd_cla: as cla, but each layer follows the map with probability cross_prob only.
    - suffix: the last shared_layers layers share the K/V of the last layer before them.
    - subset: a random set of layers keeps its K/V, each other layer borrows from the nearest kept layer before it: the
      rule of deployment. keep_probs says how many are kept.
    - nested: as subset, but the sets are those that will be deployed: the first layers of order, as many as a budget
      of budgets allows.
    - fixed: the map kv_source_layers."""

    cross_prob: Probability | list[tuple[Step, Probability]] = 0.5
    """Probability that a layer borrows. Read by policies r_cla and rd_cla. Either one number or a schedule, a list of
    points [step, probability] with ascending steps (the first step of a run is 0), joined by straight lines and
    constant before the first and after the last point. 0: never."""

    window: int | None = Field(default=None, gt=0)
    """Largest distance in layers between a layer and its source. Read by policy r_cla. null: any earlier layer can be
    the source, as in the paper."""

    group_size: int = Field(default=2, gt=0)
    """Number of layers in a group, which share the K/V of its first layer. Read by policies cla and rd_cla. The last
    group may be smaller. 1: nothing is shared."""

    shared_layers: int = Field(default=1, ge=0)
    """How many of the last layers share. Read by policy suffix. Smaller than model.num_layers. 0: nothing is shared."""

    keep_probs: Literal["uniform"] | list[Probability] = [1.0, 0.5, 0.25]
    """Probabilities that a layer keeps its own K/V. Read by policy subset, which takes one of them at random for each
    micro-batch; the first layer always keeps its own. uniform: the probability is drawn uniformly from 0 to 1."""

    order: list[Layer] | None = None
    """Numbers of all layers, those that must keep their cache first. Layer 0 comes first, as nothing before it could
    lend. Needed by policy nested (or order_from) and refused with any other. Evaluations of a run with it keep the
    first layers of this order at each size of eval.retention, in place of uniform groups."""

    order_from: str | None = Field(default=None, min_length=1)
    """File that skv-eval search --json has written, whose order becomes order. Read once, at the start."""

    budgets: list[Budget] = [1.0, 0.5, 0.25]
    """Parts of the cache that are kept. Read by policy nested, which takes one of them at random for each
    micro-batch."""

    kv_source_layers: list[int] | None = None
    """The map itself: for each layer the number of the layer whose K/V it uses, its own number included. For 4 layers
    in groups of two that is [0, 0, 2, 2]. Needed by policy fixed and refused with any other. A source must not come
    later than the layer, and must use its own K/V."""

    always_own: list[Layer] = []
    """Numbers of layers that use their own K/V whatever the policy draws, for layers without which a model fails.
    Others may still borrow from them. In policy subset they belong to every set. Refused with policies fixed and
    nested."""

    within_stage: bool = False
    """Whether sources must lie on the same pipeline stage, so that no K/V cross between stages. For slow links. It
    CHANGES THE METHOD: the policy is applied to each stage on its own, the first layer of a stage never borrows, and
    results depend on parallel.pipeline. Without effect on one stage; refused with policy fixed."""

    start: StepOrPart = 0
    """Step from which layers may borrow; until then each uses its own K/V. Below 1: a part of train.steps. For every
    policy."""

    ramp: StepOrPart = 0
    """Number of steps behind start over which routing comes in. In each micro-batch of them a layer follows the policy
    with a probability that grows from 0 to 1, and otherwise uses its own K/V. Below 1: a part of train.steps."""

    stop: StepOrPart | None = None
    """Step from which each layer uses its own K/V again. Below 1: a part of train.steps. null: routing goes on to the
    end."""

    @model_validator(mode="before")
    @classmethod
    def _read_order(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("order_from"), str) or not given["order_from"]:
            return given
        if given.get("order") is not None:
            raise ValueError("order and order_from both say in which order layers keep their cache: leave one out")
        order = read_found(Path(given["order_from"]).expanduser()).order
        return {**given, "order": list(order), "order_from": None}

    @field_validator("start", "ramp", "stop")
    @classmethod
    def _whole_steps(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and value != int(value):
            raise ValueError("must be a whole number of steps, or a part of train.steps below 1")
        return value

    @field_validator("cross_prob")
    @classmethod
    def _steps_ascend(cls, value: object) -> object:
        if isinstance(value, list):
            steps = [step for step, _ in value]
            if not steps or any(b <= a for a, b in zip(steps, steps[1:])):
                raise ValueError("a schedule is a list of [step, probability] with ascending steps")
        return value

    @model_validator(mode="after")
    def _lists_not_empty(self) -> "RoutingConfig":
        if self.keep_probs == []:
            raise ValueError("keep_probs must not be empty")
        if not self.budgets:
            raise ValueError("budgets must not be empty")
        if self.order is not None and self.policy != "nested":
            raise ValueError(f"order is read by policy 'nested' only, but policy is '{self.policy}'")
        if self.kv_source_layers is not None and self.policy != "fixed":
            raise ValueError(f"kv_source_layers is read by policy 'fixed' only, but policy is '{self.policy}'")
        if self.always_own and self.policy in ("fixed", "nested"):
            key = "kv_source_layers" if self.policy == "fixed" else "order"
            raise ValueError(
                f"always_own and policy '{self.policy}' do not work together: write into {key} what these layers are "
                "to do, and leave routing.always_own out"
            )
        if self.within_stage and self.policy in ("fixed", "nested"):
            cure = "write kv_source_layers so that no source lies in an earlier stage, and "
            raise ValueError(
                f"within_stage: true and policy '{self.policy}' do not work together: "
                f"{cure if self.policy == 'fixed' else ''}set routing.within_stage=false"
            )
        return self
