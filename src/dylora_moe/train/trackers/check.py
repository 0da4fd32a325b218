"""Trackers that were asked for must be there: found out before a run begins, without importing them."""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from dylora_moe.errors import ConfigError

_NO_SERVER = ("offline", "dryrun", "disabled")


def check_trackers(report_to: Sequence[str], environ: Mapping[str, str] = os.environ) -> None:
    """Look for the package of each tracker, and for the key of W&B.

    Raises:
        ConfigError: One is missing.
    """
    for name in report_to:
        if find_spec(name) is None:
            raise ConfigError(
                f"report_to {name} needs the package {name}, which is not installed. Install it (pip install {name}, "
                f'or pip install "dylora-moe[trackers]" for all), or leave {name} out of report_to.'
            )
    if "wandb" in report_to:
        check_wandb_key(environ)


def check_wandb_key(environ: Mapping[str, str] = os.environ) -> None:
    """W&B's key comes from the environment only, so that it can be in no file of a run.

    Raises:
        ConfigError: There is none, and W&B is not offline.
    """
    known = environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE")
    if not known and environ.get("WANDB_MODE") not in _NO_SERVER:
        raise ConfigError(
            "wandb needs WANDB_API_KEY in the environment, which is not set. Set it (https://wandb.ai/authorize shows "
            "yours), or set WANDB_MODE=offline to write files that `wandb sync` sends later."
        )
