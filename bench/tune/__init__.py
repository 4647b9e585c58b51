"""The search for tiles. Imports every other room."""
