"""The loop of a search: what is asked is evaluated, recorded and told."""
