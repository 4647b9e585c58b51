"""Numbers that a run reports: ledger, loggers, progress, MFU, traces. Imports step and the rooms below it."""
