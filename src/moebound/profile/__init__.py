"""Which experts does a task use? Counts, balance, figures, and traces for the cache's simulator."""
