"""Whether a run can measure what it is asked to: the losses and scores that it has."""

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
    """Raises UserError where a training run would never answer ``eval.questions``."""
    if config.eval.questions is not None and not config.eval.every:
        raise UserError("eval.questions is given, but eval.every is 0: set eval.every, or leave eval.questions out")
