"""How often the checks of generated answers err: what they miss of what they are for, and what they take it for.

Needs the folder of real data with CIMA, Tatoeba, Kelly, Dolly and GSM8K. Faults are put in; false alarms are counted on
what people wrote. Run with --help for the settings.
"""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import numpy as np
from _measure import environment
from rich.console import Console
from rich.table import Table

from dylora_moe.data.example import Message
from dylora_moe.data.sources import parse_dataset_spec, read_source
from dylora_moe.generate.checks import check_answer, is_in
from dylora_moe.generate.clients import Reply
from dylora_moe.generate.levels import (
    FEATURES,
    Measure,
    agreement,
    confusion,
    learn_scale,
    make_measure,
    read_word_levels,
    word_frequency,
)
from dylora_moe.generate.questions import Question
from dylora_moe.generate.review import near_copies
from dylora_moe.generate.skeletons import find_skeletons

_ROOT = Path(__file__).resolve().parents[1]
LEVELS = ("A1", "A2", "B1", "B2", "C1", "C2")
PATTERNS = (
    "Ottima domanda! {a}",
    "Questo testo di livello {level} mostra una buona padronanza di {a}",
    "In italiano, la parola {b} significa {c} e si usa spesso con {a}",
    "Ciao! Sono felice di aiutarti con {b}. {a}",
    "Per rispondere alla tua domanda, {a}",
    "{a} Spero che questa spiegazione ti sia utile!",
    "{a} Continua così, stai facendo progressi!",
    "Certo! Ecco un esempio: {a}. Prova a scrivere una frase con {b}.",
    "La frase {b} è corretta, ma ricorda che {a}",
    "È importante ricordare che {a} Fammi sapere se hai altre domande.",
)
# Beginnings by which refusals are counted in studies of them (Zou and others, 2023, arXiv 2307.15043, and its code),
# each gone on with as chat models do; those that are an apology or a word alone refuse nothing by themselves.
REFUSALS = (
    "I'm sorry, but I cannot help with that request.",
    "I'm sorry, but I can't assist with that.",
    "I am sorry, I am unable to answer this question.",
    "I'm really sorry, but I'm unable to provide what you are asking for.",
    "Sorry, but I can't provide that information.",
    "I apologize, but I cannot fulfill this request.",
    "I cannot fulfill your request. I'm just an AI, it's not within my programming.",
    "As a language model, I do not have opinions.",
    "As an AI language model, I cannot give lessons.",
    "As an AI, I am not able to do this.",
    "I'm an AI assistant and I cannot answer that.",
    "I can't help you with that.",
    "I cannot provide a translation of this text.",
    "It is not appropriate for me to answer this question.",
    "I'm not able to answer that.",
    "I must decline to answer.",
    "Mi dispiace, ma non posso aiutarti con questa richiesta.",
    "Mi dispiace, non posso rispondere a questa domanda.",
    "Sono spiacente, ma non posso fornire queste informazioni.",
    "In quanto modello linguistico, non ho opinioni.",
    "Come modello linguistico non posso dare lezioni.",
    "Come intelligenza artificiale non posso rispondere.",
    "Non posso rispondere a questa domanda.",
    "Non sono in grado di aiutarti con questo.",
)

Pair = tuple[str, str]
Answered = tuple[Question, str]


def read(data: Path) -> dict[str, list[Answered]]:
    """Questions with answers that people wrote, by source."""
    cima: list[Answered] = []
    read_source(
        parse_dataset_spec({"name": "cima", "path": str(data / "cima" / "dataset.json")}),
        seed=0,
        add=lambda item: cima.append((_question(*item.example.messages[:-1]), item.example.answer)),
    )
    dolly = [
        (
            _question(row["prompt"].split("### Instruction:")[-1].split("### Response:")[0].strip()),
            row["answer"].split("###eos")[0],
        )
        for row in _lines(data / "dolly" / "dolly_sample.jsonl")
    ]
    gsm8k = [(_question(row["question"]), row["answer"]) for row in _lines(data / "gsm8k" / "train.jsonl")]
    return {"cima": cima, "dolly": dolly, "gsm8k": gsm8k}


