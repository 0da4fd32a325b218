"""`dylora experts`: what there is, and one expert as a plain PEFT adapter that needs none of this package."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.cli.conftest import finish, start_python
from tests.tiny import settings, write_base, write_rows

from dylora_moe.evaluate.load import load_run

Run = Callable[..., Any]
STOCK = """
import json, sys
class Never:
    def find_spec(self, name, *rest):
        assert not name.startswith("dylora_moe"), "stock PEFT must do"
sys.meta_path.insert(0, Never())
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    logits = model(input_ids=torch.arange(2, 14)[None]).logits
assert not [name for name in sys.modules if name.startswith("dylora_moe")]
print(json.dumps(logits.tolist()))
"""


def test_the_list_is_of_all_experts(dylora: Run, finished: Any) -> None:
    experts = dylora("experts", "list", finished.folder, "--json").json()
    routing = finished.result["after"]["routing"]
    assert [expert["name"] for expert in experts] == ["expert_0", "expert_1", "expert_2"]
    assert [expert["load"] for expert in experts] == routing["load"]
    for place, expert in enumerate(experts):
        assert (expert["rank"], expert["alpha"], expert["maturity"], expert["frozen"]) == (8, 16, 1.0, False)
        file = finished.folder / "final" / "experts" / expert["name"] / "adapter_model.safetensors"
        assert expert["bytes"] == file.stat().st_size
        shares = [row[place] for row in routing["table"]]
        if max(shares) > 0:
            assert expert["serves"].startswith(f"mostly {routing['domains'][shares.index(max(shares))]} (")


def test_a_model_folder_has_a_list_too(dylora: Run, finished: Any) -> None:
    listed = [dylora("experts", "list", each, "--json").json() for each in (finished.folder, finished.folder / "final")]
    of_run, of_model = listed
    assert [expert["load"] for expert in of_model] == [None] * 3 and of_run[0]["load"] is not None
    for expert in (*of_run, *of_model):
        del expert["load"], expert["serves"]
    assert of_model == of_run
    outcome = dylora("experts", "list", finished.folder.parent / "typo")
    assert outcome.code == 1 and "no such folder" in outcome.err


def test_people_read_a_table(dylora: Run, finished: Any) -> None:
    outcome = dylora("experts", "list", finished.folder)
    assert outcome.code == 0 and outcome.err == "" and "serves" in outcome.out and "expert_2" in outcome.out


def test_an_exported_expert_is_the_same_in_stock_peft(dylora: Run, finished: Any, tmp_path: Path) -> None:
    output = tmp_path / "mine"
    told = dylora("experts", "export", finished.folder, "--expert", "expert_1", "--output", output, "--json").json()
    assert told == {"experts": {"expert_1": str(output)}, "base": str(finished.base), "difference": None}
    weights = ["adapter_config.json", "adapter_model.safetensors"]
    tokenizer = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in output.iterdir()) == weights + tokenizer
    for name in tokenizer:
        assert (output / name).read_bytes() == (finished.folder / "final" / name).read_bytes()
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == str(finished.base)

    out, err = finish(start_python(STOCK, told["base"], output))
    assert out, err[-2000:]
    model = load_run(finished.folder, progress=lambda line: None).model
    ids = torch.arange(2, 14)[None]
    with torch.no_grad(), model.forced("expert_1"):
        expected = model(input_ids=ids).logits
        with model.disabled():
            alone = model(input_ids=ids).logits
    torch.testing.assert_close(torch.tensor(json.loads(out)), expected, rtol=1e-5, atol=1e-5)
    assert float((expected - alone).abs().max()) > 1e-2


def test_the_lines_it_shows_are_python(dylora: Run, finished: Any, tmp_path: Path) -> None:
    outcome = dylora("experts", "export", finished.folder, "--expert", "expert_0", "--output", tmp_path / "mine")
    lines = [line.strip() for line in outcome.out.splitlines() if line.startswith("  ")]
    assert len(lines) == 4 and str(tmp_path / "mine") in outcome.out
    compile("\n".join(lines), "shown", "exec")
    config = json.loads((tmp_path / "mine" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(finished.base), "which the lines load"


def test_nothing_is_overwritten(dylora: Run, finished: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    outcome = dylora("experts", "export", finished.folder, "--expert", "expert_0", "--output", tmp_path)
    assert outcome.code == 1 and "must be new or empty" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_expert_that_is_not_there_is_told(dylora: Run, finished: Any, tmp_path: Path) -> None:
    outcome = dylora("experts", "export", finished.folder, "--expert", "nobody", "--output", tmp_path / "mine")
    assert outcome.code == 1 and "no expert 'nobody'" in outcome.err and "expert_0, expert_1, expert_2" in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("base", ["/nowhere", "pypi:smollm2"])
def test_an_export_needs_no_base(
    dylora: Run, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    """Not even the package index, for an embedded one that this machine has never converted."""
    monkeypatch.setenv("DYLORA_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    copy = Path(shutil.copytree(finished.folder, tmp_path / "copy"))
    file = copy / "final" / "dylora_moe.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base": base}))
    outcome = dylora("experts", "export", copy, "--expert", "expert_0", "--output", tmp_path / "mine", "--json")
    assert outcome.json()["base"] == base and not (tmp_path / "empty").exists()
    assert ("is not converted on this machine" in outcome.err) == base.startswith("pypi:")
    assert (tmp_path / "mine" / "adapter_config.json").is_file()


def test_a_file_in_the_place_of_the_output_is_left_alone(dylora: Run, finished: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    outcome = dylora("experts", "export", finished.folder, "--expert", "expert_0", "--output", tmp_path / "mine")
    assert outcome.code == 1 and "must be new or empty" in outcome.err
    assert (tmp_path / "mine").read_text() == "mine"


def test_the_experts_of_a_stream_are_changed_and_taken_back(dylora: Run, tmp_path: Path) -> None:
    rows = write_rows(tmp_path)
    values = settings(write_base(tmp_path / "base"), {}, tmp_path / "runs") | {"mode": "continual", "max_steps": 2}
    values |= {"skills": [str(rows[name]) for name in ("capitals", "sums")], "validation_split": 0.1}
    del values["datasets"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    trained = dylora("train", recipe, "--json").json()
    run = Path(trained["run"])

    merged = dylora("experts", "merge", run, "--into", "sums", "--expert", "capitals")
    assert merged.code == 0 and "sums, capitals became sums" in merged.out and "3 skills" not in merged.out
    (expert,) = dylora("experts", "list", run, "--json").json()
    assert expert["name"] == "sums" and "capitals (loss" in expert["serves"] and "sums (loss" in expert["serves"]
    refused = dylora("experts", "remove", run, "--expert", "sums")
    assert refused.code == 1 and "sums serves capitals, sums" in refused.err
    assert dylora("experts", "rollback", run, "--before", "03-merge", "--json").json()["undone"] == ["03-merge"]

    adapter = tmp_path / "lora"
    assert dylora("experts", "export", run, "--expert", "sums", "--output", adapter).code == 0
    taken = dylora(
        "experts", "import", run, "--adapter", adapter, "--skill", "code", "--data", rows["functions"], "--json"
    ).json()
    assert taken["experts"] == ["capitals", "sums", "code"] and taken["stages"][-1]["decision"]["kind"] == "import"
    removed = dylora("experts", "remove", run, "--expert", "code", "--skills-to", "sums", "--json").json()
    assert removed["experts"] == ["capitals", "sums"] and removed["summary"]["skills"] == ["capitals", "sums", "code"]
    assert "By hand: code was removed. Expert sums serves code now." in (run / "report.html").read_text()

    dylora("push", run, "me/mine", "--dry-run", tmp_path / "sent")
    card = (tmp_path / "sent" / "README.md").read_text(encoding="utf-8")
    skills = json.loads((run / "skills.json").read_text(encoding="utf-8"))["skills"]
    losses = removed["summary"]["loss"]["matrix"][-1]
    for skill, loss in zip(skills, losses, strict=True):
        assert f"| {skill['name']} | {skill['base_loss']:.3f} | {loss:.3f} |" in card
    for name in ("capitals", "sums"):  # code came as an adapter, and its rows were not trained on
        assert f"| {name} | {rows[name].name} | " in card
    assert "validation rows of capitals, sums, code alone" in card
    assert "the expert of the nearest known skill" in card and "| | capitals | sums |" in card
    assert str(tmp_path) not in card


def test_vllm_gets_its_command(dylora: Run, finished: Any, tmp_path: Path) -> None:
    output = tmp_path / "two words"
    told = dylora("experts", "export", finished.folder, "--all", "--for", "vllm", "--output", output, "--json").json()
    words = shlex.split(told["command"])
    assert words[:3] == ["vllm", "serve", str(finished.base)]
    assert words[words.index("--max-lora-rank") + 1] == "8"
    assert words[words.index("--chat-template") + 1] == str(output / "expert_0" / "chat_template.jinja")
    modules = words[words.index("--lora-modules") + 1 :]
    assert modules == [f"expert_{index}={output / f'expert_{index}'}" for index in range(3)]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "Name experts by --expert, or take --all"),
        (["--all", "--expert", "expert_0"], "or take --all"),
        (["--all", "--gguf", "f16"], "need --merged"),
        (["--all", "--merged", "--for", "vllm"], "for adapters"),
        (["--all", "--method", "ties"], "need --merged"),
        (["--expert", "expert_0=0.5"], "need --merged"),
        (["--merged", "--all", "--density", "0.3"], "for --method ties and dare"),
        (["--merged", "--all", "--llama-cpp", "."], "needs --gguf"),
        (["--merged", "--expert", "expert_0=much"], "must be a number"),
        (["--merged", "--expert", "expert_0=1", "--expert", "expert_1"], "a weight or none"),
        (["--merged", "--expert", "expert_0", "--expert", "expert_0"], "each expert once"),
    ],
)
def test_what_makes_no_sense_is_a_wrong_command_line(
    dylora: Run, finished: Any, tmp_path: Path, arguments: list[str], problem: str
) -> None:
    outcome = dylora("experts", "export", finished.folder, "--output", tmp_path / "out", *arguments)
    assert outcome.code == 2 and problem in outcome.err and not (tmp_path / "out").exists()


def test_a_push_that_sends_nothing_shows_what_it_would_send(dylora: Run, finished: Any, tmp_path: Path) -> None:
    told = dylora("push", finished.folder, "me/mine", "--dry-run", tmp_path / "out", "--json").json()
    assert told["private"] is True and told["address"] is None
    names = [file["name"] for file in told["files"]]
    assert names == sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    assert "README.md" in names and "dylora_moe.json" in names and not [name for name in names if ".jsonl" in name]
