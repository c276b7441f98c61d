"""Pure functions from records to JSON and terminal text."""
