"""One run from its start to its summary. Imports every other room."""
