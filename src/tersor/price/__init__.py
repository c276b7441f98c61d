"""Whole builds on the backend, node times and fitted tables."""
