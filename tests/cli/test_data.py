"""`dylora data list`: every named data set, without torch."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cli.conftest import finish, start_python

from dylora_moe.data.registry import REGISTRY

Run = Callable[..., Any]
LIST = """
import sys
from dylora_moe.cli.main import main
try:
    main(["data", "list", "--json"])
except SystemExit:
    heavy = ("torch", "transformers", "peft", "datasets", "pyarrow", "py3langid")
    print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""


def test_the_list_is_the_registry(dylora: Run) -> None:
    entries = dylora("data", "list", "--json").json()
    assert [entry["name"] for entry in entries] == list(REGISTRY)
    mbpp = next(entry for entry in entries if entry["name"] == "mbpp")
    assert (mbpp["domain"], mbpp["num_rows"], mbpp["revision"]) == ("mbpp", 974, REGISTRY["mbpp"].revision)
    assert mbpp["id_splits"][1] == {"split": "test", "first": 11, "last": 510}


def test_people_read_a_table(dylora: Run) -> None:
    outcome = dylora("data", "list")
    assert outcome.code == 0 and outcome.err == ""
    line = next(line for line in outcome.out.splitlines() if "evol_instruct" in line)
    assert "CC-BY-NC-SA-4.0" in line and "78,300" in line and "nickrosh/Evol-Instruct-Code-80k-v1 @ 3ae930c" in line
    assert "kstats/CIMA" in outcome.out and "made here" in outcome.out and "none stated" in outcome.out


def test_own_entries_are_listed_or_named(dylora: Run, tmp_path: Path) -> None:
    file = tmp_path / "sources.yaml"
    file.write_text("tickets: {path: tickets.csv, domain: support}")
    assert dylora("data", "list", "--registry", file, "--json").json()[-1]["domain"] == "support"
    file.write_text("tickets: {pth: tickets.csv}")
    outcome = dylora("data", "list", "--registry", file)
    assert outcome.code == 1 and "Did you mean 'path'?" in outcome.err


def test_nothing_heavy_is_imported() -> None:
    out, err = finish(start_python(LIST))
    assert ast.literal_eval(err.strip().splitlines()[-1]) == [] and out.startswith("[{")
