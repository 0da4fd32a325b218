"""Every error this package raises on purpose: one base class, each child also a standard exception.

A message says what must hold, what was got, and what to do about it.
"""

from collections.abc import Sequence
from typing import Any


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


class OtherFailed(RunError):
    """Another process of the same run came to its end, so that this one cannot go on; that one says why."""


class OnlyHere(RunError):
    """What one process of a run cannot do, in the middle of what all do: there is no place at which all could end."""


class NotFinite(RunError):
    """The gradients of a step are no numbers; the step was not made.

    Attributes:
        batches: input_ids of its batches, (batch, tokens) each.
    """

    def __init__(self, step: int, norm: float, batches: Sequence[Any]) -> None:
        super().__init__(f"The gradients of step {step} must be finite, got a norm of {norm}.")
        self.batches = batches


class GeneratorError(DyLoraError, RuntimeError):
    """A generator that cannot answer, however often it is asked."""


class SandboxError(DyLoraError, RuntimeError):
    """Code that a model wrote cannot be run safely on this machine, or a sandbox failed before the code began."""


class ExportError(DyLoraError, RuntimeError):
    """What other programs should read cannot be written, is not what its source is, or cannot be sent."""


class ServeError(DyLoraError, RuntimeError):
    """A request that cannot be taken or finished, or a server that cannot start."""


class CloudError(DyLoraError, RuntimeError):
    """A job that a cloud cannot run, that it refuses, or that ended badly."""
