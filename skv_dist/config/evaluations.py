"""Whether a run can measure what it is asked to: the losses and scores that it has, and answers in its layout."""

from skv_dist.config.run import RunConfig
from skv_dist.config.source_names import source_names
from skv_dist.config.train import SCORES
from skv_dist.errors import UserError


def check_best(config: RunConfig) -> None:
    """Raises UserError where a training run cannot tell which of its checkpoints is best."""
    evaluation = config.eval
    if evaluation.patience is not None and evaluation.best is None:
        raise UserError(f"eval.patience is {evaluation.patience}, but eval.best is not set: name an evaluation there")
    if evaluation.best is None:
        return
    names = measured(config)
    if evaluation.best not in names:
        without = "" if evaluation.questions is not None else ", eval.questions"
        raise UserError(
            f"eval.best '{evaluation.best}' is not measured: take one of {', '.join(names)} (eval.retention{without})"
        )
    if not evaluation.every:
        raise UserError(
            f"eval.best is '{evaluation.best}', but eval.every is 0: set eval.every, or leave eval.best out"
        )


def measured(config: RunConfig) -> list[str]:
    """Names of what each evaluation of a run gives, as `eval.best` has them: losses, those by source where there are
    several, and scores of answers."""
    evaluation, data = config.eval, config.data
    sizes = [f"{retention:.2f}" for retention in evaluation.retention]
    sources = source_names(data.validation_sources or data.sources)
    by_source = [f"loss@{size}/{source}" for size in sizes for source in sources] if len(sources) > 1 else []
    kinds = SCORES if evaluation.questions is not None else ()
    return [
        *(f"loss@{size}" for size in sizes),
        *by_source,
        *(f"{kind}@{size}" for kind in kinds for size in sizes),
    ]


def check_questions(config: RunConfig) -> None:
    """Raises UserError where a training run cannot answer ``eval.questions`` in its layout."""
    if config.eval.questions is None:
        return
    try:
        check_decodable(config)
    except UserError as error:
        raise UserError(
            f"eval.questions: {error}, or leave eval.questions out and ask checkpoints by skv-eval questions"
        ) from error
    # DeepSpeed's stage 3 gathers weights in every forward, of which replicas make as many as their answers are long.
    if config.parallel.zero_stage == 3 and config.parallel.engine == "deepspeed":
        raise UserError(
            "eval.questions and parallel.zero_stage: 3 do not work together where parallel.engine is deepspeed: set "
            "parallel.engine=fsdp or parallel.zero_stage=2, or leave eval.questions out and ask checkpoints by "
            "skv-eval questions"
        )
    if not config.eval.every:
        raise UserError("eval.questions is given, but eval.every is 0: set eval.every, or leave eval.questions out")


def check_decodable(config: RunConfig) -> None:
    """Raises UserError where nothing can be decoded with a K/V cache in this layout, naming the key."""
    parallel = config.parallel
    if parallel.sequence_parallel:
        raise UserError(
            "decoding with a K/V cache and parallel.sequence_parallel: true do not work together: set "
            "parallel.sequence_parallel=false"
        )
    if parallel.virtual_pipeline > 1:
        raise UserError(
            f"decoding with a K/V cache and parallel.virtual_pipeline {parallel.virtual_pipeline} do not work "
            "together: set parallel.virtual_pipeline=1"
        )
