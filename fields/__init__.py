"""FIELDS: single-image 3D face reconstruction with supervised expression on FLAME-format heads."""

__version__ = "0.1.0"

_PUBLIC = {
    "Head": "fields.head.flame",
    "HeadParams": "fields.types",
    "Prediction": "fields.predictions",
    "Reconstructor": "fields.reconstructor",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name):
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'fields' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
