"""A skill that comes, on the tiny base: the losses are the base's and the expert's, and the decision follows."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from tests.tiny import WORDS, settings, write_lines

from dylora_moe.bases import LoadedBase, load_base
from dylora_moe.config import make_config
from dylora_moe.data.batching import Collator
from dylora_moe.data.build import build_run_data
from dylora_moe.data.bundle import DataBundle
from dylora_moe.data.stored import Rows
from dylora_moe.data.stream import parse_skills
from dylora_moe.errors import DataError
from dylora_moe.evaluate.losses import Evaluation
from dylora_moe.run_dir import DECISION, RunDir
from dylora_moe.skills.library import Sample, Skill, SkillLibrary, SkillRecord, Source
from dylora_moe.skills.novelty import MIN_ROWS, Cosine, Mahalanobis, TwoSample
from dylora_moe.train.arrival import Arrival, check_rows, data_hash, detector_of, examine
from dylora_moe.train.evaluator import Evaluator
from dylora_moe.train.features import answers_alone, draw_sample, read_features
from dylora_moe.train.session import Session
from dylora_moe.tuner import DyLoraModel

SOURCE = Source(base="tiny", revision="1", tap_layer=1)
CAPITALS = [{"prompt": f"Say {word} in capitals.", "completion": word.upper()} for word in WORDS] + [
    {"prompt": f"Say {word} twice.", "completion": f"{word} {word}"} for word in WORDS
]
KINDS = ("capitals", "sums")
SUMS = [{"prompt": f"Add {n} and {n * 7}.", "completion": f"{n} + {n * 7} = {n * 8}"} for n in range(48)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A model of three random experts, and two skills with their data, features and evaluators."""

    session: Session
    data: dict[str, DataBundle]
    samples: dict[str, Sample]
    evaluators: dict[str, Evaluator]

    @property
    def model(self) -> DyLoraModel:
        return self.session.model

    def skill(self, name: str, *, of: str | None = None, rows: int | None = None, **record: Any) -> Skill:
        """That `expert_1` learned well, unless said otherwise, with the features of a kind of data."""
        sample = self.sample(of or name, rows)
        known = {"expert": "expert_1", "data": "0" * 64, "base_loss": 6.0, "loss": 3.0} | record
        record_ = SkillRecord(name=name, num_rows=len(sample.prompts), **known)
        return Skill(record=record_, mean=sample.prompts.mean(0), sample=sample)

    def sample(self, kind: str, rows: int | None = None) -> Sample:
        sample = self.samples[kind]
        return Sample(prompts=sample.prompts[:rows], answers=sample.answers[:rows])

    def examine(self, kind: str, *known: Skill, rows: int | None = None, wanted: Any = None, **changes: Any) -> Arrival:
        library = SkillLibrary(source=SOURCE, skills={skill.record.name: skill for skill in known})
        config = make_config({"mode": "continual", "skills": ["flask"], **changes})
        return examine(
            self.model,
            self.evaluators[kind],
            library,
            self.data[kind],
            self.sample(kind, rows),
            config,
            wanted=wanted,
        )


@pytest.fixture(scope="module")
def prepared(
    tiny_base: Path, loaded: tuple[LoadedBase, DataBundle], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, DataBundle]:
    """Kind -> its data."""
    folder = tmp_path_factory.mktemp("kinds")
    files = {
        kind: write_lines(folder / f"{kind}.jsonl", rows) for kind, rows in zip(KINDS, (CAPITALS, SUMS), strict=True)
    }
    plain = settings(tiny_base, {}, folder)
    return {
        kind: build_run_data(make_config(plain | {"datasets": [str(file)]}), loaded[0].tokenizer)
        for kind, file in files.items()
    }


