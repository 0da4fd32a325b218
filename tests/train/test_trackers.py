"""Trackers: the real TensorBoard, trackio and W&B (offline), read back; and every way in which one can fail.

W&B's server is the one thing that is not here: what is sent to it is read from the file that `wandb sync` sends.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.train.wandb_file import artifacts, read_wandb

from dylora_moe.errors import ConfigError
from dylora_moe.train.trackers import Sample, Trackers, check_trackers
from dylora_moe.train.trackers.channel import Channel, Limits
from dylora_moe.train.trackers.messages import Figures, Samples, Start, decode, encode, hide_secrets
from dylora_moe.train.trackers.sent import Sent

ALL = ("tensorboard", "trackio", "wandb")
SECRET = "0123456789abcdef0123456789abcdef01234567"
LOGGED = {
    "loss": "train/loss",
    "tokens_per_second": "train/tokens_per_second",
    "router_entropy": "router/router_entropy",
    "load_expert_0": "router/load_expert_0",
    "eval_a_loss": "eval/a_loss",
}


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, said: list[str]) -> Iterator[Callable[..., Trackers]]:
    """(names, **changes) -> trackers in the test's folder, ended with the test."""
    made: list[Trackers] = []

    def build(*names: str, **changes: Any) -> Trackers:
        plain: dict[str, Any] = {
            "folder": tmp_path / "trackers",
            "run_name": "tiny",
            "config": {"learning_rate": 0.001, "datasets": [{"path": "a"}]},
            "environment": {"python": "3"},
            "tell": said.append,
        }
        made.append(Trackers(names, **plain | changes))
        return made[-1]

    yield build
    for trackers in made:
        trackers.finish(ok=False, seconds=5)


def figures(step: int) -> dict[str, float]:
    return {name: step + index / 8 for index, name in enumerate(LOGGED)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], list[str]]]:
    """(folder, checkpointed state, what was said) of a run whose first process got to step 40 and whose checkpoint
    is of step 20; the second process makes the steps after 20 again, and goes on to 60."""
    folder, said = tmp_path_factory.mktemp("run"), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.setenv("WANDB_API_KEY", SECRET)
        patch.setenv("WANDB_DATA_DIR", str(folder / "staging"))
        plain: dict[str, Any] = {"folder": folder / "trackers", "run_name": "tiny", "tell": said.append}
        plain |= {"config": {"learning_rate": 0.001, "note": SECRET}, "environment": {"python": "3"}}
        first = Trackers(ALL, **plain)
        first.start()
        first.log_samples(0, [Sample(domain="a", prompt="What?", text="This\nand that")])
        for step in (0, 10, 20, 30, 40):
            first.log(step, {"loss": figures(step)["loss"]} if step == 40 else figures(step))
        state = first.state()
        first.finish(ok=False)
        second = Trackers(ALL, artifacts="checkpoints", **plain)
        second.load(state)
        second.start(resumed_at=20)
        for step in (30, 40, 50, 60):
            second.log(step, figures(step))
        for step in (40, 60):
            checkpoint = folder / f"step-{step:06d}"
            (checkpoint / "run").mkdir(parents=True)
            (checkpoint / "run" / "metrics.jsonl").write_text(f"{step}")
            second.log_checkpoint(checkpoint, step=step, is_best=step == 40)
            shutil.rmtree(checkpoint)  # as the keeper does with old ones
        second.log_samples(60, [Sample(domain="a", prompt="What?", text="Something else")])
        model = folder / "final"
        model.mkdir()
        (model / "adapter.safetensors").write_bytes(b"weights")
        second.log_best_model(model)
        second.finish()
    yield folder, state, said


STEPS = [0, 10, 20, 30, 40, 50, 60]


def test_a_run_says_where_to_look_and_nothing_else(run: tuple[Path, dict[str, Any], list[str]]) -> None:
    folder, _, said = run
    assert sorted(text.split(" ")[0] for text in said) == sorted([f"{name}:" for name in ALL] * 2)
    assert f"tensorboard: tensorboard --logdir {folder / 'trackers' / 'tensorboard'}" in said


