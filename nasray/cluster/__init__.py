"""How nasray reaches a Ray cluster, and where in it each role runs."""
