"""What to say about a setting besides what it means: its unit, which values usually serve, what goes up and down."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Stands in the annotation of a setting: `batch_size: Annotated[int, Advice(unit="rows", high=16, more=...)]`.

    Attributes:
        values: What may be given, in words, where the type alone does not say it: follows "must be".
        unit: Of the value.
        low: A lower value is remarked on, not refused; 0 is not, where it switches the thing off.
        high: A higher value is remarked on, not refused.
        more: What a higher value does, in words that follow a colon.
        less: What a lower value does, likewise.
        note: What else there is to know, in sentences: which other setting goes with it, where a figure comes from.
    """

    values: str = ""
    unit: str = ""
    low: float | None = None
    high: float | None = None
    more: str = ""
    less: str = ""
    note: str = ""
