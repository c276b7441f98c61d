"""One file a backend; packages are imported inside."""
