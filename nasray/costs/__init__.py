"""What an architecture costs: operations, parameters, latency."""
