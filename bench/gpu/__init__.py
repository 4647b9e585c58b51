"""Scripts for a machine with a GPU. Imports report and the rooms below it."""