@pytest.fixture
def bench(make_session: Callable[..., Session], prepared: dict[str, DataBundle]) -> Bench:
    session, samples, evaluators = make_session(tap_layer=1), {}, {}
    for kind, data in prepared.items():
        rows = draw_sample(data, 200, seed=0)
        prompts, answers = (
            read_features(session.model, part, SOURCE, batch_size=8, pad_token_id=0, tell=lambda text: None)
            for part in (rows, answers_alone(rows))
        )
        samples[kind] = Sample(prompts=prompts, answers=answers)
        evaluators[kind] = Evaluator(session.head, data.validation, rows=4, pad_token_id=0, tell=lambda text: None)
    assert all(len(found.prompts) >= MIN_ROWS for found in samples.values())
    return Bench(session=session, data=prepared, samples=samples, evaluators=evaluators)


def loss_by_hand(base: LoadedBase, data: DataBundle) -> float:
    """Of the base as it was loaded, without any of our code."""
    total, tokens = 0.0, 0
    (rows,) = data.validation.values()
    for row in rows:
        with torch.no_grad():
            logits = base.model(input_ids=torch.tensor([row.input_ids])).logits[0]
        labels = torch.tensor(row.labels)
        total += float(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum"))
        tokens += int((labels[1:] != -100).sum())
    return total / tokens


def test_the_losses_are_the_base_s_the_expert_s_and_the_model_s(
    bench: Bench, loaded: tuple[LoadedBase, DataBundle]
) -> None:
    model, evaluator = bench.model, bench.evaluators["sums"]
    other = {"expert": "expert_2", "base_loss": 7.0, "loss": 2.0}
    arrival = bench.examine("sums", bench.skill("capitals", **other))

    def run(expert: str | None) -> Evaluation:
        if expert is None:
            return evaluator.run(model)
        with model.forced(expert):
            return evaluator.run(model)

    numbers, losses = arrival.decision.numbers, {name: run(name).mean_loss for name in (None, *model.expert_names)}
    assert (
        numbers["base loss"]
        == arrival.base_loss
        == pytest.approx(loss_by_hand(loaded[0], bench.data["sums"]), abs=1e-4)
    )
    assert numbers["expert loss"] == losses["expert_2"] and arrival.before == losses[None]
    assert (numbers["base loss at home"], numbers["expert loss at home"]) == (7.0, 2.0)
    assert (
        len({round(loss, 3) for loss in (*losses.values(), arrival.base_loss)}) == 5
    )  # so each is told from the others
    assert arrival.data == data_hash(bench.data["sums"])


def test_the_nearest_skill_s_expert_is_the_one_that_is_tried(bench: Bench) -> None:
    skills = bench.skill("capitals", expert="expert_0"), bench.skill("sums", expert="expert_2", base_loss=9.0)
    arrival = bench.examine("sums", *skills)
    assert arrival.decision.nearest == "sums" and arrival.decision.numbers["base loss at home"] == 9.0
    with bench.model.forced("expert_2"):
        expert = bench.evaluators["sums"].run(bench.model).mean_loss
    assert arrival.decision.numbers["expert loss"] == expert
    assert set(arrival.decision.numbers) >= {
        "prompts: distance to capitals",
        "prompts: distance to sums",
        "prompts: threshold",
    }


def test_the_first_skill_is_measured_by_the_base_alone(bench: Bench) -> None:
    arrival = bench.examine("sums")
    assert arrival.decision.kind == "grow" and arrival.before == arrival.base_loss
    assert "expert loss" not in arrival.decision.numbers


def learn(bench: Bench, kind: str) -> tuple[float, float]:
    """Let `expert_1` gain something on a kind of data: the base's loss on its validation rows, and the expert's."""
    model, head = bench.model, bench.session.head
    rows = [bench.data[kind].train[place] for place in range(16)]
    batch: dict[str, Any] = dict(Collator(pad_token_id=0)(rows))
    del batch["domain"]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B.expert_1" in name:
                weight.zero_()
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    with model.forced("expert_1"):
        for _ in range(8):
            optimizer.zero_grad()
            head.nll(model(hidden_only=True, **batch), batch["labels"]).mean().backward()
            optimizer.step()
        expert = bench.evaluators[kind].run(model).mean_loss
    with model.disabled():
        base = bench.evaluators[kind].run(model).mean_loss
    assert expert < 0.95 * base
    return base, expert


@pytest.mark.parametrize(
    ("known", "share", "changes", "kind"),
    [
        ("sums", 0.9, {}, "reuse"),
        ("sums", 0.1, {}, "extend"),
        ("capitals", 0.9, {}, "grow"),
        ("capitals", 0.1, {}, "grow"),
        ("sums", 0.9, {"served_share": 0.95}, "extend"),
        ("capitals", 0.1, {"allow_expert_growth": False}, "extend"),
        ("capitals", 0.1, {"max_experts": 1}, "extend"),
        ("capitals", 0.1, {"novelty_detector": "cosine"}, "extend"),
        ("sums", 0.9, {"wanted": "grow"}, "grow"),
    ],
)
def test_what_is_decided(bench: Bench, known: str, share: float, changes: dict[str, Any], kind: str) -> None:
    """Sums come, and one skill is known, whose expert does them so well."""
    base, expert = learn(bench, "sums")
    home = {"base_loss": 1.0, "loss": 1 - (1 - expert / base) / share}
    arrival = bench.examine("sums", bench.skill("known", of=known, **home), **changes)
    assert arrival.decision.kind == kind, arrival.decision.reason
    assert arrival.decision.numbers["share of the gain at home"] == pytest.approx(share)
    assert arrival.decision.expert == (None if kind == "grow" else "expert_1")


def test_the_same_rows_are_reused(bench: Bench) -> None:
    """Even where the nearest is another skill."""
    same = bench.skill("b", of="capitals", expert="expert_0", data=data_hash(bench.data["sums"]))
    decision = bench.examine("sums", bench.skill("a", of="sums"), same).decision
    assert (decision.kind, decision.nearest, decision.expert) == ("reuse", "b", "expert_0")
    assert data_hash(bench.data["sums"]) != data_hash(bench.data["capitals"])


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(bench: Bench, training: bool) -> None:
    weights = deepcopy(bench.model.state_dict())
    bench.model.train(training)
    before = bench.evaluators["sums"].run(bench.model)
    bench.examine("sums", bench.skill("capitals"))
    assert bench.model.training is training and bench.evaluators["sums"].run(bench.model) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in bench.model.state_dict().items())


