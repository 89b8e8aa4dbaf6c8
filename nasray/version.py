"""The version, for the package, its files and setup.py."""

__version__ = "0.1.0"
