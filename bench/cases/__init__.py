"""The registry of what is timed. Imports harness and peers."""
