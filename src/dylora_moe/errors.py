"""Every error this package raises on purpose: one base class, each child also a standard exception.

A message says what must hold, what was got, and what to do about it.
"""


class DyLoraError(Exception):
    """Base of all errors meant for the user; the command line prints its message without a traceback."""


class ConfigError(DyLoraError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(DyLoraError, ValueError):
    """A data file, row or data set name that cannot be used."""


class BaseModelError(DyLoraError, RuntimeError):
    """A base model or its tokenizer that cannot be loaded or is not usable."""


class CacheError(DyLoraError, RuntimeError):
    """A disk without room, or a cache folder that cannot be written."""


class TunerError(DyLoraError, ValueError):
    """An operation on experts or routing that makes no sense for the model at hand."""


class RunError(DyLoraError, RuntimeError):
    """A run folder that is missing, broken, finished already or in use by another process."""


class GeneratorError(DyLoraError, RuntimeError):
    """A generator that cannot answer, however often it is asked."""


class SandboxError(DyLoraError, RuntimeError):
    """Code that a model wrote cannot be run safely on this machine, or a sandbox failed before the code began."""


class ExportError(DyLoraError, RuntimeError):
    """What other programs should read cannot be written, is not what its source is, or cannot be sent."""


class ServeError(DyLoraError, RuntimeError):
    """A request that cannot be taken or finished, or a server that cannot start."""
