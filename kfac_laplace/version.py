"""The version of this library, where files of it can say it."""

__version__ = "0.3.0"
