"""Trains what compression has left towards the original's own outputs, without labels."""
