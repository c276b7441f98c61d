"""Vocabulary that every part speaks: records, targets, errors, units, the registry and the store; plain Python."""
