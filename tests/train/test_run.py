"""Whole runs on the tiny base: what they leave in their folder, what they leave alone, and what stops them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dylora_moe.config import RunConfig, load_recipe, make_config
from dylora_moe.data.batching import Collator
from dylora_moe.errors import ConfigError, DataError, RunError, TunerError
from dylora_moe.run_dir import RunDir
from dylora_moe.train import session as session_module
from dylora_moe.train.run import train
from dylora_moe.train.session import Stages, calibrate_router, prepare

DOMAINS = ["capitals", "functions", "sums"]
EXPERTS = ["expert_0", "expert_1", "expert_2"]
SHORT = {"max_steps": 2, "sample_tokens": 0, "eval_subset": 40, "warmup_ratio": 0}


def hashes(folder: Path) -> dict[str, str]:
    """Path -> hash of every file but the lock."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def adapters(run_dir: Path) -> dict[str, torch.Tensor]:
    found = {
        f"{path.parent.name}/{key}": value
        for path in sorted((run_dir / "final" / "experts").glob("*/*.safetensors"))
        for key, value in load_file(path).items()
    }
    router = run_dir / "final" / "router.safetensors"
    return found | (load_file(router) if router.is_file() else {})


class TestFolder:
    """One finished run of five steps, evaluated every two, logged every two."""

    def test_it_holds_these_files(self, finished: Any) -> None:
        _, run, _ = finished
        expected = {"config.yaml", "environment.json", "data.json", "metrics.jsonl", "routing.jsonl", "samples.jsonl"}
        for step in (2, 4, 5):  # the best evaluation each time, the last also the last step
            folder = f"checkpoints/step-{step:06d}"
            expected |= {f"{folder}/{name}.safetensors" for name in ("weights", "optimizer", "loop")}
            expected |= {f"{folder}/{name}.json" for name in ("manifest", "state", "trainer_state")}
            copied = ("config.yaml", "environment.json", "data.json", "start.json", "metrics.jsonl", "routing.jsonl")
            expected |= {f"{folder}/run/{name}" for name in copied}
        expected |= {
            "start.json",
            "result.json",
            "final/dylora_moe.json",
            "final/router.safetensors",
            "final/chat_template.jinja",
        }
        expected |= {"final/tokenizer.json", "final/tokenizer_config.json"}
        files = ("adapter_config.json", "adapter_model.safetensors")
        expected |= {f"final/experts/{name}/{file}" for name in EXPERTS for file in files}
        assert set(hashes(run.path)) == expected

    def test_its_settings_make_the_same_run_again(self, finished: Any) -> None:
        config, run, _ = finished
        again = make_config(load_recipe(run / "config.yaml"))
        assert again == config.model_copy(update={"preset": again.preset}) and again.preset != "auto"

    def test_its_data_is_described(self, finished: Any) -> None:
        _, run, _ = finished
        domains = run.read("data.json")["domains"]
        samples = run.read("data.json")["samples"]
        assert {name: len(rows) for name, rows in samples.items()} == {domain["domain"]: 3 for domain in domains}
        assert [each["domain"] for each in domains] == DOMAINS
        assert [(each["num_train"], each["num_validation"]) for each in domains] == [(18, 6)] * 3

    def test_its_losses_fall_from_start_to_end(self, finished: Any) -> None:
        config, run, result = finished
        assert result == run.read("result.json") and result["steps"] == 5 and result["base_model"] == config.base_model
        for before, after in zip(result["before"]["domains"], result["after"]["domains"], strict=True):
            assert after["loss"] < before["loss"] and after["domain"] == before["domain"]
        assert [part["part"] for part in result["parameters"]] == ["base", "router", *EXPERTS]

    def test_it_is_evaluated_at_the_start_at_intervals_and_at_the_end(self, finished: Any) -> None:
        _, run, result = finished
        lines = [line for line in run.read_lines("metrics.jsonl") if "eval_loss" in line]
        assert [line["step"] for line in lines] == [0, 2, 4, 5]
        for line, record in ((lines[0], result["before"]), (lines[-1], result["after"])):
            assert line["eval_loss"] == record["mean_loss"]
            assert [line[f"eval_{domain}_loss"] for domain in DOMAINS] == [each["loss"] for each in record["domains"]]

    def test_its_steps_are_logged_with_time_and_routing(self, finished: Any) -> None:
        _, run, result = finished
        lines = [line for line in run.read_lines("metrics.jsonl") if "loss" in line]
        assert [line["step"] for line in lines] == [2, 4]
        for line in lines:
            assert line["tokens_per_second"] > 0 and line["grad_norm"] > 0 and line["learning_rate"] > 0
            assert sum(line[f"load_{name}"] for name in EXPERTS) == pytest.approx(1)
            assert 0 <= line["load_entropy"] <= 1 and 0 <= line["router_entropy"] <= 1
            assert line["balance_loss"] > 0 and line["dead_experts"] in (0, 1, 2)
        assert 0 < lines[0]["tokens"] < lines[1]["tokens"] < result["tokens"]
        assert lines[0]["seconds"] < lines[1]["seconds"] and lines[1]["epoch"] == pytest.approx(4 / 9)

    def test_what_each_domain_gave_is_recorded(self, finished: Any) -> None:
        _, _, result = finished
        assert [each["domain"] for each in result["trained"]] == DOMAINS
        assert sum(each["rows"] for each in result["trained"]) == 5 * 6
        assert sum(each["tokens"] for each in result["trained"]) == result["tokens"]

    def test_routing_of_both_splits_is_recorded(self, finished: Any) -> None:
        _, run, result = finished
        records = run.read_lines("routing.jsonl")
        order = [(0, "validation"), (2, "train"), (2, "validation"), (4, "train"), (4, "validation"), (5, "validation")]
        assert [(record["step"], record["split"]) for record in records] == order
        assert all(record["experts"] == EXPERTS and record["domains"] == DOMAINS for record in records)
        assert records[-1]["table"] == result["after"]["routing"]["table"]
        assert [record["units"] for record in records if record["split"] == "train"] == [12, 12]

    def test_the_same_prompts_are_answered_before_and_after(self, finished: Any) -> None:
        _, run, result = finished
        samples = run.read_lines("samples.jsonl")
        assert [(each["step"], each["domain"]) for each in samples] == [(s, d) for d in DOMAINS for s in (0, 5)]
        for sample, domain in zip(result["samples"], DOMAINS, strict=True):
            assert sample["domain"] == domain and sample["before"]["prompt"] == sample["after"]["prompt"]
            assert sample["before"]["tokens"] <= 6 and set(sample["after"]["routing"]) == set(EXPERTS)
        assert any(sample["before"]["text"] != sample["after"]["text"] for sample in result["samples"])

    def test_the_base_is_recorded_and_its_files_are_untouched(self, finished: Any, tiny_base: Path) -> None:
        config, run, _ = finished
        assert json.loads((run / "final" / "dylora_moe.json").read_text())["base"] == str(tiny_base)
        before = hashes(tiny_base)
        train(make_config(config.model_dump() | SHORT | {"run_name": "again"}))
        assert hashes(tiny_base) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 1, "lora_r": 4, "target_modules": "attention"},
        {"granularity": "token", "top_k": 2, "z_coefficient": 1e-3, "target_modules": "all-linear"},
        {"granularity": "token", "router_scope": "per_layer", "execution": "bottleneck"},
        {"tap_layer": 1, "use_rslora": True, "target_modules": ["q_proj", "down_proj"], "execution": "reference"},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "batch_size": 3, "lora_dropout": 0},
        {"bf16": True, "learning_rate": 3e-2},
    ],
    ids=str,
)
def test_a_run_of_every_kind_learns(tiny_config: Callable[..., RunConfig], changes: dict[str, Any]) -> None:
    config = tiny_config(**SHORT | changes)
    result = train(config)
    assert result["steps"] == 2 and result["after"]["mean_loss"] < result["before"]["mean_loss"] - 0.05
    weights = adapters(config.run_dir)
    assert all(value.isfinite().all() for value in weights.values())
    learned = [value for key, value in weights.items() if "lora_B" in key]
    layers = 1 if config.tap_layer else 2
    linears = {"attention": 4, "all-linear": 7}.get(str(config.target_modules), 2)
    assert len(learned) == config.num_experts * layers * linears
    assert sum(bool(value.any()) for value in learned) > len(learned) / 2
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert (result["after"]["routing"] is None) is (config.num_experts == 1)


