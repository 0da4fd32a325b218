"""What a tracker has been given, on disk, so that a run that goes on from an earlier step gives nothing twice."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Sent:
    """The last step of each kind of message, and the names that were given for it.

    A step that is made again gives what it gave before, so leaving it out loses nothing.

    Args:
        path: Of the file.
        run_id: Another run's file counts as none.
    """

    def __init__(self, path: Path, run_id: str) -> None:
        self._path = path
        self._record: dict[str, Any] = {"run_id": run_id}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["run_id"] == run_id:
                self._record = found
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def new(self, kind: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the values that were not given yet."""
        last = self._record.get(kind)
        if last is None or step > last["step"]:
            return dict(values)
        return {name: value for name, value in values.items() if step == last["step"] and name not in last["names"]}

    def add(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Remember that these were given."""
        last = self._record.get(kind)
        before = last["names"] if last is not None and last["step"] == step else []
        self._record[kind] = {"step": step, "names": [*before, *values]}
        temporary = self._path.with_suffix(".part")
        temporary.write_text(json.dumps(self._record), encoding="utf-8")
        os.replace(temporary, self._path)
