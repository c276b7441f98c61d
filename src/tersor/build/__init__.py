"""Lowers a graph through a backend."""
