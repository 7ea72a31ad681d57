"""ZeRO stages 1 to 3 through DeepSpeed, driven by our own loop and schedules.

DeepSpeed's defaults are meant for its own loop. Under another they train happily with wrong gradients
(docs/pitfalls.md): each setting below that cures one says so, and tests/parallel/test_faults.py takes the cures out one
by one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from skv_dist.config.run import RunConfig
from skv_dist.model.layer import RoutedLayer
from skv_dist.parallel.engines.base import Engine, Piece, Quantity, StepOutcome
from skv_dist.parallel.engines.optimizer import build_optimizer
from skv_dist.parallel.engines.tied import TiedHead
from skv_dist.parallel.initial_values import local_initial_values
from skv_dist.parallel.local_model import LocalModel, build_local_model, partitioned_shape
from skv_dist.parallel.processes.groups import model_parallel_unit

KEPT_WHOLE = 100_000  # elements: stage 3 gathers smaller parameters once a step instead of at each use


def deepspeed_config(run: RunConfig) -> dict[str, Any]:
    """DeepSpeed's configuration; the user never writes one."""
    bucket = run.parallel.zero_bucket_mb * 2**20 // 4
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": run.train.micro_batch_size,
        # DeepSpeed would divide gradients by this at every stage; our loss is scaled once, and step() is called once a
        # batch.
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # DeepSpeed clips at 1.0 where nothing is said.
        "gradient_clipping": run.optimizer.clip_grad_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
        # DeepSpeed's timer would wait for the GPU at every forward.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {
            "stage": run.parallel.zero_stage,
            "overlap_comm": run.parallel.overlap_comm,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_param_persistence_threshold": KEPT_WHOLE,
        },
    }
    if run.train.precision == "bf16":
        config["bf16"] = {"enabled": True}
        # Without these DeepSpeed adds up micro-batches, and replicas, in bf16.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


def keep_layers_in_order(zero: Any, model: LocalModel) -> None:
    """Hand DeepSpeed the gradients of a layer together, in the order of its parameters.

    DeepSpeed fills buckets with gradients as they arrive, and adds them up over the replicas by their place in the
    bucket. The backward of a compiled layer brings all of its gradients at once, and autograd then takes them in an
    order that depends on which K/V the layer borrowed: replicas with other routes would add up different parameters,
    without an error.
    """
    reduce = zero.reduce_ready_partitions_and_remove_grads
    together: dict[torch.nn.Parameter, list[torch.nn.Parameter]] = {}
    for chunk in model.routed_chunks():
        for layer in chunk.routed_layers():
            parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
            together.update(dict.fromkeys(parameters, parameters))
    arrived: dict[torch.nn.Parameter, tuple[Any, ...]] = {}

    def in_order(parameter: torch.nn.Parameter, *rest: Any) -> None:
        if parameter not in together:
            reduce(parameter, *rest)
            return
        if parameter in arrived:
            raise RuntimeError("the backward of a layer gave some of its parameters no gradient")
        arrived[parameter] = rest
        if all(other in arrived for other in together[parameter]):
            for other in together[parameter]:
                reduce(other, *arrived.pop(other))

    zero.reduce_ready_partitions_and_remove_grads = in_order


def is_valid_norm(norm: float) -> bool:
    """DeepSpeed reports a bad norm as -1 in some places, as infinity in others."""
    return math.isfinite(norm) and norm >= 0


