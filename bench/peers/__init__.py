"""Other implementations that are timed beside ours. Imports harness."""
