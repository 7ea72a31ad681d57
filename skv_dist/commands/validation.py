"""The held-out text of a checkpoint's run, for commands that measure a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING

from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError

if TYPE_CHECKING:  # torch is imported once the configuration is known to be good
    from skv_dist.data.continuing import Validation


def validation_samples(checkpoint: Path, run: RunConfig) -> "Validation":
    """The validation part of ``run.data``, held out by the rule of the checkpoint. None: it holds out nothing.

    Collective.
    """
    from skv_dist.checkpoint.folder import read_state
    from skv_dist.checkpoint.travelling import tokenizer_of
    from skv_dist.data.open import open_data
    from skv_dist.data.split import rule_of
    from skv_dist.parallel.processes.agree import on_first_rank
    from skv_dist.parallel.processes.rendezvous import wait_for_all

    tokenizer = tokenizer_of(checkpoint, run.data.tokenizer)
    rule = rule_of(read_state(checkpoint), run.data, run.checkpoint.allow_changed)
    _, validation = open_data(run.data, tokenizer, run.train.seed, wait_for_all, rule=rule, once=on_first_rank)
    return validation


def nothing_held_out(checkpoint: Path) -> UserError:
    from skv_dist.checkpoint.folder import CONFIG

    return UserError(f"{checkpoint / CONFIG}: data holds out no validation text: set data.validation_fraction")
