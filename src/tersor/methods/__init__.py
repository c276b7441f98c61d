"""One file a method; arithmetic on one site."""
