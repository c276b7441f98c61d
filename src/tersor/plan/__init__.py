"""Candidates, prices and a target become a plan."""