def test_domains_are_mixed_as_they_are_weighed(tiny_config: Callable[..., RunConfig]) -> None:
    weights = {"capitals": 7, "functions": 1, "sums": 1}
    result = train(tiny_config(**SHORT | {"domain_weights": weights, "max_steps": None, "num_epochs": 1}))
    assert [each["rows"] for each in result["trained"]] == [42, 6, 6]


def test_mixing_that_cannot_be_stops_before_anything_is_written(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config(interleaved_sampling=True)
    with pytest.raises(DataError, match="exactly two domains, got 3"):
        train(config)
    assert hashes(config.run_dir) == {}


def test_bf16_is_what_the_base_is_loaded_in(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    for bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        session = prepare(tiny_config(bf16=bf16), RunDir(tmp_path), Stages())
        assert session.base.model.dtype == dtype and session.head.weight.dtype == dtype


def test_a_seed_decides_everything_and_another_decides_otherwise(tiny_config: Callable[..., RunConfig]) -> None:
    found = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        config = tiny_config(**SHORT, run_name=name, seed=seed)
        train(config)
        found.append(adapters(config.run_dir))
        torch.randn(3)  # what came before does not matter
    first, again, other = found
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_the_router_starts_from_the_training_rows_of_all_domains(make_session: Callable[..., Any]) -> None:
    session = make_session()
    (router,) = session.model.routers.values()
    assert not router.mean.any()
    calibrate_router(session)
    batch = Collator(pad_token_id=0)(session.data.train)
    del batch["domain"]
    features = session.model.router_features([batch])[None]
    normalised = router.normalise(features)
    assert normalised.shape[0] == 54 and session.model.training
    torch.testing.assert_close(normalised.mean(0), torch.zeros(32), atol=1e-5, rtol=0)
    assert float(normalised.pow(2).mean()) == pytest.approx(1, rel=1e-4)
    calibrate_router(make_session(num_experts=1))


def test_a_saved_router_was_calibrated(finished: Any) -> None:
    _, run, _ = finished
    means = [value for key, value in adapters(run.path).items() if key.endswith("mean")]
    assert means and all(value.any() for value in means)


def test_stages_are_shown_before_anything_is_written(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config(**SHORT)
    seen: list[str] = []

    def show(what: str) -> Callable[[Any], None]:
        return lambda made: seen.append(f"{what} {(config.run_dir / 'config.yaml').exists()}")

    train(config, Stages(data=show("data"), parameters=show("parameters")))
    assert seen == ["data False", "parameters False"]


class TestOccupiedFolder:
    def test_the_same_run_again_trains_nothing(self, finished: Any) -> None:
        config, run, result = finished
        before = hashes(run.path)
        assert train(config) == {**result, "already_finished": True}
        assert hashes(run.path) == before

    def test_other_settings_are_refused_by_name(self, finished: Any) -> None:
        config, run, _ = finished
        before = hashes(run.path)
        with pytest.raises(RunError) as caught:
            train(config.model_copy(update={"lora_alpha": 8.0, "seed": 3}))
        text = str(caught.value)
        assert "seed 0 there, 3 here" in text and "lora_alpha 32.0 there, 8.0 here" in text
        assert "batch_size" not in text and "--run_name" in text
        assert hashes(run.path) == before

    @pytest.mark.parametrize("name", ["config.yaml", "final/dylora_moe.json", "metrics.jsonl", "data.json", "mine.txt"])
    def test_whatever_lies_there_is_left_alone(self, tiny_config: Callable[..., RunConfig], name: str) -> None:
        config = tiny_config(**SHORT)
        path = config.run_dir / name
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        with pytest.raises(RunError, match="new or empty"):
            train(config)
        assert list(hashes(config.run_dir)) == [name] and path.read_text() == "mine"

    def test_a_result_without_settings_is_no_finished_run(self, tiny_config: Callable[..., RunConfig]) -> None:
        config = tiny_config(**SHORT)
        config.run_dir.mkdir(parents=True)
        (config.run_dir / "result.json").write_text("{}")
        with pytest.raises(RunError, match=r"no config\.yaml"):
            train(config)

    def test_a_folder_in_use_is_refused(self, tiny_config: Callable[..., RunConfig]) -> None:
        config = tiny_config(**SHORT)
        with RunDir(config.run_dir).locked(), pytest.raises(RunError, match="in use by another process"):
            train(config)
        assert hashes(config.run_dir) == {}


class TestStopsBeforeTheFirstStep:
    """An error before training leaves a folder that the next attempt can use."""

    def attempt(self, config: RunConfig, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            train(config)
        assert hashes(config.run_dir) == {}

    def test_when_the_base_would_train(self, tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        build = session_module.build_model

        def spoil(*args: Any) -> Any:
            model = build(*args)
            model.lm.lm_head.weight.requires_grad_(True)
            return model

        with monkeypatch.context() as patch:
            patch.setattr(session_module, "build_model", spoil)
            self.attempt(tiny_config(**SHORT), TunerError, "base train and must be frozen")
        train(tiny_config(**SHORT))

    def test_when_the_tap_is_no_layer(self, tiny_config: Any) -> None:
        self.attempt(tiny_config(**SHORT, tap_layer=2), TunerError, "tap_layer must be below the 2 layers")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works on a GPU")
    def test_when_fp16_has_no_gpu(self, tiny_config: Any) -> None:
        self.attempt(tiny_config(**SHORT, fp16=True, bf16=None), ConfigError, "fp16 needs a GPU")
        offloading = tiny_config(**SHORT, gradient_checkpointing=True, activation_offload=True)
        self.attempt(offloading, ConfigError, "activation_offload needs a GPU")


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config(**SHORT | {"max_steps": 6, "logging_steps": 1, "learning_rate": 1e30})
    with pytest.raises(
        RunError,
        match=r"gradients of step \d must be finite, got a norm of (nan|inf).*Lower learning_rate.*6 rows: '### User",
    ):
        train(config)
    run = RunDir(config.run_dir)
    assert not run.is_finished and not (run / "final").exists()
    for name in ("metrics.jsonl", "routing.jsonl"):
        for line in (run / name).read_text().splitlines():
            json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
