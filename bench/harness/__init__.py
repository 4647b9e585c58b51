"""How a case is checked, timed and recorded. Imports no other room of bench."""
