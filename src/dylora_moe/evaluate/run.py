"""`dylora evaluate`: a run folder -> figures on rows that it did not train on, kept in the folder."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from dylora_moe.data.batching import TokenizedRow, pad_token_id
from dylora_moe.data.tokenize import IGNORED
from dylora_moe.evaluate.held_out import HeldOut, Split, held_out
from dylora_moe.evaluate.intervals import ratio_interval
from dylora_moe.evaluate.load import Speaker, TrainedRun, load_run
from dylora_moe.evaluate.losses import evaluation_of, score_domains
from dylora_moe.evaluate.matrix import expert_matrix, similarities
from dylora_moe.evaluate.paired import compare_rows
from dylora_moe.evaluate.routing import RoutingMeter, routing_changes
from dylora_moe.evaluate.tokens import TokenMeter
from dylora_moe.run_dir import EVAL, ROUTING, RunDir
from dylora_moe.tuner import Decision
from dylora_moe.tuner.head import read_head

_ROWS = "rows"


def evaluate_run(
    folder: Path,
    speakers: Sequence[Speaker] = (Speaker(kind="base"), Speaker()),
    *,
    split: Split = "validation",
    tell: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Measure a finished run on a split of its data, by each of some speakers.

    Each speaker's figures go to `eval/NAME.json`, those of each row to `eval/rows/NAME.jsonl`; of the test split with
    `test-` before the name.

    Returns:
        Speaker's name -> domains with their losses (nats a labelled token), bits a byte of the labelled text and
        accuracy of the next token, each with a 95 % interval over rows; beside the base also `against_base`, the
        difference of the losses as of `compare_rows`, below 0 where the base is worse. And how the mixture routed.

    Raises:
        RunError: No run folder, or a run that is not finished.
        DataError: The data is not what the run was trained with, or has no such split.
        TunerError: There is no such expert.
    """
    return _evaluate(load_run(folder, progress=tell), speakers, split, tell)