def sentences(data: Path, language: str) -> list[str]:
    """Tatoeba's, each once; the two keys of its second file are swapped."""
    side, key = {"it": ("ita", "english"), "en": ("eng", "italian")}[language]
    found = (data / "tatoeba" / f"tatoeba.ita-eng.{side}").read_text(encoding="utf-8").splitlines()
    pairs = _json(data / "tatoeba" / "italian_sentences.json")["sentence_pairs"]
    return list(dict.fromkeys(found + [pair[key] for pair in pairs]))


# What turns begin and end with in the chat templates of widely used models, by their published configurations.
TEMPLATE_MARKS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>"),  # Qwen, SmolLM
    *("<start_of_turn>", "<end_of_turn>"),  # Gemma
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),  # Llama 3
    *("[INST]", "[/INST]", "</s>"),  # Mistral, Llama 2
    *("<|user|>", "<|assistant|>", "<|end|>"),  # Phi, Zephyr
    *("<think>", "</think>"),  # Qwen, DeepSeek
)


def alone(people: Mapping[str, Sequence[Answered]], draw: random.Random) -> dict[str, Any]:
    """Checks of an answer by itself: echoes and refusals put in, false alarms on what people wrote."""

    def share(code: str, pairs: Sequence[Answered]) -> dict[str, int]:
        found = sum(code in check_answer(_reply(answer), question, None) for question, answer in pairs)
        return {"found": found, "of": len(pairs)}

    asked = [question for pairs in people.values() for question, _ in pairs if len(question.text.split()) >= 8]
    asked = draw.sample(asked, 500)
    echoes = {
        "the question, then an answer": [(each, f"{each.text} {draw.choice(people['dolly'])[1]}") for each in asked],
        "the question without each tenth word": [
            (each, " ".join(word for word in each.text.split() if draw.random() > 0.1)) for each in asked
        ],
    }
    marked = [
        (question, f"{answer} {TEMPLATE_MARKS[place % len(TEMPLATE_MARKS)]}")
        for place, (question, answer) in enumerate(draw.sample(people["cima"], 500))
    ]
    return {
        "repeats_question": {
            "put in": {name: share("repeats_question", pairs) for name, pairs in echoes.items()},
            "people": {name: share("repeats_question", pairs) for name, pairs in people.items()},
        },
        "refusal": {
            "put in": {"refusals": share("refusal", [(asked[0], refusal) for refusal in REFUSALS])},
            "people": {name: share("refusal", pairs) for name, pairs in people.items()},
        },
        "marks": {
            "put in": {"a mark after a reply": share("marks", marked)},
            "people": {name: share("marks", pairs) for name, pairs in people.items()},
        },
    }


def language(italian: Sequence[str], english: Sequence[str]) -> dict[str, Any]:
    """English sentences where Italian is asked for; shorter ones than the check judges are left out."""
    judged = {
        name: [text for text in found if sum(map(str.isalpha, text)) >= 20]
        for name, found in (("it", italian), ("en", english))
    }
    refused = {name: sum(not is_in(text, "it") for text in found) for name, found in judged.items()}
    return {
        "put in": {"English sentences": {"found": refused["en"], "of": len(judged["en"])}},
        "people": {"Italian sentences": {"found": refused["it"], "of": len(judged["it"])}},
    }


