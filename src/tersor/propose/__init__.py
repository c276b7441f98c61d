"""Asks every method for candidates at every site and measures their errors."""
