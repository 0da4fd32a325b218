"""A run's folder -> what it holds, as far as it got; what is missing is empty, what is broken is named."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dylora_moe.errors import RunError
from dylora_moe.run_dir import (
    CONFIG,
    DATA,
    ENVIRONMENT,
    EVAL,
    METRICS,
    RESULT,
    ROUTING,
    SAMPLES,
    STAGE,
    START,
    WARNINGS,
    RunDir,
    stage_folders,
)

Record = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What lies in a run's folder. Records that are not there are empty.

    Attributes:
        path: Of the folder.
        settings: As `config.yaml` has them.
        environment: Of the process that began the run.
        data: What went in.
        start: What was measured before the first step.
        result: Written last.
        metrics: Lines of figures.
        routing: Lines of where tokens went.
        warnings: Lines of warning signs.
        samples: Lines of answers.
        evaluations: Name of a file in `eval/`, without its ending -> what it says; not of those that are stale.
        stages: Of a stream, those under way included.
        figures: Of a stage that came to its end, what was measured after it.
        stale: Names of files in `eval/` that say what was measured of another model than the folder has now.
        broken: Names of files that are there and cannot be read.
        last_line: When the last line of figures was written, in seconds of the epoch.
    """

    path: Path
    settings: Record
    environment: Record
    data: Record
    start: Record
    result: Record
    metrics: list[Record]
    routing: list[Record]
    warnings: list[Record]
    samples: list[Record]
    evaluations: dict[str, Record]
    stages: tuple["RunRecord", ...] = ()
    figures: Record | None = None
    stale: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    last_line: float | None = None

    @property
    def name(self) -> str:
        """The run's name; a folder that was renamed has its own."""
        return self.path.resolve().name

    @property
    def counts(self) -> bool:
        """True for a stage that came to its end."""
        return self.figures is not None

    @property
    def is_generation(self) -> bool:
        """True for data that a second model wrote."""
        return "generator" in self.settings

    @property
    def is_stream(self) -> bool:
        """True for a stream of skills."""
        return self.settings.get("mode") == "continual"


def read_run(path: Path) -> RunRecord:
    """All that can be told of a run, finished or not.

    Raises:
        RunError: The folder is no run's.
    """
    run = RunDir(path)
    if not (path / CONFIG).is_file():
        raise RunError(
            f"a report is made of a run's folder, which has a {CONFIG}, and {path} has none. Give a folder that "
            "`dylora train` or `dylora generate` made."
        )
    settings = _settings(path / CONFIG)
    if settings is None:
        raise RunError(f"{path / CONFIG} must hold settings as `name: value` lines, and cannot be read as such.")
    stages = [_read(folder, _settings(folder / CONFIG) or {}) for folder in stage_folders(run)]
    return _read(path, settings, stages=tuple(stages))


def _read(path: Path, settings: Record, *, stages: tuple[RunRecord, ...] = ()) -> RunRecord:
    run, broken = RunDir(path), list[str]()

    def record(name: str) -> Record:
        if not (run / name).is_file():
            return {}
        try:
            found = json.loads((run / name).read_text(encoding="utf-8"))
        except (ValueError, OSError):
            found = None
        if isinstance(found, dict):
            return found
        broken.append(name)
        return {}

    def lines(name: str) -> list[Record]:
        return [line for line in run.read_lines(name) if isinstance(line, dict)]

    names = sorted(each.stem for each in (run / EVAL).glob("*.json") if not each.name.startswith("."))
    evaluations = {name: found for name in names if (found := record(f"{EVAL}/{name}.json"))}
    stale = _stale(run, evaluations)
    newest = [stage.last_line for stage in stages if stage.last_line is not None]
    if (run / METRICS).is_file():
        newest.append((run / METRICS).stat().st_mtime)
    return RunRecord(
        path=path,
        settings=settings,
        environment=record(ENVIRONMENT) or next((stage.environment for stage in stages if stage.environment), {}),
        data=record(DATA),
        start=record(START),
        result=record(RESULT),
        metrics=lines(METRICS),
        routing=lines(ROUTING),
        warnings=lines(WARNINGS),
        samples=lines(SAMPLES),
        evaluations={name: found for name, found in evaluations.items() if name not in stale},
        stages=stages,
        stale=stale,
        figures=record(STAGE).get("figures") if (run / STAGE).is_file() else None,
        broken=(*broken, *(f"{stage.path.name}/{name}" for stage in stages for name in stage.broken)),
        last_line=max(newest, default=None),
    )


def _stale(run: RunDir, evaluations: Mapping[str, Record]) -> tuple[str, ...]:
    measured = {name: record["model"] for name, record in evaluations.items() if "model" in record}
    if not measured:
        return ()
    now = run.model_digest()
    return tuple(name for name, model in measured.items() if model != now)


def _settings(path: Path) -> Record | None:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return dict(values) if isinstance(values, Mapping) else None
