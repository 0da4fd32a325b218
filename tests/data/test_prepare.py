"""Rows are prepared once for the same content, template, tokenizer and settings, whoever asks, in bounded memory."""

import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dylora_moe.data import build as build_module
from dylora_moe.data.build import build_data
from dylora_moe.data.settings import DataSettings
from dylora_moe.data.stored import Rows
from dylora_moe.data.templates import PLAIN_TEMPLATE
from dylora_moe.errors import CacheError, DataError

WORDS = ["".join(random.Random(number).choices("abcdefghij", k=2 + number % 7)) for number in range(500)]


def make_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=alphabet, vocab_size=vocab_size)
    core.train_from_iterator([" ".join(WORDS)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def write(path: Path, numbers: range) -> str:
    rows = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def folder_of(*arguments: object, **settings: object) -> Path:
    return build_data(*arguments, DataSettings(**{"max_length": 200, **settings})).removed_file.parent  # type: ignore[arg-type]


def stamps(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir() if file.name != "manifest.json"}


def test_what_was_prepared_is_used_again(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", range(40))
    first = folder_of([path], tokenizer)
    before = stamps(first)
    assert len(before) >= 6
    assert folder_of([path], tokenizer) == first and stamps(first) == before
    other = make_tokenizer()  # another object that says the same
    assert folder_of([{"path": path}], other) == first and stamps(first) == before


@pytest.mark.parametrize(
    "change",
    [
        *("content", "template", "tokenizer", "label list", "another file"),
        *("max_length", "overlong", "learn", "validation_split", "training_subset", "eval_subset", "seed"),
        *("domain", "num_examples", "columns"),
    ],
)
def test_whatever_could_change_a_row_prepares_anew(tmp_path, change):
    tokenizer = make_tokenizer()
    path = write(tmp_path / "a.jsonl", range(40))
    first = folder_of([path], tokenizer)
    entries: list[dict[str, object]] = [{"path": path}]
    settings: dict[str, object] = {
        "max_length": {"max_length": 201},
        "overlong": {"overlong": "drop"},
        "learn": {"learn": "all"},
        "validation_split": {"validation_split": 0.2},
        "training_subset": {"training_subset": 50},
        "eval_subset": {"eval_subset": 50},
        "seed": {"seed": 1},
    }.get(change, {})
    if change == "content":
        text = Path(path).read_text().replace("answer 7", "answer 8")
        times = Path(path).stat()
        Path(path).write_text(text)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # size and time say nothing
    elif change == "template":
        tokenizer.chat_template = PLAIN_TEMPLATE.replace("###", "##")
    elif change == "tokenizer":
        tokenizer = make_tokenizer(280)
    elif change == "label list":
        (tmp_path / "labels.json").write_text('["yes", "no"]')
    elif change == "another file":
        entries.append({"path": write(tmp_path / "b.jsonl", range(40, 50))})
    else:
        more = {"domain": "other", "num_examples": 39, "columns": {"prompt": "completion", "completion": "prompt"}}
        entries[0] |= {change: more[change]} if change in more else {}
    assert folder_of(entries, tokenizer, **settings) != first


def test_bad_data_leaves_nothing_and_is_told_again(tmp_path, tokenizer, own_cache):
    path = tmp_path / "a.jsonl"
    write(path, range(40))
    path.write_text(path.read_text() + '{"prompt": "no answer"}\n')
    before = sorted(each for each in (own_cache / "data").glob("*") if each.is_dir())
    for _ in range(2):
        with pytest.raises(DataError, match="1 of 41 do not"):
            folder_of([str(path)], tokenizer)
    assert sorted(each for each in (own_cache / "data").glob("*") if each.is_dir()) == before
    write(path, range(41))
    assert folder_of([str(path)], tokenizer).is_dir()


def test_a_column_name_that_is_no_text_is_no_problem(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    row = '{"prompt": "question %d", "completion": "answer", "col\\ud800": 1}\n'
    path.write_text("".join(row % number for number in range(20)))
    data = build_data([str(path)], tokenizer, DataSettings(max_length=200))
    assert data.summary.domains[0].formats == ("prompt_completion (by columns prompt, completion, col\\ud800)",)


def test_data_that_changes_while_it_is_prepared_is_not_kept(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("dylora_moe.data.prepare._SECONDS", 0.0)
    path = tmp_path / "a.jsonl"
    write(path, range(40))
    with pytest.raises(DataError, match="must stay as it is while it is prepared"):
        build_data([str(path)], tokenizer, DataSettings(max_length=200), tell=lambda line: write(path, range(30)))
    write(path, range(40))
    data = build_data([str(path)], tokenizer, DataSettings(max_length=200))
    assert len(data.train) + len(data.validation["a"]) == 40


def test_what_cannot_be_encoded_is_left_out_like_any_bad_row(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    write(path, range(40))
    path.write_text(path.read_text() + '{"prompt": "half \\ud83d of it", "completion": "x"}\n')
    data = build_data([{"path": str(path), "on_bad_row": "skip"}], tokenizer, DataSettings(max_length=200))
    (removed,) = map(json.loads, data.removed_file.read_text().splitlines())
    assert removed["row"]["prompt"] == "half \ud83d of it" and "surrogate" in removed["reason"]


def test_a_row_that_speaks_of_a_full_disk_fills_none(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    write(path, range(40))
    row = {"prompt": "No space left on device: what now?", "completion": "a<eos>b"}
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    with pytest.raises(DataError, match="an answer must not contain the end token"):
        build_data([str(path)], tokenizer, DataSettings(max_length=200))


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, tokenizer, own_cache):
    path = write(tmp_path / "a.jsonl", range(2000))
    before = sorted((own_cache / "data").glob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CacheError, match=r"disk, quota or file size limit of .* was reached; nothing half-written"):
            folder_of([path], tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [each for each in sorted((own_cache / "data").glob("*")) if each not in before and each.is_dir()] == []
    assert len(build_data([path], tokenizer, DataSettings(max_length=200)).train) == 1800


def _prepare(path: str, start: "multiprocessing.synchronize.Event", found: "multiprocessing.Queue[str]") -> None:
    start.wait(60)
    found.put(str(folder_of([path], make_tokenizer())))


def test_processes_that_start_together_prepare_once(tmp_path):
    path = write(tmp_path / "a.jsonl", range(3000))
    spawn = multiprocessing.get_context("fork")
    start, found = spawn.Event(), spawn.Queue()
    workers = [spawn.Process(target=_prepare, args=(path, start, found)) for _ in range(3)]
    for worker in workers:
        worker.start()
    start.set()
    folders = {found.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join(60)
    (folder,) = folders
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert not list(Path(folder).parent.glob("*.part"))
    data = build_data([path], make_tokenizer(), DataSettings(max_length=200))
    assert len(data.train) + len(data.validation["a"]) == 3000 and str(data.removed_file.parent) == folder


def test_too_long_rows_that_are_dropped_are_written_down(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    write(path, range(40))
    path.write_text(path.read_text() + json.dumps({"prompt": "long", "completion": "word " * 300}) + "\n")
    data = build_data([str(path)], tokenizer, DataSettings(max_length=200, overlong="drop"))
    (removed,) = map(json.loads, data.removed_file.read_text().splitlines())
    assert removed["reason"].startswith("overlong: ") and "max_length is 200" in removed["reason"]
    assert removed["row"][0] == {"role": "user", "content": "long"} and data.summary.domains[0].num_overlong == 1


def test_rows_are_not_held_in_memory(tmp_path, tokenizer):
    data = build_data([write(tmp_path / "a.jsonl", range(100))], tokenizer, DataSettings(max_length=200))
    assert isinstance(data.train, Rows) and data.train[0] is not data.train[0]
    assert data.train.lengths.tolist() == [len(row) for row in data.train]
    assert set(data.train.domains.tolist()) == {0}


def test_long_work_tells_how_far_it_is(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("dylora_moe.data.prepare._SECONDS", 0.0)
    lines: list[str] = []
    path = write(tmp_path / "a.jsonl", range(600))
    build_module.build_data([path], tokenizer, DataSettings(max_length=200), tell=lines.append)
    assert "reading: 600 examples" in lines and "tokenising: 600 rows" in lines


MEASURED = """
import resource, sys
from dylora_moe.data.build import build_data
from dylora_moe.data.settings import DataSettings
from tests.data.test_prepare import make_tokenizer
settings = DataSettings(max_length=100_000)
data = build_data([sys.argv[1]], make_tokenizer(2000), settings, tell=lambda line: print(line, flush=True))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(len(data.train) + sum(map(len, data.validation.values())), int(data.train.lengths.sum()), peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux")
def test_two_gigabytes_are_prepared_in_bounded_memory(tmp_path, own_cache):
    """About 50 minutes. Copies and rows of other kinds are among them, as in real data."""
    path, size, count = tmp_path / "rows.jsonl", 0, 0
    draw = random.Random(0)
    with path.open("w") as file:
        while size < 2_000_000_000:
            prompt, answer = (" ".join(draw.choices(WORDS, k=number)) for number in (150, 650))
            line = json.dumps({"prompt": f"{prompt} {count}", "completion": answer}) + "\n"
            for _ in range(2 if count % 100 == 0 else 1):
                file.write(line)
                size += len(line)
            count += 1
    environment = {**os.environ, "DYLORA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path)], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    rows, tokens, peak = done.stdout.splitlines()[-1].split()
    print(f"{path.stat().st_size / 1e9:.2f} GB, {rows} rows, {int(tokens):,} training tokens: peak {peak} GB")
    assert int(rows) == count
    assert float(peak) < 1.5
