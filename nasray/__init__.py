"""nasray: neural architecture search of image classifiers, distributed by Ray.

The names below are those of docs/api.md. They are imported when first used.
"""

from typing import TYPE_CHECKING, Any

from nasray.version import __version__ as __version__

if TYPE_CHECKING:
    from nasray.api import (
        DesignSpace,
        RunDirectory,
        benchmark,
        check_data,
        import_data,
        load,
        load_supernet,
        open,
        predict,
        run,
        space,
    )

__all__ = [
    "DesignSpace",
    "RunDirectory",
    "benchmark",
    "check_data",
    "import_data",
    "load",
    "load_supernet",
    "open",
    "predict",
    "run",
    "space",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from nasray import api

        return getattr(api, name)
    raise AttributeError(f"module 'nasray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
