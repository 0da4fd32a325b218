"""Which of many skills are seen as new, and which repeats are not: decisions over streams of real prompts, no training.

Every stream has all skills, three repeats (other prompts of a skill that came before) and a paraphrase (other
prompts of one that came before, with other words around them), judged by each detector by prompts and answers. Each
seed draws its own samples; three orders take turns. Then how often the two-sample test calls two samples of one skill
new, against its stated rate. Run with --help for the settings.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from tempfile import TemporaryDirectory
from typing import Any, Literal

import click
import numpy as np
import torch
from _measure import environment
from _rows import divide
from rich.console import Console
from rich.table import Table

from dylora_moe.bases import LoadedBase, load_base
from dylora_moe.data.batching import TokenizedRow, pad_token_id
from dylora_moe.data.cleaning import remove_broken, remove_duplicates
from dylora_moe.data.example import Example
from dylora_moe.data.sources import parse_dataset_spec, read_source
from dylora_moe.data.tokenize import Tokenized, fit_to_length, tokenize_examples
from dylora_moe.skills.growth import Limits, Losses, decide
from dylora_moe.skills.library import Features, Sample, Source
from dylora_moe.skills.novelty import MIN_ROWS, Cosine, Detector, Mahalanobis, TwoSample
from dylora_moe.train.features import answers_alone, read_features
from dylora_moe.tuner import DyLoraModel, ExpertConfig, RoutingConfig

_ROOT = Path(__file__).resolve().parents[1]
_REPEATS = 3
_BATCH = 16
_KINDS = ("new", "repeat", "paraphrase")
# The nearest expert does everything that comes as well as its own, so that features alone decide what is new.
_SERVED = Losses(base=2.0, expert=1.0, home_base=2.0, home_expert=1.0)
_LIMITS = Limits(may_grow=True, max_experts=None, merges=False, served_share=0.7)

WORDINGS = (
    ("Could you please help me with the following? ", " Thank you very much!"),
    ("Hi there! I have got a question for you. ", "\nTake your time, and answer as well as you can."),
    ("You are a knowledgeable assistant. Here is what I need:\n\n", "\n\nI would be grateful for your answer."),
    ("Please have a look at this for me:\n", "\nMany thanks in advance, that would be a great help."),
)
"""Words before and after a prompt, which leave what it asks for as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Features of a skill's prompts as they are, (rows, features), of the same in each wording, and of the answers."""

    plain: Features
    reworded: tuple[Features, ...]
    answers: Features


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What comes next in a stream: rows of a skill, as they are or in one of the wordings."""

    skill: str
    kind: Literal["new", "repeat", "paraphrase"]
    places: tuple[int, ...]
    wording: int | None = None

    def sample(self, pools: Mapping[str, Pool]) -> Sample:
        """Its features."""
        pool, places = pools[self.skill], list(self.places)
        prompts = pool.plain if self.wording is None else pool.reworded[self.wording]
        return Sample(prompts=prompts[places], answers=pool.answers[places])


def entries(data: Path, rows: int, divided: Path) -> dict[str, Any]:
    """Skill -> entry of a recipe: what is built in, what the folder has, and the questions of WikiSQL, divided."""
    found: dict[str, Any] = {name: {"name": name, "num_examples": rows} for name in ("requests", "stripe", "flask")}
    files = {name: data / name for name in ("gsm8k", "mbpp", "evol_instruct", "cima", "dolly")}
    files["wikisql"] = divided
    files |= {name: data / "continual" / name for name in ("yahoo", "agnews", "amazon", "dbpedia")}
    files["tatoeba"] = data / "tatoeba" / "tatoeba.ita-eng.eng"
    found |= {name: {"path": str(path)} for name, path in files.items()}
    words = {"format": "classification", "columns": {"sentence": "word", "label": "cefr"}}
    flawed = {"alpaca": {}, "code_alpaca": {}, "kelly": words}
    return found | {name: {"path": str(data / name), "on_bad_row": "skip", **more} for name, more in flawed.items()}


def reword(example: Example, wording: int) -> Example:
    """The example with other words around its last prompt."""
    before, after = WORDINGS[wording]
    asked = max(place for place, message in enumerate(example.messages) if message.role == "user")
    message = example.messages[asked]
    said = replace(message, content=f"{before}{message.content}{after}")
    return replace(example, messages=(*example.messages[:asked], said, *example.messages[asked + 1 :]))


def read_examples(entry: Mapping[str, Any], number: int) -> list[Example]:
    """Up to so many training examples, in a random order, clean and no two nearly alike."""
    found: list[Example] = []
    spec = parse_dataset_spec(entry)
    read_source(spec, seed=0, add=lambda item: found.append(item.example) if item.split == "train" else None)
    drawn = [found[place] for place in np.random.default_rng(0).permutation(len(found))[:number]]
    drawn = [drawn[place] for place in remove_broken(drawn).kept]
    # Made examples are as varied as they were meant to be, as in a run.
    kept = remove_duplicates(drawn, similarity=None) if spec.name else remove_duplicates(drawn)
    return [drawn[place] for place in kept.kept]


def tokenise(examples: Sequence[Example], base: LoadedBase, max_length: int) -> dict[int, Tokenized]:
    """Place -> row, cut; those whose prompt does not fit are left out."""
    rows = tokenize_examples(examples, base.tokenizer).rows
    return dict(fit_to_length(rows, max_length=max_length, overlong="truncate").rows)


def read_pool(
    entry: Mapping[str, Any], model: DyLoraModel, base: LoadedBase, source: Source, number: int, max_length: int
) -> Pool:
    """Features of so many prompts of a skill that fit in every wording, or of all where there are fewer."""
    examples = read_examples(entry, 2 * number)
    versions = [tokenise(examples, base, max_length)]
    for wording in range(len(WORDINGS)):
        versions.append(tokenise([reword(example, wording) for example in examples], base, max_length))
    fitting = sorted(set.intersection(*(set(rows) for rows in versions)))[:number]

    def read(rows: list[TokenizedRow]) -> Features:
        pad = pad_token_id(base.tokenizer)
        return read_features(model, rows, source, batch_size=_BATCH, pad_token_id=pad, tell=lambda line: None)

    plain, *reworded = (
        [TokenizedRow(input_ids=rows[at].input_ids, labels=rows[at].labels, domain=0) for at in fitting]
        for rows in versions
    )
    return Pool(plain=read(plain), reworded=tuple(map(read, reworded)), answers=read(answers_alone(plain)))


def read_pools(data: Path, base_name: str, tap_layer: int, number: int, max_length: int) -> dict[str, Pool]:
    """All skills; the features are kept in the cache."""
    base = load_base(base_name, dtype=torch.float32, progress=lambda line: None)
    expert = ExpertConfig(rank=1, alpha=1, target_modules="attention")  # plays no part
    model = DyLoraModel(
        base.model, ["one"], expert_config=expert, routing=RoutingConfig(granularity="sequence", tap_layer=tap_layer)
    )
    source = Source(base=base_name, revision=base.resolved.revision, tap_layer=tap_layer)
    with TemporaryDirectory() as folder:
        divide(data / "wikisql" / "train.jsonl", divided := Path(folder) / "wikisql.jsonl")
        found = entries(data, number, divided)
        return {name: read_pool(found[name], model, base, source, number, max_length) for name in sorted(found)}


def order_skills(skills: Sequence[str], order: int) -> list[str]:
    """Three orders: by name, by name from the end, and one drawn once."""
    if order == 2:
        return np.random.default_rng(2).permutation(list(skills)).tolist()
    return list(reversed(skills)) if order else list(skills)


def sample_size(rows: int, wanted: int) -> int:
    """So many rows, or half of what there is where two samples of that size do not fit."""
    return min(wanted, rows // 2)


def make_stream(sizes: Mapping[str, int], order: int, wanted: int, seed: int) -> list[Arrival]:
    """Every skill, three repeats and a paraphrase, each somewhere after the skill that it is of.

    Args:
        sizes: Skill -> rows in its pool.
        order: 0, 1 or 2.
        wanted: Rows of a sample.
        seed: Decides the samples, which skills are repeated, and where.
    """
    draw = np.random.default_rng(seed)
    halves: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for skill, size in sizes.items():
        rows, places = sample_size(size, wanted), draw.permutation(size).tolist()
        halves[skill] = (tuple(places[:rows]), tuple(places[rows : 2 * rows]))
    skills = order_skills(list(sizes), order)
    stream = [Arrival(skill=skill, kind="new", places=halves[skill][0]) for skill in skills]
    salted = [skills[place] for place in draw.choice(len(skills), _REPEATS + 1, replace=False).tolist()]
    salt = [Arrival(skill=skill, kind="repeat", places=halves[skill][1]) for skill in salted[:_REPEATS]]
    wording = seed % len(WORDINGS)
    salt.append(Arrival(skill=salted[-1], kind="paraphrase", places=halves[salted[-1]][1], wording=wording))
    for arrival in salt:
        first = next(at for at, other in enumerate(stream) if other.skill == arrival.skill)
        stream.insert(int(draw.integers(first + 1, len(stream) + 1)), arrival)
    return stream


def judge_stream(stream: Sequence[Arrival], pools: Mapping[str, Pool], detector: Detector) -> list[dict[str, Any]]:
    """Decisions of a detector on a stream; what came before is known as it truly is, whatever was decided."""
    known: dict[str, Sample] = {}
    skill_of: dict[str, str] = {}
    records = []
    for place, arrival in enumerate(stream):
        sample = arrival.sample(pools)
        prompts = detector.judge(sample.prompts, {name: other.prompts for name, other in known.items()})
        answers = None
        if known and prompts.is_new:
            answers = detector.judge(sample.answers, {name: other.answers for name, other in known.items()})
        decision = decide(prompts, answers, experts=skill_of, losses=_SERVED if known else None, limits=_LIMITS)
        nearest = skill_of[decision.nearest] if decision.nearest else None
        record = {"place": place, "skill": arrival.skill, "kind": arrival.kind, "rows": len(sample.prompts)}
        record |= {"wording": arrival.wording, "decision": decision.kind, "nearest": nearest}
        for what, novelty in (("prompts", prompts), ("answers", answers)):
            if novelty is not None and novelty.nearest is not None:
                distance = novelty.distances[novelty.nearest]
                record[what] = {"distance": round(distance, 6), "threshold": round(novelty.threshold, 6)}
                record[what]["new"] = novelty.is_new
        records.append(record)
        known[f"{place}"], skill_of[f"{place}"] = sample, arrival.skill
    return records


def count(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Mistakes and decisions of each kind; a first skill, which nothing is compared with, counts as no decision."""
    kinds = {kind: [r for r in records if r["kind"] == kind and r["nearest"] is not None] for kind in _KINDS}
    old = [*kinds["repeat"], *kinds["paraphrase"]]
    grown = {kind: sum(r["decision"] == "grow" for r in found) for kind, found in kinds.items()}
    return {
        "false growth on repeats": (grown["repeat"], len(kinds["repeat"])),
        "missed new skills": (len(kinds["new"]) - grown["new"], len(kinds["new"])),
        "wrong nearest": (sum(r["nearest"] != r["skill"] for r in old), len(old)),
        "false growth on paraphrases": (grown["paraphrase"], len(kinds["paraphrase"])),
        "new skills with known answers": (
            sum("answers" in r and not r["answers"]["new"] for r in kinds["new"]),
            len(kinds["new"]),
        ),
    }


