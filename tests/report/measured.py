"""What `dylora evaluate` leaves in a run's folder, in its shapes, and a warning sign; written by hand."""

import json
from pathlib import Path
from typing import Any


def write_warning(run: Path) -> None:
    line = {"step": 4, "name": "dead_experts", "seen": "Expert expert_2 has no load.", "advice": "Raise it."}
    (run / "warnings.jsonl").write_text(json.dumps(line) + "\n")


def write_evaluations(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    domains = [each["domain"] for each in result["after"]["domains"]]
    experts = result["after"]["routing"]["experts"]
    for name, when, factor in (("base", "before", 1.0), ("routed", "after", 1.0)):
        write(run, name, losses(result[when], "validation", factor, experts))
        write(run, f"test-{name}", losses(result[when], "test", 1.25, experts))
    told = [[each["loss"] for each in result[when]["domains"]] for when in ("before", "after")]
    rows = [{"speaker": "base", "losses": told[0]}, {"speaker": "routed", "losses": told[1]}]
    rows += [{"speaker": f"expert {name}", "losses": [9.5 - place] * 3} for place, name in enumerate(experts)]
    write(
        run,
        "matrix",
        {"split": "validation", "domains": domains, "rows": rows, "oracle": {"by_row": told[1], "by_domain": told[1]}},
    )
    write(run, "similarity", {"experts": experts, "similarity": [[1.0, 0.125, -0.5]] * 3})
    write(
        run,
        "code-mbpp",
        {
            "name": "mbpp",
            "split": "test",
            "sandbox": "bubblewrap",
            "k": [1, 5],
            "samples": 10,
            "problems": 40,
            "speakers": [
                {"speaker": "base", "pass": {"1": 0.025, "5": 0.075}, "interval": {"1": [0.0, 0.05]}},
                {"speaker": "routed", "pass": {"1": 0.125, "5": 0.25}},
            ],
            "against_base": {"difference": 0.1, "interval": [-0.02, 0.22], "p": 0.125, "rows": 40},
            "example": {"prompt": "Add two.", "answer": "It is so.", "program": "def add(): ...", "verdict": "failed"},
        },
    )
    shares = {"base": {"share": 0.25, "interval": [0.2, 0.3]}, "routed": {"share": 0.875, "interval": [0.7, 0.9]}}
    more = {"difference": 0.625, "interval": [0.5, 0.75], "p": 0.0005, "rows": 40}
    answers = [{"domain": domains[0], "kind": "label", "rows": 40, "speakers": shares, "against_base": more}]
    write(run, "answers", {"split": "validation", "domains": answers, "free_text": domains[1:]})
    change = {"difference": -0.125, "interval": [-0.25, -0.0625], "p": 0.001, "p_holm": 0.002, "rows": 6}
    compared = {"domain": domains[0], "unit": "nats a token", "ours": 1.5, "theirs": 1.625, **change}
    write(run, "compare", {"run": "a", "split": "validation", "others": [{"run": "runs/b", "domains": [compared]}]})
    accuracy = {"metric": "acc_norm", "filter": "none", "value": 0.28125, "stderr": 0.0125, "higher_is_better": True}
    task = {"metrics": [accuracy], "rows": 1319, "of_rows": 1319, "num_fewshot": 5}
    write(run, "harness-base", {"lm_eval": "0.4.13", "tasks": {"hellaswag": task}})
    write(run, "test-compare", {"run": "a", "split": "test", "others": [{"run": "runs/c", "domains": [compared]}]})
    write(
        run, "test-matrix", {"split": "test", "domains": domains, "rows": [{"speaker": "dense", "losses": [4.5] * 3}]}
    )
    write(
        run,
        "levels-routed",
        {
            "made_in": "runs/made",
            "speaker": "routed",
            "questions": 12,
            "levels": {"A1": {"answers": 12, "passed": 10, "words": 5.25, "together": None}},
            "levels_found": {"levels": ["A1", "A2"], "counts": [[9, 3], [1, 2]], "kappa": 0.5, "rows": 15},
            "wrong": {"repeats_question": 6},
            "samples": [{"level": "A1", "question": "Why?", "answer": "Because.", "found": "A2"}],
        },
    )


def losses(evaluation: dict[str, Any], split: str, factor: float, experts: list[str]) -> dict[str, Any]:
    domains = [
        each
        | {"loss": each["loss"] * factor, "loss_interval": [each["loss"] * 0.75, each["loss"] * 1.5]}
        | {"bits_per_byte": 0.625, "accuracy": 0.375, "accuracy_interval": [0.25, 0.5]}
        for each in evaluation["domains"]
    ]
    layer = {"load": [0.5, 0.5, 0.0], "load_entropy": 0.625, "decision_entropy": 0.25, "mutual_information": 0.5}
    layers = [layer | {"layer": place, "dead": ["expert_2"]} for place in range(2)]
    tokens = {
        name: [{"token": " return", "count": 12, "share": 0.25}, {"token": "\n", "count": 3, "share": 0.0625}]
        for name in experts
    }
    changes = [{"step": 2, "change": 0.5}, {"step": 4, "change": 0.125}]
    return {
        "split": split,
        "domains": domains,
        "mean_loss": 1.0,
        "routing": evaluation["routing"] | {"layers": layers, "top_tokens": tokens, "changes": changes},
    }


def write(run: Path, name: str, record: dict[str, Any]) -> None:
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / f"{name}.json").write_text(json.dumps(record))
