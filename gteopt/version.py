"""The version of gteopt, read by the package, by artifacts and by the build backend."""

__version__ = "0.1.0"
