"""Public tasks by lm-evaluation-harness: a finished run and names of tasks -> figures, kept in the run's folder.

`python -m dylora_moe.evaluate.harness` is the harness's own command line with the model `dylora` known to it. The
harness does not find models of other packages by itself.
"""
# pyright: reportMissingImports=false

import difflib
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dylora_moe.errors import ConfigError, DataError, DyLoraError
from dylora_moe.evaluate.load import Speaker, TrainedRun, load_run
from dylora_moe.run_dir import EVAL


def run_harness(
    folder: Path,
    tasks: Sequence[str],
    *,
    speaker: Speaker | None = None,
    limit: int | None = None,
    include_path: Path | None = None,
    chat: bool = False,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Measure a finished run on tasks of the harness, and write `eval/harness-SPEAKER.json`.

    The file keeps what was measured of the same model before; a task that is measured again takes its place.

    Args:
        folder: Of the run.
        tasks: Names of tasks, groups or tags; `*` stands for any letters.
        speaker: Who answers; None for the mixture.
        limit: Rows of each task, its first ones; None for all.
        include_path: A folder with tasks of one's own, as YAML files. Functions that they name are run.
        chat: Ask in the chat template that the run was trained with; the tasks' plain text otherwise.
        tell: Hears what is going on.

    Returns:
        What the file holds: `tasks`, by name, each with its metrics.

    Raises:
        ConfigError: The extra `harness` is missing, or there is no such task, or one that runs unsafe code.
        DataError: The rows of a task cannot be had.
        RunError: No run folder, or a run that is not finished.
        TunerError: There is no such expert.
    """
    model_class, speaker = _import_model(), speaker or Speaker()
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    names = _match(tasks, manager)
    trained = load_run(folder, progress=tell)
    model = model_class(trained, speaker=speaker, batch_size=trained.config.eval_batch_size)
    tell(f"Measuring {', '.join(names)} ...")
    with _no_foreign_code():
        try:
            results = simple_evaluate(
                model=model,
                tasks=list(names),
                limit=limit,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                log_samples=False,
                task_manager=manager,
            )
        except OSError as error:
            raise DataError(
                f"the rows of {', '.join(names)} must be on the hub and within reach, or in the cache of data sets, "
                f"got {type(error).__name__}: {str(error)[:300]}. Connect, or take tasks whose rows are files here."
            ) from error
    assert results is not None  # of this process alone
    name = f"harness-{speaker.name}"
    known = _known(trained, f"{EVAL}/{name}.json")
    measured = known | _record(results, limit=limit, chat=chat)
    return trained.keep(name, {"lm_eval": version("lm_eval"), "tasks": measured})


def main() -> None:
    """The harness's own command line, with the model `dylora`, and without its ways to run foreign code."""
    _import_model()
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import setup_logging

    setup_logging()
    command_line = HarnessCLI()
    arguments = command_line.parse_args()
    try:
        if arguments.command == "run":
            config = EvaluatorConfig.from_cli(arguments)
            if config.trust_remote_code or config.confirm_run_unsafe_code:
                raise ConfigError(
                    "code from a repository is never run here, nor is what a model writes outside of a sandbox. "
                    "Leave trust_remote_code and confirm_run_unsafe_code out."
                )
        with _no_foreign_code():
            command_line.execute(arguments)
    except DyLoraError as error:
        raise SystemExit(f"Error: {error}") from error


def _import_model() -> Any:
    """The model's class; importing it makes the harness know it."""
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise ConfigError(
            "public tasks need the package lm-eval, which holds them. Install it: pip install 'dylora-moe[harness]'"
        ) from error
    return importlib.import_module("dylora_moe.evaluate.harness_model").HarnessModel


def _match(tasks: Sequence[str], manager: Any) -> list[str]:
    """Names with stars -> names, each once."""
    names: dict[str, None] = {}
    for task in tasks:
        found = manager.match_tasks([task])
        if not found:
            close = difflib.get_close_matches(task, manager.all_tasks, n=3)
            raise ConfigError(
                f"tasks must be known to the harness, got {task!r}. "
                + (f"Did you mean {', '.join(close)}? " if close else "")
                + "All names: python -m dylora_moe.evaluate.harness ls tasks"
            )
        names |= dict.fromkeys(found)
    if not names:
        raise ConfigError("the harness needs at least one task, got none. Name one, such as hellaswag.")
    return list(names)


class _Refused(BaseException):
    """Not an Exception, as the harness goes on without a metric that raises one, to fail after all questions."""


@contextmanager
def _no_foreign_code() -> Iterator[None]:
    """Inside, metrics that are programs on the hub are refused, and so are tasks that are marked as unsafe.

    Raises:
        ConfigError: A task needs one.
    """
    import evaluate

    def refuse(path: str, *args: Any, **kwargs: Any) -> None:
        raise _Refused(path)

    load, evaluate.load = evaluate.load, refuse
    try:
        yield
    except _Refused as error:
        raise ConfigError(
            f"a task asks for the metric {error}, a program that would be downloaded and run. Leave the task out"
            + ("; the project's own pass@k runs in its sandbox." if str(error) == "code_eval" else ".")
        ) from error
    except ValueError as error:
        if "marked as unsafe" not in str(error):
            raise
        raise ConfigError(
            f"a task runs what a model writes ({error}), and nothing here does so outside of a sandbox. Leave it out; "
            "the project's own pass@k runs in its sandbox."
        ) from error
    finally:
        evaluate.load = load


def _record(results: Mapping[str, Any], *, limit: int | None, chat: bool) -> dict[str, Any]:
    """What the harness found -> by task, what a figure is worth nothing without."""
    tasks = {}
    for name, figures in results["results"].items():
        metrics = []
        for key, value in figures.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{chosen}")
            metrics.append(
                {
                    "metric": metric,
                    "filter": chosen,
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, int | float) else None,
                    "higher_is_better": results["higher_is_better"].get(name, {}).get(metric),
                }
            )
        rows = results.get("n-samples", {}).get(name, {})  # groups have none of their own
        tasks[name] = {
            "metrics": metrics,
            "rows": rows.get("effective"),
            "of_rows": rows.get("original"),
            "num_fewshot": results.get("n-shot", {}).get(name),
            "version": results.get("versions", {}).get(name),
            "limit": limit,
            "chat": chat,
            "when": time.strftime("%F %T"),
        }
    return tasks


def _known(trained: TrainedRun, name: str) -> dict[str, Any]:
    """Tasks that this very model was measured on before."""
    if not (trained.run / name).is_file():
        return {}
    before = trained.run.read(name)
    return before["tasks"] if before.get("model") == trained.digest else {}


if __name__ == "__main__":
    main()