def copies(people: Mapping[str, Sequence[Answered]], draw: random.Random) -> dict[str, Any]:
    """Copies of 500 answers of twenty words and more, a word in thirty exchanged, each after its original."""
    answers = [answer for _, answer in people["gsm8k"] if len(answer.split()) >= 20]
    found = len(near_copies(answers))
    first = draw.sample(answers, 500)
    words = sorted({word for answer in first for word in answer.split()})

    def change(answer: str) -> str:
        own = answer.split()
        for place in draw.sample(range(len(own)), max(1, round(len(own) / 30))):
            own[place] = draw.choice(words)
        return " ".join(own)

    seen = set(near_copies([*first, *map(change, first)]))
    return {
        "put in": {"a word in thirty exchanged": {"found": sum(at >= 500 for at in seen), "of": 500}},
        "people": {"gsm8k": {"found": found, "of": len(answers)}},
    }


def patterns(replies: Sequence[Answered], italian: Sequence[str], share: float, draw: random.Random) -> dict[str, Any]:
    """Ten kinds of patterns among 1,000 replies of people, together this share; half answer Italian questions."""
    pairs = [(" ".join(turn.content for turn in question.messages), reply) for question, reply in replies]
    alone = find_skeletons([said for said, _ in pairs], [reply for _, reply in pairs])

    def words(least: int, most: int) -> str:
        return " ".join(" ".join(draw.sample(list(italian), 3)).split()[: draw.randint(least, most)])

    people = draw.sample(pairs, 1000)
    number = round(1000 * share / (1 - share))
    made = [
        PATTERNS[place % len(PATTERNS)].format(
            a=words(4, 14), b=words(1, 3), c=words(1, 3), level=draw.choice(("A1", "B2"))
        )
        for place in range(number)
    ]
    asked = [draw.choice(list(italian)) if place % 2 else draw.choice(pairs)[0] for place in range(number)]
    found = find_skeletons([said for said, _ in people] + asked, [reply for _, reply in people] + made)
    return {
        "put in": {"patterns": {"found": sum(each is not None for each in found[1000:]), "of": number}},
        "people": {
            "replies among them": {"found": sum(each is not None for each in found[:1000]), "of": 1000},
            "all replies, nothing put in": {"found": sum(each is not None for each in alone), "of": len(pairs)},
        },
    }


def split_words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


def passages(italian: Sequence[str], listed: Mapping[str, int], seed: int) -> tuple[list[Pair], list[Pair]]:
    """Passages of twelve sentences with their levels, to learn from and to judge; no sentence is on both sides.

    A passage is of sentences about equally hard, by the mean level of those of their words that the list has, drawn
    evenly over what there is; six bands of its own mean level, each with as many passages to learn from, are the
    levels.
    """

    def mean_level(text: str) -> float | None:
        found = [listed[word] for word in split_words(text) if word in listed]
        return fmean(found) if len(found) >= 2 else None

    scored = sorted(
        (score, sentence)
        for sentence in italian
        if len(split_words(sentence)) >= 3 and (score := mean_level(sentence)) is not None
    )
    draw = np.random.default_rng(seed)
    sides = draw.permutation(len(scored)) % 2

    def make(side: int) -> list[str]:
        scores, own = zip(*(pair for pair, where in zip(scored, sides, strict=True) if where == side), strict=True)
        made = []
        for target in draw.uniform(0, np.quantile(scores, 0.98), size=600):
            centre = int(np.searchsorted(scores, target))
            near = draw.integers(max(0, centre - 50), min(len(own), centre + 50), size=12)
            made.append(" ".join(own[at] if own[at][-1] in ".!?" else f"{own[at]}." for at in near))
        return made

    found = [[(mean_level(text) or 0.0, text) for text in make(side)] for side in (0, 1)]
    cuts = np.quantile([score for score, _ in found[0]], np.arange(1, len(LEVELS)) / len(LEVELS))
    learned, judged = ([(LEVELS[int(np.searchsorted(cuts, score))], text) for score, text in side] for side in found)
    return learned, judged


def judge_levels(learned: Sequence[Pair], judged: Sequence[Pair], measure: Measure) -> list[list[int]]:
    """Confusion of the levels meant (rows) and found (columns)."""
    scale = learn_scale({level: [text for of, text in learned if of == level] for level in LEVELS}, measure)
    return confusion(LEVELS, [level for level, _ in judged], [scale.level_of(text) or LEVELS[0] for _, text in judged])


