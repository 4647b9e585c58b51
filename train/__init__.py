"""Pretraining and its parts: data, configuration, step, checkpoint, ledger."""
