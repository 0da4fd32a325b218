"""A stream read from its stages is what its result says, at its end and before."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.train.streams import whole

from dylora_moe.errors import RunError
from dylora_moe.evaluate.stream import read_stream
from dylora_moe.run_dir import RunDir

__all__ = ["whole"]


def test_stages_give_the_result_and_fewer_of_them_less(whole: Any, tmp_path: Path) -> None:
    shutil.copytree(whole[1].path, folder := tmp_path / "stream", ignore=shutil.ignore_patterns("checkpoints"))
    run = RunDir(folder)
    found = json.loads(json.dumps(read_stream(run)))
    assert found == whole[2] | {"run": str(folder)}
    (folder / "stages" / "03-sums" / "stage.json").unlink()
    found = read_stream(run)
    assert found is not None and found["experts"] == ["capitals", "functions"]
    assert found["summary"]["skills"] == ("capitals", "functions")
    assert found["summary"]["loss"]["matrix"][1][1] == whole[2]["summary"]["loss"]["matrix"][1][1]
    (folder / "stages" / "02-functions" / "stage.json").write_text("{")
    with pytest.raises(RunError, match="no valid JSON"):
        read_stream(run)
    shutil.rmtree(folder / "stages")
    assert read_stream(run) is None
