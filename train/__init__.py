"""Pretraining: configuration, data, steps, checkpoints, ledger, and the commands on them."""
