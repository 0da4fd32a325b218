"""`dylora evaluate`: a run folder -> figures on its validation rows, kept in the folder."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from dylora_moe.data.batching import pad_token_id
from dylora_moe.data.build import build_run_data
from dylora_moe.data.bundle import DataBundle
from dylora_moe.data.stored import Rows
from dylora_moe.errors import DataError
from dylora_moe.evaluate.load import TrainedRun, load_run, read_config, speaker
from dylora_moe.evaluate.losses import Evaluation, evaluate_domains
from dylora_moe.run_dir import DATA, EVAL, STAGE, STAGES, RunDir
from dylora_moe.skills.library import load_library
from dylora_moe.tuner.head import read_head


def evaluate_run(
    folder: Path, *, expert: str | None = None, base_alone: bool = False, progress: Callable[[str], None]
) -> Evaluation:
    """Measure a finished run, routed, with one expert forced, or the base alone.

    Raises:
        DataError: the data is not what the run was trained with.
    """
    trained = load_run(folder, progress=progress)
    config, model = trained.config, trained.model
    validation = _validation(trained, progress)
    progress("Measuring ...")
    with trained.speaking(expert=expert, base_alone=base_alone):
        evaluation = evaluate_domains(
            model,
            read_head(model.lm),
            validation,
            batch_size=config.eval_batch_size,
            pad_token_id=pad_token_id(trained.tokenizer),
        )
    trained.run.write(f"{EVAL}/{speaker(expert=expert, base_alone=base_alone)}.json", asdict(evaluation))
    return evaluation


def _validation(trained: TrainedRun, progress: Callable[[str], None]) -> dict[str, Rows]:
    """Validation rows of every domain, or of every skill of a stream."""
    if trained.config.mode == "joint":
        data = build_run_data(trained.config, trained.tokenizer, tell=progress)
        then = {domain["domain"]: domain["sha256"] for domain in trained.run.read(DATA)["domains"]}
        return _unchanged(data, then)
    rows: dict[str, Rows] = {}
    library = load_library(trained.run.path).skills
    for stage in map(RunDir, sorted(trained.run.path.glob(f"{STAGES}/*"))):
        if not (stage / STAGE).is_file():  # begun, and not committed
            continue
        name = stage.read(STAGE)["figures"]["skill"]
        if name not in library:  # committed, while the model is that of the last finished stream
            continue
        config = read_config(stage)
        own = tuple(dataset for dataset in config.datasets if isinstance(dataset, dict) and dataset["domain"] == name)
        data = build_run_data(config.model_copy(update={"datasets": own}), trained.tokenizer, tell=progress)
        rows |= _unchanged(data, {name: library[name].record.data})
    return rows


def _unchanged(data: DataBundle, then: Mapping[str, str]) -> dict[str, Rows]:
    changed = [domain.domain for domain in data.summary.domains if then.get(domain.domain) != domain.sha256]
    if changed:
        raise DataError(
            f"the data of {', '.join(changed)} must be what the run was trained with, so that validation rows are "
            "unseen ones, and it has changed since. Restore the files."
        )
    return data.validation