def test_tensorboard_has_each_step_once(run: tuple[Path, dict[str, Any], list[str]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _, _ = run
    found = EventAccumulator(str(folder / "trackers" / "tensorboard"), purge_orphaned_data=True)
    found.Reload()
    assert sorted(found.Tags()["scalars"]) == sorted(LOGGED.values())
    for name, shown in LOGGED.items():
        values = {event.step: event.value for event in found.Scalars(shown)}
        assert [event.step for event in found.Scalars(shown)] == STEPS
        assert values == {step: figures(step)[name] for step in STEPS}
    texts = {
        tag: [event.tensor_proto.string_val[0].decode() for event in found.Tensors(tag)]
        for tag in found.Tags()["tensors"]
    }
    assert len(texts["config"]) == len(texts["environment"]) == 1
    assert '"learning_rate": 0.001' in texts["config"][0]
    first, last = texts["samples/a"]
    assert "    What?" in first and "    This\n    and that" in first and "Something else" in last


def test_trackio_has_each_step_once(run: tuple[Path, dict[str, Any], list[str]]) -> None:
    folder, state, _ = run
    script = (
        "import json, trackio.sqlite_storage as s; S = s.SQLiteStorage; (run,) = S.get_runs('dylora-moe');"
        "print(json.dumps([run, S.get_logs('dylora-moe', run), S.get_run_config('dylora-moe', run)], default=str))"
    )
    environment = os.environ | {"TRACKIO_DIR": str(folder / "trackio")}
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    name, lines, config = json.loads(shown.stdout)
    assert name == f"tiny-{state['trackio']}"
    assert config["learning_rate"] == 0.001 and config["environment"] == {"python": "3"}
    for figure, grouped in LOGGED.items():
        found = [(line["step"], line[grouped]) for line in lines if grouped in line]
        assert found == [(step, figures(step)[figure]) for step in STEPS]
    assert [line["step"] for line in lines if "samples/a" in line] == [0, 60]


@pytest.fixture
def wandb_records(run: tuple[Path, dict[str, Any], list[str]]) -> list[Any]:
    folder, state, _ = run
    paths = sorted((folder / "trackers" / "wandb").glob(f"offline-run-*/run-{state['wandb']}.wandb"))
    assert len(paths) == 2
    return [record for path in paths for record in read_wandb(path)]


def test_wandb_is_given_each_step_once(wandb_records: list[Any]) -> None:
    lines = [
        {
            item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in wandb_records
        if record.WhichOneof("record_type") == "history"
    ]
    for figure, grouped in LOGGED.items():
        found = [(line["step"], line[grouped]) for line in lines if grouped in line]
        assert found == [(step, figures(step)[figure]) for step in STEPS]
    assert [line["step"] for line in lines if any(name.startswith("samples") for name in line)] == [0, 60]
    metrics = [record.metric for record in wandb_records if record.WhichOneof("record_type") == "metric"]
    assert ("*", "step") in {(metric.glob_name, metric.step_metric) for metric in metrics}


def test_wandb_goes_on_with_the_run_and_keeps_checkpoints_and_model(
    wandb_records: list[Any], run: tuple[Path, dict[str, Any], list[str]]
) -> None:
    runs = [record.run for record in wandb_records if record.WhichOneof("record_type") == "run"]
    assert len({run.run_id for run in runs}) == 1 and {run.display_name for run in runs} == {"tiny"}
    config = {update.key: update.value_json for update in runs[0].config.update}
    assert config["learning_rate"] == "0.001" and config["environment"] == '{"python":"3"}'
    (model,) = artifacts(wandb_records, "model")
    assert model.name == "tiny-model" and set(model.aliases) == {"latest", "best"}
    assert [entry.path for entry in model.manifest.contents] == ["adapter.safetensors"]
    checkpoints = artifacts(wandb_records, "checkpoint")
    assert [(artifact.name, sorted(artifact.aliases)) for artifact in checkpoints] == [
        ("tiny-checkpoint", ["best", "latest", "step-000040"]),
        ("tiny-checkpoint", ["latest", "step-000060"]),
    ]
    files = [(entry.path, Path(entry.local_path)) for artifact in checkpoints for entry in artifact.manifest.contents]
    assert [(name, path.read_text()) for name, path in files] == [("run/metrics.jsonl", str(n)) for n in (40, 60)]
    assert not list((run[0] / "trackers" / "wandb-checkpoints").iterdir())
    exits = [record.exit.exit_code for record in wandb_records if record.WhichOneof("record_type") == "exit"]
    assert exits == [1, 0]


def test_wandb_is_given_nothing_else(wandb_records: list[Any], run: tuple[Path, dict[str, Any], list[str]]) -> None:
    kinds = {record.WhichOneof("record_type") for record in wandb_records}
    assert not kinds & {"stats", "output", "output_raw"}
    sent = {path.name for path in run[0].glob("trackers/wandb/offline-run-*/files/**/*") if path.is_file()}
    assert all(name.endswith(".table.json") for name in sent)
    assert not any(record.run.git.ByteSize() for record in wandb_records if record.WhichOneof("record_type") == "run")


def test_no_secret_is_in_any_file(run: tuple[Path, dict[str, Any], list[str]]) -> None:
    """Though one was in the settings."""
    files = [path for path in run[0].rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_secrets_are_hidden_where_the_environment_names_them() -> None:
    environ = {"HF_TOKEN": "hf_abcdefghijkl", "TOKEN": "1", "HOME": "/home/somebody"}
    assert hide_secrets("1 hf_abcdefghijkl /home/somebody", environ) == "1 *** /home/somebody"


def test_messages_go_there_and_back() -> None:
    start = Start(run_name="a", run_id="b", resumed_at=None, folder="c", config={"x": [1]}, environment={})
    samples = Samples(step=3, samples=(Sample(domain="a", prompt="p\nq", text="\u2028"),))
    for message in (start, samples, Figures(step=1, figures={"loss": 0.5})):
        line = encode(message)
        assert line.count(b"\n") == 1 and decode(line) == message


def test_what_was_sent_is_not_sent_again(tmp_path: Path) -> None:
    path = tmp_path / "sent.json"
    sent = Sent(path, "run")
    assert sent.new("figures", 10, {"a": 1}) == {"a": 1}
    sent.add("figures", 10, {"a": 1})
    again = Sent(path, "run")
    assert again.new("figures", 9, {"b": 1}) == {}
    assert again.new("figures", 10, {"a": 1, "b": 2}) == {"b": 2}
    again.add("figures", 10, {"b": 2})
    assert again.new("figures", 10, {"a": 1, "b": 2}) == {}
    assert again.new("samples", 0, {"x": 1}) == {"x": 1}
    assert Sent(path, "another run").new("figures", 1, {"a": 1}) == {"a": 1}
    path.write_text("{")
    assert Sent(path, "run").new("figures", 1, {"a": 1}) == {"a": 1}


def test_what_is_missing_is_found_before_the_run() -> None:
    check_trackers(())
    check_trackers(ALL, {"WANDB_API_KEY": SECRET})
    check_trackers(["wandb"], {"WANDB_MODE": "offline"})
    with pytest.raises(ConfigError, match=r"WANDB_API_KEY .* WANDB_MODE=offline"):
        check_trackers(["wandb"], {})
    with pytest.raises(ConfigError, match=r"pip install no_such_tracker, or pip install \"dylora-moe\[trackers\]\""):
        check_trackers(["no_such_tracker"])


def test_no_tracker_is_nothing(make: Callable[..., Trackers]) -> None:
    trackers = make()
    trackers.start()
    trackers.log(0, {"loss": 1.0})
    trackers.finish()
    assert trackers.state() == {}


def test_training_draws_the_same_random_numbers(make: Callable[..., Trackers]) -> None:
    before = random.getstate()
    trackers = make("tensorboard")
    trackers.start()
    trackers.log(0, {"loss": 1.0})
    trackers.finish()
    assert random.getstate() == before


# A tracker's process that does nothing but answer; %s is what it does instead at the third message.
SCRIPT = """
import os, sys, time
for number, line in enumerate(sys.stdin):
    if number == 2:
        %s
    print('{"error": null, "say": []}', flush=True)
"""
FAILURES = {
    "raises": ('print(\'{"error": "OSError: no room", "say": []}\', flush=True); continue', "OSError: no room"),
    "hangs": ("time.sleep(600)", "did not answer within 1 s"),
    "dies": ("os._exit(3)", "its process ended with exit code 3"),
    "crashes": ("os.abort()", "its process ended with exit code -6"),
    "babbles": ("print('[wandb] hello', flush=True); continue", "Expecting value"),
    "says nothing more": ("os.close(1); time.sleep(600)", "its process answers no more"),
}


@pytest.fixture
def channel(tmp_path: Path, said: list[str]) -> Iterator[Callable[..., Channel]]:
    made: list[Channel] = []

    def build(what: str, **limits: float) -> Channel:
        command = [sys.executable, "-S", "-c", SCRIPT % what]
        patience = Limits(**{"start": 10, "log": 1, "finish": 5} | limits)
        log = tmp_path / "x.log"
        made.append(Channel("x", command=command, log=log, advice="Mend it.", tell=said.append, limits=patience))
        return made[-1]

    yield build
    for one in made:
        one.finish(ok=False, seconds=1)


START = Start(run_name="a", run_id="b", resumed_at=None, folder="c", config={}, environment={})


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_tracker_that_fails_is_told_once_and_off(
    channel: Callable[..., Channel], said: list[str], failure: str
) -> None:
    what, reason = FAILURES[failure]
    tracker = channel(what)
    began = time.monotonic()
    tracker.send(START)
    for step in range(500):
        tracker.send(Figures(step=step, figures={"loss": 1.0}))
    assert time.monotonic() - began < 0.5  # nothing waits for it
    wait_for(lambda: not tracker.is_on)
    tracker.send(Figures(step=501, figures={"loss": 1.0}))
    tracker.finish(ok=True)
    (line,) = said
    assert "\n" not in line and line.startswith("x is off from here on: ") and line.endswith("all figures. Mend it.")
    assert re.search(reason, line)
    assert tracker._process is not None and tracker._process.poll() is not None


def test_a_tracker_that_hangs_at_the_end_is_ended(channel: Callable[..., Channel], said: list[str]) -> None:
    tracker = channel("time.sleep(600)", log=100, finish=1)
    tracker.send(START)
    tracker.send(Figures(step=0, figures={}))
    began = time.monotonic()
    tracker.finish(ok=True)
    assert time.monotonic() - began < 4
    assert len(said) == 1 and "did not answer within 1 s" in said[0]
    tracker.finish(ok=True)  # nothing to do any more
    assert tracker._process is not None and tracker._process.poll() is not None


def test_a_program_that_cannot_start_is_told(tmp_path: Path, said: list[str]) -> None:
    command = [str(tmp_path / "none")]
    tracker = Channel("x", command=command, log=tmp_path / "l", advice="Mend it.", tell=said.append, limits=Limits())
    tracker.send(START)
    tracker.finish(ok=True)
    assert len(said) == 1 and "No such file" in said[0]


def test_servers_that_never_answer_end_no_run(
    make: Callable[..., Trackers], said: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The real libraries against a port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as hole:
        address = f"http://127.0.0.1:{hole.getsockname()[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
        monkeypatch.setenv("TRACKIO_SERVER_URL", f"{address}/?write_token={SECRET}")
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
        trackers = make("wandb", "trackio", limits=Limits(start=4))
        trackers.start()
        began = time.monotonic()
        trackers.log(0, {"loss": 1.0})
        assert time.monotonic() - began < 0.2
        trackers.finish()
        assert time.monotonic() - began < 12
    assert sorted(text.split(" is off")[0] for text in said) == ["trackio", "wandb"]
    assert all("did not answer within 4 s" in text and SECRET not in text for text in said)


def test_a_folder_that_cannot_be_written_ends_no_run(
    make: Callable[..., Trackers], said: list[str], tmp_path: Path
) -> None:
    (tmp_path / "trackers").write_text("a file where the folder should be")
    trackers = make("tensorboard")
    trackers.start()
    trackers.log(0, {"loss": 1.0})
    trackers.finish()
    (line,) = said
    assert "is off from here on" in line and "can be written and its disk has room" in line


def test_a_full_disk_ends_no_run(make: Callable[..., Trackers], said: list[str]) -> None:
    """The system's limit on the size of a file stands for a full disk: writing fails in the same way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trackers = make("tensorboard")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        trackers.start()  # whose process has the limit from now on
        wait_for(lambda: bool(said))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for step in range(300):
        trackers.log(step, {f"figure_{number}": 1.0 for number in range(10)})
    trackers.finish()
    assert len(said) == 2 and "tensorboard is off from here on" in said[1] and "File too large" in said[1]


def test_a_killed_run_leaves_what_it_gave_and_no_process(tmp_path: Path) -> None:
    script = """
import os, signal, sys, time
from pathlib import Path
from dylora_moe.train.trackers import Trackers
folder = Path(sys.argv[1])
trackers = Trackers(["tensorboard"], folder=folder, run_name="a", config={}, environment={}, tell=lambda text: None)
trackers.start()
trackers.log(7, {"loss": 0.25})
channel = trackers._channels[0]
while not channel._queue.empty():
    time.sleep(0.01)
time.sleep(0.2)
print(channel._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    process = Path("/proc") / done.stdout.strip()
    if Path("/proc/self").exists():
        wait_for(lambda: not process.exists() or "\nState:\tZ" in (process / "status").read_text())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tensorboard"))
    wait_for(lambda: bool(found.Reload().Tags()["scalars"]))
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(7, 0.25)]
