"""Loads an artifact and runs it; needs only its backend."""

from tersor.runtime.guards import Guards
from tersor.runtime.load import load_runner
from tersor.runtime.runner import Executable, Runner

__all__ = ["Executable", "Guards", "Runner", "load_runner"]