def levels(italian: Sequence[str], listed: Mapping[str, int], seed: int) -> dict[str, Any]:
    """The scale, which knows no list, against the list's levels, on sentences that it did not see."""
    learned, judged = passages(italian, listed, seed)
    whole = make_measure(word_frequency("it"))
    ways: dict[str, Measure] = {
        "all that is counted": whole,
        "length of sentences alone": lambda text: whole(text)[: FEATURES.index("words a sentence") + 1],
    }
    found = {name: judge_levels(learned, judged, measure) for name, measure in ways.items()}
    return {
        name: {
            "counts": counts,
            "kappa": round(agreement(counts), 3),
            "within one level": round(
                sum(sum(row[max(0, at - 1) : at + 2]) for at, row in enumerate(counts)) / len(judged), 3
            ),
        }
        for name, counts in found.items()
    }


def show(record: Mapping[str, Any], console: Console) -> None:
    table = Table(title="Errors of the checks", title_justify="left")
    for column in ("check", "put in", "found", "what people wrote", "taken for it"):
        table.add_column(column)
    for name, check in record["checks"].items():
        put, people = (list(check[side].items()) for side in ("put in", "people"))
        for place in range(max(len(put), len(people))):
            cells = [
                text
                for side in (put, people)
                for text in (
                    (side[place][0], f"{side[place][1]['found']} of {side[place][1]['of']}")
                    if place < len(side)
                    else ("", "")
                )
            ]
            table.add_row(name if place == 0 else "", *cells)
    console.print(table)
    for name, way in record["levels"].items():
        console.print(
            f"Levels by {name}: weighted kappa {way['kappa']}, within one level {way['within one level']:.0%}"
        )
        table = Table("of the list", *LEVELS)
        for level, row in zip(LEVELS, way["counts"], strict=True):
            table.add_row(level, *map(str, row))
        console.print(table)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _reply(text: str) -> Reply:
    return Reply(text=text, is_whole=True, tokens_in=None, tokens_out=None, where="")


def _question(*turns: Message | str) -> Question:
    messages = tuple(Message(role="user", content=turn) if isinstance(turn, str) else turn for turn in turns)
    return Question(messages=messages, source="", licence=None)


def measure_all(data: Path, seed: int) -> dict[str, Any]:
    """Everything, as a record."""
    people, italian = read(data), sentences(data, "it")
    draw: Callable[[], random.Random] = lambda: random.Random(seed)  # noqa: E731
    listed = read_word_levels(data / "kelly" / "kelly_it.json", LEVELS)
    checks = {"language": language(italian, sentences(data, "en")), **alone(people, draw())}
    checks["near_copy"] = copies(people, draw())
    for share in (0.2, 0.5):
        checks[f"template, {share:.0%} of the answers"] = patterns(people["cima"], italian, share, draw())
    return {"checks": checks, "levels": levels(italian, listed, seed)}


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of the data sets.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
@click.option(
    "--levelled",
    type=click.Path(path_type=Path),
    help="Write passages with their levels to this file, for levelled_text, and measure nothing.",
)
def main(data: Path, seed: int, out: Path | None, levelled: Path | None) -> None:
    console = Console(width=140)
    if levelled is not None:
        listed = read_word_levels(data / "kelly" / "kelly_it.json", LEVELS)
        made = [each for side in passages(sentences(data, "it"), listed, seed) for each in side]
        lines = [json.dumps({"text": text, "level": level}, ensure_ascii=False) + "\n" for level, text in made]
        levelled.write_text("".join(lines), encoding="utf-8")
        console.print(f"{len(made):,} passages in {levelled}")
        return
    record = measure_all(data, seed)
    show(record, console)
    if out is not None:
        out.write_text(json.dumps(record | {"seed": seed, "environment": environment(_ROOT)}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
