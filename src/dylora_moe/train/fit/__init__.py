"""What a run will need, before its first step: memory by part, disk, time; how to split batches so that it fits."""

from dylora_moe.train.fit.choose import MARGIN, Plan, Suggestion, choose_split, make_plan, split_rows, suggest
from dylora_moe.train.fit.estimate import Calibration, Estimate, Estimator, Workload, fused_adamw
from dylora_moe.train.fit.trace import Pass
from dylora_moe.train.fit.twin import Changes

__all__ = [
    "MARGIN",
    "Calibration",
    "Changes",
    "Estimate",
    "Estimator",
    "Pass",
    "Plan",
    "Suggestion",
    "Workload",
    "choose_split",
    "fused_adamw",
    "make_plan",
    "split_rows",
    "suggest",
]