def evaluate_experts(folder: Path, *, split: Split = "validation", tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure the base, the mixture, all experts together and each expert alone, on every domain.

    Returns:
        `measured`, as of `evaluate_run`; `matrix`, which goes to `eval/matrix.json`; and `similarity` of the experts'
        changes of the base, which goes to `eval/similarity.json`.

    Raises:
        As `evaluate_run`.
    """
    trained = load_run(folder, progress=tell)
    names = trained.model.expert_names
    experts = [Speaker(kind="expert", expert=name) for name in names]
    together = [Speaker(kind="dense")] if len(names) > 1 else []
    measured = _evaluate(trained, (Speaker(kind="base"), Speaker(), *together, *experts), split, tell)
    rows = {each.name: read_rows(trained.run, each, split) for each in experts}
    matrix = trained.keep(f"{_prefix(split)}matrix", {"split": split, **expert_matrix(measured, rows)})
    similarity = trained.keep("similarity", similarities(trained.model))
    return {"measured": measured, "matrix": matrix, "similarity": similarity}


def _evaluate(
    trained: TrainedRun, speakers: Sequence[Speaker], split: Split, tell: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    for speaker in speakers:
        with trained.speaking(speaker):  # one that is not there is told before anything is measured
            pass
    held = held_out(trained, split, tell)
    found, base_rows = dict[str, dict[str, Any]](), list[dict[str, Any]]()
    for speaker in speakers:
        tell(f"Measuring {speaker.name} ...")
        record, rows = _measure(trained, held, speaker)
        if speaker == Speaker(kind="base"):
            base_rows = rows
        elif base_rows:
            for domain, compared in zip(record["domains"], compare_rows(rows, base_rows), strict=True):
                domain["against_base"] = {name: compared[name] for name in ("difference", "interval", "p", "p_holm")}
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        rows_digest = hashlib.sha256(lines.encode()).hexdigest()
        trained.run.write(_rows_file(speaker, split), lines)
        about = {"speaker": speaker.name, "split": split, "rows_sha256": rows_digest}
        found[speaker.name] = trained.keep(_file(speaker, split), about | record)
    return found


def read_rows(run: RunDir, speaker: Speaker, split: Split) -> list[dict[str, Any]]:
    """The figures of every row, as `evaluate_run` left them; none where it did not run."""
    return run.read_lines(_rows_file(speaker, split))


def is_measured(run: RunDir, speaker: Speaker, split: Split) -> bool:
    """True where the figures that lie in the folder are of the model that lies there, with all of their rows."""
    name, rows = f"{EVAL}/{_file(speaker, split)}.json", run / _rows_file(speaker, split)
    if not ((run / name).is_file() and rows.is_file()):
        return False
    record = run.read(name)
    digest = hashlib.sha256(rows.read_bytes()).hexdigest()
    return (record.get("model"), record.get("rows_sha256")) == (run.model_digest(), digest)


def _measure(trained: TrainedRun, held: HeldOut, speaker: Speaker) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures, and those of each row."""
    model, domains = trained.model, tuple(held.rows)
    overall, by_layer = RoutingMeter(model.expert_names, domains), dict[int, RoutingMeter]()
    tokens = TokenMeter(model.expert_names, model.config.get_text_config().vocab_size)

    def observe(decisions: Mapping[int | None, Decision], ids: Tensor, domain: Tensor) -> None:
        overall.add(list(decisions.values()), domain)
        tokens.add(decisions.values(), ids, domain)
        for layer, decision in decisions.items():
            if layer is not None:
                by_layer.setdefault(layer, RoutingMeter(model.expert_names, domains)).add([decision], domain)

    with trained.speaking(speaker):
        scores = score_domains(
            model,
            read_head(model.lm),
            held.rows,
            batch_size=trained.config.eval_batch_size,
            pad_token_id=pad_token_id(trained.tokenizer),
            observe=observe,
        )
    evaluation = asdict(evaluation_of(scores, overall.report()))
    texts = {name: [_labelled(trained, row) for row in held.rows[name]] for name in domains}
    sizes = {name: [len(text.encode()) for text in each] for name, each in texts.items()}
    for domain in evaluation["domains"]:
        of_rows, in_bytes = scores[domain["domain"]], sizes[domain["domain"]]
        nats, tokens_of = [row.nll for row in of_rows], [row.tokens for row in of_rows]
        bits, total = [nll / math.log(2) for nll in nats], sum(in_bytes)
        interval = ratio_interval(nats, tokens_of)
        domain["loss_interval"] = interval
        domain["perplexity_interval"] = interval and [math.exp(min(loss, 700)) for loss in interval]
        domain["accuracy_interval"] = ratio_interval([row.right for row in of_rows], tokens_of)
        # Comparable between tokenizers, as nats a token are not; None without text.
        domain["bits_per_byte"] = sum(bits) / total if total else None
        domain["bits_per_byte_interval"] = ratio_interval(bits, in_bytes) if total else None
    if evaluation["routing"] is not None:
        layers = {layer: meter.report() for layer, meter in sorted(by_layer.items())}
        evaluation["routing"]["layers"] = [
            {"layer": layer, **asdict(report)} for layer, report in layers.items() if report is not None
        ]
        evaluation["routing"]["top_tokens"] = tokens.report(lambda token: str(trained.tokenizer.decode([token])))
        evaluation["routing"]["changes"] = routing_changes(trained.run.read_lines(ROUTING))
    lines = [
        {"domain": name, "row": row, **asdict(score), "bytes": size}
        for name in domains
        for row, score, size in zip(held.names(name, texts[name]), scores[name], sizes[name], strict=True)
    ]
    return evaluation, lines


def _labelled(trained: TrainedRun, row: TokenizedRow) -> str:
    """The text that is foretold."""
    labels = [label for label in row.labels if label != IGNORED]
    return str(trained.tokenizer.decode(labels, skip_special_tokens=True))


def _prefix(split: Split) -> str:
    return "" if split == "validation" else f"{split}-"


def _file(speaker: Speaker, split: Split) -> str:
    return _prefix(split) + speaker.name


def _rows_file(speaker: Speaker, split: Split) -> str:
    return f"{EVAL}/{_ROWS}/{_file(speaker, split)}.jsonl"