def measure_rate(features: Features, wanted: int, pairs: int, seed: int) -> list[dict[str, Any]]:
    """Random disjoint samples of one skill, two by two, judged by the two-sample test."""
    records, rows = [], sample_size(len(features), wanted)
    for pair in range(pairs):
        places = np.random.default_rng([seed, pair]).permutation(len(features))
        known = {"other": features[places[:rows]]}
        novelty = TwoSample(seed=pair).judge(features[places[rows : 2 * rows]], known)
        distance, threshold = round(novelty.distances["other"], 6), round(novelty.threshold, 6)
        records.append({"new": novelty.is_new, "distance": distance, "threshold": threshold, "rows": rows})
    return records


def wilson(found: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a share found in so many cases.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = found / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def show(
    summary: Mapping[str, Mapping[str, Sequence[int]]], rates: Mapping[str, Mapping[str, Any]], console: Console
) -> None:
    table = Table("detector", *next(iter(summary.values())))
    for name, counts in summary.items():
        table.add_row(name, *(f"{found} of {total}" for found, total in counts.values()))
    console.print(table)
    for part, rate in rates.items():
        low, high = rate["interval"]
        console.print(
            f"Two samples of {part} of one skill called new: {rate['new']} of {rate['total']}, {rate['share']:.2%} "
            f"({low:.2%} to {high:.2%}); stated {rate['stated']:.0%}.",
            highlight=False,
        )


def summarise_rate(pairs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Over all skills, with a 95 % interval, and each skill's own count."""
    counts = {skill: sum(record["new"] for record in records) for skill, records in pairs.items()}
    new, total = sum(counts.values()), sum(map(len, pairs.values()))
    return {
        "stated": TwoSample().false_growth_rate,
        "new": new,
        "total": total,
        "share": new / total,
        "interval": wilson(new, total),
        "new_by_skill": counts,
        "pairs": pairs,
    }


def detectors() -> dict[str, Detector]:
    """What is compared; the cosine as the first design had it, new below a similarity of 0.75."""
    return {"two_sample": TwoSample(), "mahalanobis": Mahalanobis(), "cosine": Cosine(threshold=0.25)}


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of real data sets.")
@click.option("--base", "base_name", default="pypi:smollm2", show_default=True)
@click.option("--tap-layer", default=0, show_default=True)
@click.option("--rows", type=click.IntRange(MIN_ROWS), default=100, show_default=True, help="Prompts of a sample.")
@click.option("--pool", type=click.IntRange(2 * MIN_ROWS), default=400, show_default=True, help="Prompts of a skill.")
@click.option("--max-length", default=256, show_default=True, help="Tokens; longer rows are cut.")
@click.option("--seeds", type=click.IntRange(1), default=20, show_default=True, help="Streams, three repeats each.")
@click.option("--pairs", type=click.IntRange(0), default=20, show_default=True, help="Pairs of samples of each skill.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to write.")
def main(
    data: Path,
    base_name: str,
    tap_layer: int,
    rows: int,
    pool: int,
    max_length: int,
    seeds: int,
    pairs: int,
    output: Path | None,
) -> None:
    console = Console()
    torch.set_num_threads(1)
    pools = read_pools(data, base_name, tap_layer, pool, max_length)
    sizes = {name: len(found.plain) for name, found in pools.items()}
    streams = [make_stream(sizes, seed % 3, rows, seed) for seed in range(seeds)]
    decisions: dict[str, list[dict[str, Any]]] = {}
    for name, detector in detectors().items():
        decisions[name] = [
            {"seed": seed, "order": seed % 3} | record
            for seed, stream in enumerate(streams)
            for record in judge_stream(stream, pools, detector)
        ]
        console.print(f"{name}: {count(decisions[name])}", highlight=False)
    summary = {name: count(records) for name, records in decisions.items()}
    rates = {}
    for part in ("prompts", "answers") if pairs else ():
        found = {name: pool.plain if part == "prompts" else pool.answers for name, pool in pools.items()}
        rates[part] = summarise_rate({n: measure_rate(f, rows, pairs, at) for at, (n, f) in enumerate(found.items())})
    show(summary, rates, console)
    if output is not None:
        settings = {"base": base_name, "tap_layer": tap_layer, "rows": rows, "pool": pool, "max_length": max_length}
        settings |= {"seeds": seeds, "pairs": pairs}
        kinds = {name: asdict(detector) for name, detector in detectors().items()}  # type: ignore[call-overload]
        record = {"environment": environment(_ROOT), "settings": settings, "prompts": sizes, "detectors": kinds}
        record |= {"summary": summary, "rates": rates, "decisions": decisions}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
