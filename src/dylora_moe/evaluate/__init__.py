"""Measuring a model: (model, rows) -> records. Prints nothing, trains nothing."""
