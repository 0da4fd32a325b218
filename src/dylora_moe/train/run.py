"""THE PAGE: settings -> base, data, model, trainer -> a fitted mixture in its run folder."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import set_seed

from dylora_moe import ranks
from dylora_moe.config import RunConfig
from dylora_moe.data.paths import with_full_paths
from dylora_moe.run_dir import RunDir
from dylora_moe.train.continual import train_stream
from dylora_moe.train.fitting import fit, tracking
from dylora_moe.train.folder import find_start_together, finished_result, settle_here
from dylora_moe.train.mirror import mirrored
from dylora_moe.train.session import Stages, check_machine, prepare
from dylora_moe.train.stopping import StopSignals
from dylora_moe.train.trackers import check_trackers, fetch_checkpoint


def train(config: RunConfig, stages: Stages | None = None, stop: StopSignals | None = None) -> dict[str, Any]:
    """Train as configured, in the run's own folder, and return its result record.

    A folder whose run is finished with the same settings is left alone and its result returned; one whose run did not
    finish is gone on with.

    Raises:
        DyLoraError: any bad setting, data, base or folder, before the first step.
        Stopped: A signal came; the same call goes on.
    """
    ranks.join()
    stages, stop = (stages if ranks.is_first() else None) or Stages(), stop or StopSignals()
    stop.most = ranks.most
    if not ranks.is_first():
        stop.announce = lambda line: None
    with ranks.explained():
        config = settle_here(with_full_paths(config))
        if config.mode == "continual":
            return train_stream(config, stages, stop)
        return _train_jointly(config, stages, stop)


def _train_jointly(config: RunConfig, stages: Stages, stop: StopSignals) -> dict[str, Any]:
    run = RunDir(config.run_dir, writes=ranks.is_first())
    with run.locked(), mirrored(config, run, stages, stop) as stages:
        if ranks.by_first(lambda: run.is_finished):
            return ranks.by_first(lambda: finished_result(run, config))
        ranks.by_first(lambda: check_machine(config))
        ranks.by_first(lambda: check_trackers(config.report_to))
        with TemporaryDirectory() as fetched, tracking(config, run, stages) as trackers:
            checkpoint = find_start_together(
                run, config, stages.tell, lambda name: fetch_checkpoint(name, Path(fetched))
            )
            set_seed(config.seed)
            return fit(prepare(config, run, stages), checkpoint, trackers, stages, stop)
