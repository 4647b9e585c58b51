"""A trainer on disk. Imports step and the rooms below it."""
