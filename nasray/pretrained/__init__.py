"""Supernets that start from weights which somebody has trained: nasray's own, or published."""
