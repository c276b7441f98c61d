"""Tables against peers; results as JSON lines with machine, versions, seed and spread."""
