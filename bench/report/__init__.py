"""Tables, plots and comparisons of results files. Imports cases and the rooms below it."""
