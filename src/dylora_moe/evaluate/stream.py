"""A stream's stages on disk -> what it has come to so far, as one record. Needs no model and no torch."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dylora_moe.evaluate.forgetting import StageFigures, summarise
from dylora_moe.run_dir import FINAL, STAGE, START, RunDir, stage_folders

_LIBRARY, _DESCRIPTION = "skills.json", "dylora_moe.json"


def read_stream(run: RunDir) -> dict[str, Any] | None:
    """Run, base, experts, stages and summary of the stages that count; None before the first.

    Raises:
        RunError: A stage's record is not there or does not parse.
    """
    folders = [folder for folder in stage_folders(run) if (folder / STAGE).is_file()]
    if not folders:
        return None
    records = [RunDir(folder).read(STAGE) for folder in folders]
    last = RunDir(folders[-1])
    description, library = last.read(f"{FINAL}/{_DESCRIPTION}"), last.read(_LIBRARY)
    adapter = TypeAdapter(StageFigures)
    figures = [adapter.validate_python(record["figures"]) for record in records]
    summary = summarise(
        figures,
        base_losses={
            stage.skill: record["base_loss"]
            for stage, record in zip(figures, records, strict=True)
            if stage.skill is not None and record["base_loss"] is not None
        },
        base_general=run.read(START)["base_general"],
        experts={skill["name"]: skill["expert"] for skill in library["skills"]},
    )
    stages = [
        {
            "name": name_of(folder, stage.skill),
            "skill": stage.skill,
            "decision": record["decision"] | {"expert": record["expert"]},
            "base_loss": record["base_loss"],
            "figures": asdict(stage),
        }
        for folder, stage, record in zip(folders, figures, records, strict=True)
    ]
    return {
        "run": str(run.path),
        "base_model": description["base"],
        "experts": [expert["name"] for expert in description["experts"]],
        "stages": stages,
        "summary": asdict(summary),
    }


def name_of(folder: Path, skill: str | None) -> str:
    """Of a stage: the skill that it learned, or its folder where it is a change by hand."""
    return skill or folder.name
