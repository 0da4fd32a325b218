"""How data sets become rows: the settings that decide which rows there are, and what is learned of them."""

from dataclasses import dataclass
from typing import get_args

from dylora_moe.data.tokenize import Learn, Overlong
from dylora_moe.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Named and meant as in `RunConfig`.

    Attributes:
        max_length: The most tokens a row may have.
        overlong: What becomes of longer rows: `error`, `drop`, `truncate` or `split`.
        learn: Which tokens are labels: every answer of a conversation, its last answer, or all of its text.
        validation_split: Fraction of the rows to validate on, where there is no official split.
        training_subset: Percent of the training rows to use; a smaller share is part of a larger one.
        eval_subset: Percent of the validation rows to use.
        seed: Decides splits, subsets and synthetic examples.

    Raises:
        DataError: A value is out of its range.
    """

    max_length: int
    overlong: Overlong = "error"
    learn: Learn = "answers"
    validation_split: float = 0.1
    training_subset: float | None = None
    eval_subset: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.validation_split < 1:
            raise DataError(
                f"validation_split must be a fraction between 0 and 1, both excluded, got {self.validation_split}. "
                "Every domain is validated; 0.1 is usual."
            )
        for name in ("training_subset", "eval_subset"):
            percent = getattr(self, name)
            if percent is not None and not 0 < percent <= 100:
                raise DataError(f"{name} must be a percentage above 0 and up to 100, got {percent}.")
        if self.max_length < 2:
            raise DataError(f"max_length must be at least 2 tokens, got {self.max_length}.")
        for name, choices in (("overlong", get_args(Overlong)), ("learn", get_args(Learn))):
            if getattr(self, name) not in choices:
                raise DataError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
