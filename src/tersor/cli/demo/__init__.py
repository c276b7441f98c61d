"""Real models with real inputs that install offline, their int8 peers, and the table that compares them."""