class ZeroEngine(Engine):
    """A `DeepSpeedEngine` (not its `PipelineEngine`)."""

    def __init__(self, run: RunConfig, device: torch.device, *, initialize: bool) -> None:
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("ERROR")
        # On a CPU DeepSpeed would build a C++ operator for inference at start, which needs a compiler and is not used.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        config = deepspeed_config(run)
        self._stage = run.parallel.zero_stage
        self.forward_is_collective = self._stage == 3
        self.model = self._build_model(run, device, config)
        self.unset = set() if initialize else set(self.model.parameters())
        for parameter, value in local_initial_values(run, self.model) if initialize else ():
            self._write_copy(parameter, value)
        self.optimizer = build_optimizer(self.model.trainable(), run.optimizer, device.type == "cuda")
        self.optimizer.skip_update = self._must_skip
        self._asked_to_skip = False
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=self.model,
            optimizer=self.optimizer,
            config=config,
            mpu=model_parallel_unit(),
            dist_init_required=False,
        )
        if self._stage >= 2:  # stage 1 reduces in step, in the order of the parameters
            keep_layers_in_order(self._zero, self.model)
        self.tied = TiedHead(self.model, run)
        self.tied.refresh()
        # Of two backwards with no forward between them DeepSpeed would drop the gradient of the second
        # (docs/pitfalls.md).
        self.model.on_backward = self._zero.clear_backward_seen_flag

    def _build_model(self, run: RunConfig, device: torch.device, config: dict[str, Any]) -> LocalModel:
        """The model of this rank; with stage 3 in pieces from the start, so that no rank ever holds all of it."""
        import deepspeed

        if self._stage < 3:
            return build_local_model(run, device)
        # No dtype=: on a CPU, DeepSpeed 0.19.8 takes bf16 whatever is given there. It reads the configuration.
        context = deepspeed.zero.Init(
            data_parallel_group=parallel_state.get_data_parallel_group(),
            config_dict_or_path=config,
            mem_efficient_linear=False,
            remote_device=str(device.type),
        )
        model = build_local_model(run, device, context)
        for chunk in model.routed_chunks():
            if chunk.has_embedding and chunk.has_head and chunk.tie_embeddings:
                # The head reads a weight that belongs to the embedding: it must be gathered for the head as well.
                deepspeed.zero.register_external_parameter(chunk.output_layer, chunk.embedding.weight)
        if run.train.compile:
            # DeepSpeed's hooks on every module would cut a layer's graph at each of them.
            deepspeed.utils.set_z3_leaf_modules(model, [RoutedLayer])
        return model

    @torch.no_grad()
    def _write_copy(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """Set the working copy of a parameter; with stage 3 this replica's share of it."""
        if self._stage < 3:
            parameter.data.copy_(value)
            return
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        _set_partition(parameter.ds_tensor, value)  # type: ignore[attr-defined]
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
            parameter.data.copy_(value)  # DeepSpeed keeps small parameters whole from their first use on

    def _call(self, function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        return self._engine(function, *args)

    def set_clip_grad_norm(self, limit: float) -> None:
        for name in ("clip_grad", "_clip_grad"):  # stages 1 to 3, and stage 1's optimizer for bf16
            if hasattr(self._zero, name):
                setattr(self._zero, name, limit)

    def _norm(self) -> float:
        norm = self._zero._global_grad_norm
        return float("nan") if norm is None else float(norm)

    def _must_skip(self) -> bool:
        return self._asked_to_skip or not is_valid_norm(self._norm())

    def _update(self, skip_update: torch.Tensor | bool) -> StepOutcome:
        self._asked_to_skip = bool(skip_update)
        self._engine.step()
        norm = self._norm()
        if getattr(self._zero, "overflow", False):
            norm = float("inf")
        return StepOutcome(torch.tensor(norm), torch.tensor(not self._asked_to_skip and is_valid_norm(norm)))

    def _masters(self) -> Sequence[torch.Tensor]:
        if self._stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        return [weights for _, weights in self._flat_groups()]

    def _flat_groups(self) -> Iterator[tuple[list[torch.nn.Parameter], torch.Tensor]]:
        """Stages 1 and 2: the parameters of each group, and this rank's part of their fp32 weights end to end."""
        zero = self._zero
        if hasattr(zero, "fp32_groups_flat_partition"):  # BF16_Optimizer: stage 1, bf16, fp32 accumulation
            return zip(zero.bf16_groups, zero.fp32_groups_flat_partition)
        return zip(zero.bit16_groups, zero.single_partition_of_fp32_groups)

    def prepare_moments(self) -> None:
        super().prepare_moments()
        if self._stage == 3:
            return
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        # Lets each parameter find its piece of the moments. DeepSpeed does so once, where it may be too early.
        for parameters, weights in self._flat_groups():
            lazy_init_hp_params_optimizer_state(parameters, weights, self.optimizer.state)

    def read(self, parameter: torch.nn.Parameter, quantity: Quantity) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not parameter.requires_grad:
            return self._copy_of(parameter)
        if quantity is Quantity.WEIGHT:
            return safe_get_full_fp32_param(parameter).detach()
        return safe_get_full_optimizer_state(parameter, quantity.value).detach()

    def own_piece(self, parameter: torch.nn.Parameter, quantity: Quantity) -> Piece | None:
        key = None if quantity is Quantity.WEIGHT else quantity.value
        if self._stage == 3:
            if parameter.requires_grad:
                partition, _ = self._zero._get_fp32_opt_state_partition(parameter, False, optim_state_key=key)
            else:
                partition = parameter.ds_tensor.float()  # type: ignore[attr-defined]
            begin = partition.numel() * self._zero._get_param_partition_rank(parameter)
            # The last partition is padded.
            return Piece(begin, partition[: max(0, torch.Size(partitioned_shape(parameter)).numel() - begin)])
        if not parameter.requires_grad:
            return None
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return Piece(0, torch.empty(0))
        return Piece(mapping.lp_fragment_address.start, mapping.get_hp_fragment(key))

    def _copy_of(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The weight of a frozen parameter, which has no master."""
        import deepspeed

        if self._stage < 3:
            return parameter.detach().float()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()

    @torch.no_grad()
    def _write(self, parameter: torch.nn.Parameter, quantity: Quantity, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if not parameter.requires_grad:
            pass  # has no master
        elif self._stage == 3:
            # DeepSpeed's ``safe_set_...`` reads past the end of a value that the replicas do not divide.
            key = None if quantity is Quantity.WEIGHT else quantity.value
            _set_partition(self._zero._get_fp32_opt_state_partition(parameter, False, optim_state_key=key)[0], value)
        elif quantity is Quantity.WEIGHT:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, quantity.value)
        if quantity is Quantity.WEIGHT:
            self._write_copy(parameter, value)

    def close(self) -> None:
        super().close()
        self._engine.destroy()


def _set_partition(partition: torch.Tensor, value: torch.Tensor) -> None:
    """Stage 3: copy this replica's share of a flattened value into its partition, which may have padding at its end."""
    begin = partition.numel() * parallel_state.get_data_parallel_rank()
    share = value.flatten()[begin : begin + partition.numel()]
    partition.view(-1)[: share.numel()].copy_(share)
