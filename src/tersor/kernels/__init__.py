"""Kernels, each beside its plain-PyTorch reference; imported only where they run."""
