"""One small function for each op: how the labels of its inputs become those of its outputs."""