def test_it_is_written_and_read_again(bench: Bench, tmp_path: Path) -> None:
    """As JSON that others read, too: every number is one."""
    run = RunDir(tmp_path / "run")
    few = bench.examine("sums", bench.skill("capitals"), rows=5, wanted="grow")
    for arrival in (few, bench.examine("sums", bench.skill("capitals")), bench.examine("sums")):
        run.write(DECISION, asdict(arrival))
        assert TypeAdapter(Arrival).validate_python(run.read(DECISION)) == arrival
        assert all(np.isfinite(number) for number in arrival.decision.numbers.values())


@pytest.mark.parametrize("wanted", ["reuse", "extend", "grow"])
def test_too_few_rows_go_by_what_the_recipe_says(bench: Bench, wanted: Any) -> None:
    """The nearest is the one with the nearest mean."""
    known = bench.skill("a", of="capitals", expert="expert_0"), bench.skill("b", of="sums", expert="expert_2")
    decision = bench.examine("sums", *known, rows=MIN_ROWS - 1, wanted=wanted).decision
    assert (decision.kind, decision.nearest) == (wanted, "b")
    assert decision.expert == (None if wanted == "grow" else "expert_2")
    means = {
        of: float(np.linalg.norm(bench.samples["sums"].prompts[:19].mean(0) - bench.samples[of].prompts.mean(0)))
        for of in KINDS
    }
    distances = {"prompts: distance to a": means["capitals"], "prompts: distance to b": means["sums"]}
    assert {name: decision.numbers[name] for name in distances} == pytest.approx(distances)


