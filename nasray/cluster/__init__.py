"""Connecting to a Ray cluster, and placing each role on its nodes."""
