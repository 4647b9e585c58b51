"""Processes, devices, threads and how they start and stop together. Knows nothing about training."""
