"""The exported graph: contracts, normalisation, edits and its plain serial form."""