def test_a_known_skill_of_too_few_rows_is_not_compared(bench: Bench) -> None:
    few = bench.skill("few", of="sums", rows=MIN_ROWS - 1, expert="expert_0")
    decision = bench.examine("sums", few, bench.skill("capitals")).decision
    assert decision.nearest == "capitals" and "prompts: distance to few" not in decision.numbers


@pytest.mark.parametrize(
    ("share", "growth", "kind"), [(0.9, True, "reuse"), (0.1, True, "grow"), (0.1, False, "extend")]
)
def test_where_all_known_skills_have_too_few_rows_the_losses_decide(
    bench: Bench, share: float, growth: bool, kind: str
) -> None:
    """It is not the first skill for that, and growth stays forbidden where it is."""
    base, expert = learn(bench, "sums")
    home = {"base_loss": 1.0, "loss": 1 - (1 - expert / base) / share}
    few = bench.skill("few", of="capitals", rows=5, **home)
    decision = bench.examine("sums", few, allow_expert_growth=growth).decision
    assert (decision.kind, decision.nearest) == (kind, "few") and "first" not in decision.reason


def test_the_detector_is_the_one_that_was_asked_for() -> None:
    stream = {"mode": "continual", "skills": ["flask"], "seed": 3, "false_growth_rate": 0.02}
    for name, detector in {
        "two_sample": TwoSample(false_growth_rate=0.02, seed=3),
        "mahalanobis": Mahalanobis(),
        "cosine": Cosine(),
    }.items():
        assert detector_of(make_config(stream | {"novelty_detector": name})) == detector


def test_rows_for_a_decision_are_counted(bench: Bench) -> None:
    data = bench.data["sums"]
    enough, few = (replace(data, train=Rows.of([data.train[n] for n in range(count)])) for count in (MIN_ROWS, 19))
    skill = replace(parse_skills(["flask"])[0], name="sums")
    check_rows(skill, enough)
    with pytest.raises(DataError, match=r"skill sums must have at least 20 training rows .* got 19\. Add rows, or say"):
        check_rows(skill, few)
    check_rows(replace(skill, decision="grow"), few)


@pytest.mark.parametrize("wanted", ["grow", None])
def test_text_without_prompts_is_no_skill(tiny_base: Path, tmp_path: Path, wanted: Any) -> None:
    """Whatever the recipe says: nothing could be sent to its expert."""
    rows = write_lines(tmp_path / "words.jsonl", [{"text": row["completion"]} for row in CAPITALS])
    config = make_config(settings(tiny_base, {}, tmp_path) | {"datasets": [str(rows)]})
    data = build_run_data(config, load_base(str(tiny_base), dtype=torch.float32).tokenizer)
    with pytest.raises(DataError, match=r"skill words must have prompts, by which it is known, and (\d+) of \1 valid"):
        check_rows(replace(parse_skills(["flask"])[0], name="words", decision=wanted), data)


@pytest.mark.parametrize(
    ("answers", "share", "kind"), [("sums", 0.9, "reuse"), ("sums", 0.1, "grow"), ("capitals", 0.9, "grow")]
)
def test_answers_tell_other_words_from_a_new_skill(bench: Bench, answers: str, share: float, kind: str) -> None:
    """Sums come, whose prompts are like no known ones: the answers say whose skill they are, if any."""
    base, expert = learn(bench, "sums")
    home = {"base_loss": 1.0, "loss": 1 - (1 - expert / base) / share}
    capitals = bench.skill("capitals", expert="expert_0")
    words = replace(bench.sample(answers), prompts=-bench.sample("sums").prompts)
    other = bench.skill("other", of="sums", **home)
    decision = bench.examine("sums", capitals, replace(other, sample=words, mean=words.prompts.mean(0))).decision
    assert decision.kind == kind, decision.reason
    assert decision.nearest == ("capitals" if answers == "capitals" else "other")
    assert decision.numbers["prompts: distance to other"] == decision.numbers["prompts: distance to capitals"] == 1.0
