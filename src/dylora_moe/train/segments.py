"""A data set of which nobody says where its skills begin: its rows in their order -> one skill for each stretch.

Written once into `segments/` of the stream's folder, as JSON lines, so that every later run has the same skills.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from dylora_moe.config import RunConfig
from dylora_moe.data.batching import TokenizedRow, pad_token_id
from dylora_moe.data.example import Example
from dylora_moe.data.registry import registry_of
from dylora_moe.data.source_reader import SourceReader
from dylora_moe.data.sources import parse_dataset_spec
from dylora_moe.data.stream import Skill, check_names
from dylora_moe.data.tokenize import tokenize_examples
from dylora_moe.errors import DataError, RunError
from dylora_moe.run_dir import SEGMENTS, RunDir
from dylora_moe.skills.changes import find_changes
from dylora_moe.skills.library import Source
from dylora_moe.skills.novelty import MIN_ROWS
from dylora_moe.train.features import read_features
from dylora_moe.train.session import Stages, build_model, load_run_base

_BOUNDS = "segments.json"
_WINDOW = 100
_SPARE = 3


def cut_streams(config: RunConfig, run: RunDir, skills: Sequence[Skill], stages: Stages) -> tuple[Skill, ...]:
    """Replace each skill that asks for it by those that its rows are found to consist of.

    Raises:
        DataError: Such a data set has too few rows, or one without a prompt.
    """
    found = tuple(part for skill in skills for part in _parts(config, run, skill, stages))
    check_names(found)
    return found


def _parts(config: RunConfig, run: RunDir, skill: Skill, stages: Stages) -> Iterator[Skill]:
    if not skill.finds_changes:
        yield skill
        return
    folder = f"{SEGMENTS}/{skill.name}"
    examples = _read(config, skill)
    digest = hashlib.sha256("".join(map(_line, examples)).encode()).hexdigest()
    if not (run / folder / _BOUNDS).is_file():
        _cut(config, run, skill, examples, digest, stages)
    bounds = run.read(f"{folder}/{_BOUNDS}")
    if bounds["sha256"] != digest:
        raise RunError(
            f"the rows of {skill.name} must be those that its skills were found in, and they are others. Bring them "
            "back, or choose another --run_name."
        )
    for name in bounds["skills"]:
        path = str((run / folder / f"{name}.jsonl").absolute())
        yield replace(skill, name=name, datasets=({"path": path, "domain": name},), finds_changes=False)


def _cut(
    config: RunConfig, run: RunDir, skill: Skill, examples: Sequence[Example], digest: str, stages: Stages
) -> None:
    folder = f"{SEGMENTS}/{skill.name}"
    stages.tell(f"Looking for changes of skill in the {len(examples):,} rows of {skill.name} ...")
    base = load_run_base(config, stages)
    rows = tokenize_examples(examples, base.tokenizer).rows
    cut = [
        TokenizedRow(input_ids=_head(row.input_ids, config), labels=_head(row.labels, config), domain=0) for row in rows
    ]
    source = Source(base=config.base_model, revision=base.resolved.revision, tap_layer=config.tap_layer)
    features = read_features(
        build_model(config, base, ["unused"]),
        cut,
        source,
        batch_size=config.eval_batch_size,
        pad_token_id=pad_token_id(base.tokenizer),
        tell=stages.tell,
    )
    # So that each has the rows for a decision when its validation rows are held out, and a few are left out.
    least = math.ceil(MIN_ROWS / (1 - config.validation_split)) + _SPARE
    changes = find_changes(
        features, least=least, window=max(_WINDOW, least), rate=config.false_growth_rate, seed=config.seed
    )
    bounds = [0, *changes, len(examples)]
    names = [f"{skill.name}_{number}" for number in range(1, len(bounds))]
    for name, start, stop in zip(names, bounds, bounds[1:], strict=False):
        run.write(f"{folder}/{name}.jsonl", "".join(_line(example) for example in examples[start:stop]))
    run.write(
        f"{folder}/{_BOUNDS}", {"rows": len(examples), "sha256": digest, "changes": list(changes), "skills": names}
    )
    stages.tell(
        f"{skill.name}: {len(names)} stretches of one skill each; changes before rows {list(changes) or 'none'}."
    )


def _read(config: RunConfig, skill: Skill) -> list[Example]:
    """Training rows in the order of their files."""
    registry = registry_of(config.data_registry)
    found = []
    for dataset in skill.datasets:
        reader = SourceReader(parse_dataset_spec(dataset, registry), seed=config.seed, registry=registry)
        found += [item.example for item in reader if item.split == "train"]
    if not found:
        raise DataError(f"skill {skill.name} must have rows to look for changes in, got none.")
    return found


def _head(ids: Sequence[int], config: RunConfig) -> tuple[int, ...]:
    return tuple(ids[: config.max_length])


def _line(example: Example) -> str:
    messages = [{"role": message.role, "content": message.content} for message in example.messages]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
