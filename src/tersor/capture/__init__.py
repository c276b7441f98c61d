"""Brings what people have into the one representation."""
