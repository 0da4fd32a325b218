"""`dylora data inspect` over every folder of real data: its counts equal an independent count."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

SHARED = Path(__file__).parents[3] / "shared" / "data"

# Domain -> files, and what the recipe says of each.
SKIP: dict[str, Any] = {"on_bad_row": "skip"}
FILES: dict[str, dict[str, dict[str, Any]]] = {
    "python_codes": {"python_codes_25k/python-codes-25k.fixed.json": {}},
    "yahoo": {"continual/yahoo": {}},
    "agnews": {"continual/agnews": {}},
    "amazon": {"continual/amazon": {}},
    "dbpedia": {"continual/dbpedia": {}},
    "dolly": {"dolly": {}},
    "evol": {"evol_instruct": {}},
    "cima": {"cima": {}},
    "wikisql": {"wikisql": {}},
    "mbpp": {"mbpp": {}},
    "tatoeba": {
        "tatoeba/italian_sentences.json": {"columns": {"italian": "english", "english": "italian"}},
        "tatoeba/tatoeba.ita-eng.eng": {},
    },
    "alpaca": {"alpaca": SKIP},
    "gsm8k": {"gsm8k": {}},
    "formats": {"formats": {}},
    "kelly": {"kelly": {**SKIP, "format": "classification", "columns": {"sentence": "word", "label": "cefr"}}},
    "sharegpt": {"sharegpt": {}},
    "code_alpaca": {"code_alpaca/code_alpaca_2k.json": SKIP, "code_alpaca/new_codealpaca.json": {}},
}


def count_rows(path: Path) -> tuple[int, int, int]:
    """(all rows, those of a test split, those that cannot be read) of a file or folder, by Python's json alone."""
    if path.is_dir():
        parts = [
            count_rows(file)
            for file in path.iterdir()
            if file.suffix in (".json", ".jsonl") and "labels" not in file.name
        ]
        return tuple(map(sum, zip(*parts, strict=True)))  # type: ignore[return-value]
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".eng":
        return len(text.splitlines()), 0, 0
    rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    if path.parent.name == "cima":
        return sum(len(exercise["tutorResponses"]) for each in rows.values() for exercise in each.values()), 0, 0
    if isinstance(rows, dict):
        rows = next(value for value in rows.values() if isinstance(value, list))
    bad = sum(not row["output"].strip() for row in rows if "output" in row)
    bad += sum(not row["cefr"] for row in rows if "cefr" in row)
    test = len(rows) if path.stem == "test" else sum(11 <= row["task_id"] <= 510 for row in rows if "task_id" in row)
    return len(rows), test, bad


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs the real files in shared/data")
def test_counts_of_every_folder_are_those_of_an_independent_count(
    dylora: Callable[..., Any], tiny_settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    entries = [
        {"path": str(SHARED / name), "domain": domain, **said}
        for domain, files in FILES.items()
        for name, said in files.items()
    ]
    read = {SHARED / name for files in FILES.values() for name in files}
    assert {path.name for path in SHARED.iterdir() if path.is_dir()} <= {
        part for path in read for part in path.relative_to(SHARED).parts
    }, "every folder is in the recipe"
    recipe = tmp_path / "all.yaml"
    settings = tiny_settings(datasets=entries, max_length=100_000, validation_split=0.1)
    recipe.write_text(yaml.safe_dump(json.loads(json.dumps(settings, default=str))))
    outcome = dylora("data", "inspect", recipe, "--json", "--samples", 0)
    assert outcome.code == 0, outcome.err
    found = {domain["domain"]: domain for domain in json.loads(outcome.out)["domains"]}
    assert found.keys() == FILES.keys()
    for domain, files in FILES.items():
        rows, test, bad = (sum(column) for column in zip(*(count_rows(SHARED / name) for name in files), strict=True))
        summary = found[domain]
        assert (summary["num_test"], summary["num_bad_rows"]) == (test, bad), domain
        left_out = sum(summary["removed"].values()) + summary["num_overlong"]
        used = summary["num_train"] + summary["num_validation"]
        assert used + left_out + summary["num_unused"] + test + bad == rows, domain
        assert sum(summary["lengths"]["histogram"]) == used
        assert 0 < summary["num_train_label_tokens"] <= summary["num_train_tokens"]
