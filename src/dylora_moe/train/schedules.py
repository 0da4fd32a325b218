"""Step -> factor of the learning rate, for the schedule that transformers does not have."""

from collections.abc import Callable


def two_phase(*, num_steps: int, warmup_steps: int, seeding_ratio: float, factor: float) -> Callable[[int], float]:
    """A seeding phase at the full rate after a linear warm-up, then a consolidation phase at `factor` of it.

    Args:
        num_steps: Optimizer steps of the run.
        warmup_steps: Of them, those in which the rate rises from 0; part of the seeding phase.
        seeding_ratio: Share of the steps in the seeding phase.
        factor: Of the consolidation phase.
    """
    seeding_steps = max(round(num_steps * seeding_ratio), 1)

    def multiply(step: int) -> float:
        if step >= seeding_steps:
            return factor
        return min(1.0, step / warmup_steps) if warmup_steps else 1.0

    return multiply
