"""What a stream has come to, from its stages on disk; and the way back to before any of them. Needs no model."""

import os
import shutil
from pathlib import Path
from typing import Any

from dylora_moe.errors import RunError
from dylora_moe.evaluate.load import read_config
from dylora_moe.evaluate.stream import name_of, read_stream
from dylora_moe.report.page import render_stream
from dylora_moe.run_dir import FINAL, REPORT, RESULT, UNDONE, RunDir, number_of, stage_folders
from dylora_moe.skills.library import RECORD, TENSORS, load_library
from dylora_moe.train.stream import copy_model, read_stages


def finish_stream(run: RunDir) -> dict[str, Any]:
    """Make the last stage's model that of the run, and write its result and its report."""
    folder = read_stages(run)[-1][0]
    load_library(folder)  # which says what is wrong with it
    (run / RESULT).unlink(missing_ok=True)  # so that a stop from here on is seen, and made good
    copy_model(folder / FINAL, run / FINAL)
    for name in (RECORD, TENSORS):
        shutil.copyfile(folder / name, run / name)
    result = read_stream(run)
    assert result is not None  # a stage counts
    run.write(REPORT, render_stream(result))
    run.write(RESULT, result)
    return result


def rollback(path: Path, before: str) -> dict[str, Any]:
    """Take a stream back to before a skill came; what is undone is kept in `undone/`.

    Args:
        path: Of the stream.
        before: Name of the skill, or of a stage, such as `05-merge`.

    Returns:
        The folder that the undone stages are in, their names, and the skills that are left.

    Raises:
        RunError: The folder is no stream, or no stage of it is of that skill.
    """
    run = RunDir(path)
    read_config(run)
    with run.locked():
        stages = read_stages(run)
        names = [name_of(folder, record.figures.skill) for folder, record in stages]
        places = {folder.name: place for place, (folder, _) in enumerate(stages)}
        places |= {name: place for place, name in enumerate(names)}
        if before not in places:
            known = ", ".join(names) or "none: it is no stream, or has learned nothing yet"
            raise RunError(
                f"what to go back before must be a skill that {path} has learned, or the stage of a change ({known}), "
                f"got {before!r}."
            )
        place = places[before]
        if place:
            load_library(stages[place - 1][0])  # what cannot be gone back to is left alone
        # From the last one, so that what is left is a stream at any moment.
        undone = [folder for folder in reversed(stage_folders(run)) if number_of(folder) > place]
        kept = _next_folder(run / UNDONE)
        (run / RESULT).unlink(missing_ok=True)
        for folder in undone:
            os.replace(folder, kept / folder.name)
        if place:
            finish_stream(run)
        else:
            shutil.rmtree(run / FINAL, ignore_errors=True)
            for name in (RECORD, TENSORS, REPORT):
                (run / name).unlink(missing_ok=True)
    skills = [record.figures.skill for _, record in stages[:place] if record.figures.skill is not None]
    return {"undone": [folder.name for folder in reversed(undone)], "folder": str(kept), "skills": skills}


def _next_folder(parent: Path) -> Path:
    number = 1
    while (parent / str(number)).exists():
        number += 1
    (parent / str(number)).mkdir(parents=True)
    return parent / str(number)
