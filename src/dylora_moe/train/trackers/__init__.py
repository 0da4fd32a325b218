"""Trackers that also get a run's figures: TensorBoard, trackio, Weights & Biases, each in a process of its own.

Such a process can fail, hang, draw random numbers or be killed, and training does not notice.
"""

from dylora_moe.train.trackers.artifacts import fetch_checkpoint
from dylora_moe.train.trackers.check import check_trackers
from dylora_moe.train.trackers.messages import Sample
from dylora_moe.train.trackers.tracking import Trackers

__all__ = ["Sample", "Trackers", "check_trackers", "fetch_checkpoint"]
