"""Files of rows, and what reading a data set gives."""

import json
from dataclasses import fields
from types import SimpleNamespace

from dylora_moe.data.sources import (
    REGISTRY,
    draw_rows,
    parse_dataset_spec,
    read_source,
)


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def pairs(numbers):
    return [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in numbers]


def mbpp_rows(ids):
    return [{"text": f"task {n}", "code": f"x = {n}", "task_id": n, "test_list": ["assert x"]} for n in ids]


def load(value, seed=0, registry=REGISTRY):
    """What reading a data set gives, with the examples of each split."""
    spec = parse_dataset_spec(value, registry)
    splits = {"train": [], "validation": [], "test": [], "unused": []}
    bad_rows = []
    record = read_source(
        spec,
        seed=seed,
        registry=registry,
        add=lambda item: splits[item.split].append(item.example),
        on_bad=lambda domain, bad: bad_rows.append(bad),
    )
    chosen = splits["train"]
    if not record.is_synthetic:
        chosen = [chosen[place] for place in draw_rows(spec, len(chosen), seed=seed)]
    assert len(bad_rows) == record.num_bad_rows
    return SimpleNamespace(
        **{field.name: getattr(record, field.name) for field in fields(record)},
        examples=tuple(chosen),
        validation=tuple(splits["validation"]) or None,
        test=tuple(splits["test"]) or None,
        num_unused=len(splits["unused"]),
        bad_rows=tuple(bad_rows),
    )
