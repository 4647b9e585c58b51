"""Loggers that draw a run's curves: TensorBoard, and Weights & Biases. The ledger alone is complete."""

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
    """TensorBoard's files in a folder. Raises ImportError if it is not installed."""

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
    """A run of Weights & Biases, the same one after each resume. WANDB_MODE, WANDB_PROJECT and so on apply."""

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
        except Exception as error:  # a missing login, no network, a full disk: wandb has its own class for each
            raise RunError(f"run.wandb: {' '.join(str(error).split())}") from None

    def draw(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


def open_loggers(folder: Path, finished: int, config: dict[str, Any], *, tensorboard: bool, wandb: bool) \
        -> list[Logger]:
    """Open the requested loggers; TensorBoard only if it is installed.

    Args:
        folder: the run's.
        finished: finished steps; points of later steps are removed.
        config: the resolved recipe.
        tensorboard, wandb: True to log there.

    Raises:
        RunError: wandb does not start.
    """
    loggers: list[Logger] = []
    if tensorboard:
        try:
            loggers.append(TensorBoard(folder / "tensorboard", finished))
        except ImportError:
            pass  # requested by default, so it may be absent
        except Exception as error:  # a full disk, or packages that do not fit it: no reason to refuse the run
            say(f"warning: TensorBoard: {error}; it is left out")
    if wandb:
        loggers.append(WandB(folder / "wandb", config))
    return loggers
