"""Arguments, environment, exit codes and progress."""
