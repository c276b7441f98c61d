"""Original and built side by side."""
