"""Finetune a phi-1: `torchrun --standalone train/finetune.py --model.init FOLDER [--section.key value ...]`.

The trainer of `train/pretrain.py` with phi-1's second stage as its recipe (train/configs/phi1.toml; arXiv 2306.11644,
section 2.3). It starts from the weights in --model.init and saves a checkpoint every 1,000 steps. The one with the
lowest validation loss is exported; with --checkpoint.best humaneval, the one that solves most of --eval.humaneval.
"""

from __future__ import annotations

from pathlib import Path

from phi1.train.pretrain import main
from phi1.train.runtime.launch import leave

RECIPE = Path(__file__).parent / "configs" / "phi1.toml"

if __name__ == "__main__":
    leave(main(RECIPE, __doc__))
