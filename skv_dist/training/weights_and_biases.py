"""The numbers of a run in Weights & Biases, beside metrics.jsonl."""

import secrets
from pathlib import Path
from typing import Any

from skv_dist.checkpoint.folder import METRICS
from skv_dist.files import replace_text
from skv_dist.training.callbacks import Callback, Metrics

ID = "wandb_id"  # file in a run's folder: a run that goes on adds to the same record


class WeightsAndBiases(Callback):
    """The same numbers as in ``metrics.jsonl``, over the same steps. Where they cannot be sent, the run says so.

    Args:
        project: its name there.
        folder: of the run; its name is that of the run there, and its copy of what was sent lies in ``wandb``.
        config: of the run, complete.
    """

    def __init__(self, project: str, folder: Path, config: dict[str, Any]) -> None:
        self._project, self._folder, self._config = project, folder, config
        self._run: Any = None

    def on_start(self, step: int, steps: int) -> None:
        import wandb

        try:
            identity = self._folder / ID
            if not identity.exists():
                replace_text(identity, secrets.token_hex(8))
            self._run = wandb.init(
                project=self._project,
                name=self._folder.name,
                id=identity.read_text().strip(),
                resume="allow",
                dir=str(self._folder),
                config=self._config,
            )
            # Steps of their own: those of wandb never go back, which a run that goes on from a checkpoint does.
            self._run.define_metric("*", step_metric="step")
        except (wandb.Error, OSError) as error:
            self._give_up(error)

    def on_step(self, step: int, metrics: Metrics) -> None:
        if self._run is not None:
            import wandb

            try:
                self._run.log({"step": step, **metrics})
            except (wandb.Error, OSError) as error:
                self._give_up(error)

    def on_end(self) -> None:
        if self._run is not None:
            import wandb

            try:
                self._run.finish()
            except (wandb.Error, OSError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        print(f"train.wandb: {reason}; going on without, {METRICS} has the numbers", flush=True)
