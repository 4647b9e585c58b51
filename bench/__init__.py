"""Benchmarks: what phi1 and its peers take on the same inputs."""
