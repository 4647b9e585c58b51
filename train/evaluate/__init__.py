"""Held-out loss, samples and HumanEval of a model under training. Imports step and the rooms below it."""
