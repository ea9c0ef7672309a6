"""The library's errors: one root, one class for each builtin that fits, one formatter.

Every message says what is wrong, where, what was got, and the remedy.
"""


class KfacLaplaceError(Exception):
    """Root of every error that this library raises on purpose.

    Args:
        what: what is wrong, as a sentence without its full stop.
        where: name of the parameter, layer or argument concerned.
        got: the offending value, in words or numbers.
        remedy: what to do about it.
    """

    def __init__(self, what: str, *, where: str = "", got: object = None, remedy: str = ""):
        parts = [f"{where}: {what}" if where else what]
        if got is not None:
            parts.append(f"got {got}")
        if remedy:
            parts.append(remedy)
        super().__init__(". ".join(part.rstrip(".") for part in parts) + ".")


class InvalidValue(KfacLaplaceError, ValueError):
    """A value outside its range: shapes, options, empty loaders, targets, non-finite numbers."""


class InvalidType(KfacLaplaceError, TypeError):
    """An object of the wrong type or dtype."""


class NotFitted(KfacLaplaceError, RuntimeError):
    """A question that only a fitted posterior or a stepped tuner can answer."""


class UnsupportedUse(KfacLaplaceError, RuntimeError):
    """A model, or a use of a parameter, that the curvature backend cannot treat correctly."""


class OtherRankFailed(KfacLaplaceError, RuntimeError):
    """Another process of a distributed run has failed; its message is in this one's."""


class MissingPackage(KfacLaplaceError, ImportError):
    """An optional package that is not installed, or not in the version that is wanted."""
