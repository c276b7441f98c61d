"""A plan becomes a compressed graph, front to back."""
