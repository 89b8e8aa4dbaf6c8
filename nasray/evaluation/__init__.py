"""Evaluation of a supernet's subnets."""
