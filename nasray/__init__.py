"""nasray: neural architecture search of image classifiers, distributed by Ray."""

from nasray.version import __version__ as __version__
