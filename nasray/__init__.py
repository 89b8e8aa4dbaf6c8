"""nasray: neural architecture search of image classifiers, distributed by Ray."""

__version__ = "0.1.0"
