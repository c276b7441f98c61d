"""Streaming moments and samples over a graph, in one pass."""
