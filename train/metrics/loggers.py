"""Where a run's curves are drawn besides its ledger, which alone is complete: TensorBoard, and Weights & Biases."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, Protocol

from phi1.atomic import write_file
from phi1.train.runtime.launch import RunError, say


class Logger(Protocol):
    """Draws curves."""

    name: str

    def draw(self, step: int, figures: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """TensorBoard's files in a folder. Raises ImportError where it is not installed."""

    name = "TensorBoard"

    def __init__(self, folder: Path, finished: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=finished + 1)

    def draw(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, the same one whenever the run goes on. WANDB_MODE, WANDB_PROJECT and the like hold."""

    name = "wandb"

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        try:
            folder.mkdir(exist_ok=True)
            known = folder / "id"
            if not known.exists() or not known.read_text(encoding="utf-8"):
                write_file(known, secrets.token_hex(4))
            self._run = wandb.init(dir=str(folder.parent), id=known.read_text(encoding="utf-8"), resume="allow",
                                   name=folder.parent.name, config=config)
        except Exception as error:  # a missing login, no network, a full disk: each a class of wandb's own
            raise RunError(f"run.wandb: {' '.join(str(error).split())}") from None

    def draw(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


def open_loggers(folder: Path, finished: int, config: dict[str, Any], *, tensorboard: bool, wandb: bool) \
        -> list[Logger]:
    """The loggers that are asked for; TensorBoard only where it is installed.

    Args:
        folder: the run's.
        finished: steps after which what was drawn before no longer holds.
        config: the resolved recipe.
        tensorboard, wandb: whether to draw there.

    Raises:
        RunError: wandb does not start.
    """
    loggers: list[Logger] = []
    if tensorboard:
        try:
            loggers.append(TensorBoard(folder / "tensorboard", finished))
        except ImportError:
            pass  # asked for by default, so that it may be absent
        except Exception as error:  # a full disk, or packages that do not fit it: no reason to train nothing
            say(f"warning: TensorBoard: {error}; it is left out")
    if wandb:
        loggers.append(WandB(folder / "wandb", config))
    return loggers
