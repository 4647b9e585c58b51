"""The configuration of a run. Imports runtime."""
