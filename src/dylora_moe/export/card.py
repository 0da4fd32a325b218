"""A trained run -> its model card: base, experts, routing, data, results, settings and limits, as the run has them."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from dylora_moe.bases import EMBEDDED
from dylora_moe.bases.folder import is_fingerprint, licence_of
from dylora_moe.report.records import RunRecord
from dylora_moe.report.settings import unlike_defaults
from dylora_moe.skills.library import RECORD
from dylora_moe.tuner.folder import EXPERTS_FOLDER, read_description

# What a card says elsewhere, or what only says where files lay.
_NOT_SHOWN = {"base_model", "datasets", "skills", "data_registry", "chat_template", "resume_from", "trackers"}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#|!~$&:@])")
_FOLDERS = re.compile(r"(?:(?<=[\s,'\"=:])|^)(?:~|[A-Za-z]:)?[/\\](?:[^\s,'\"/\\]+[/\\])+")


def model_card(model_folder: Path, repository: str, run: RunRecord | None) -> str:
    """Markdown with the hub's header.

    Args:
        model_folder: Of the mixture.
        repository: Its hub id.
        run: That made it, or None where only the model is there.
    """
    description = read_description(model_folder)
    base, revision, stages = description["base"], description.get("base_revision"), run.stages if run else ()
    domains = _domains([run.data, *(stage.data for stage in stages)]) if run else []
    results = _results(run) if run else []
    header = {
        "library_name": "dylora-moe",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "mixture-of-experts", "peft", "dylora-moe"],
        **({} if _is_local(base, revision) or base in EMBEDDED else {"base_model": base}),
    }
    card = _TEMPLATES.get_template("card.md.jinja").render(
        front=yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(),
        title=repository.rpartition("/")[2],
        repository=repository,
        base=_base(base, revision),
        experts=[_expert(model_folder, expert["name"]) for expert in description["experts"]],
        router="one for all" if len(description["experts"]) == 1 else f"a {description['routing']['router']} router",
        routing=_routing(description["routing"], len(description["experts"])),
        table=_table(run.result) if run else None,
        data=domains,
        results=results,
        settings=[
            (name, _FOLDERS.sub("", value))
            for name, value, _ in (unlike_defaults(run.settings) if run else [])
            if name not in _NOT_SHOWN
        ],
        limits=_limits(description, domains, results, run),
    )
    return re.sub(r"\n{3,}", "\n\n", card).strip() + "\n"


def base_name(base: str, revision: str | None) -> str:
    """A base as other machines may know it: of a folder its own name, without the path to it."""
    return PureWindowsPath(base).name or "base" if _is_local(base, revision) else base


def _is_local(base: str, revision: str | None) -> bool:
    """Whether it was a folder of the machine that trained, which need not be this one."""
    is_path = base.startswith((".", "~", "/")) or "\\" in base or base.count("/") > 1
    return base not in EMBEDDED and (is_fingerprint(revision) or is_path or Path(base).is_dir())


def _base(name: str, revision: str | None) -> dict[str, Any]:
    if name in EMBEDDED:
        licence = f"{EMBEDDED[name].licence}. {EMBEDDED[name].licence_note.rstrip('.')}"
        return {"name": name, "revision": revision, "licence": licence, "is_local": False}
    if _is_local(name, revision):
        licence = licence_of(Path(name).expanduser())
        return {"name": base_name(name, revision), "revision": revision, "licence": licence, "is_local": True}
    return {"name": name, "revision": revision, "licence": "as its page on the hub says", "is_local": False}


def _expert(model_folder: Path, name: str) -> dict[str, Any]:
    path = model_folder / EXPERTS_FOLDER / name / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    targets = config["target_modules"]
    shown = targets if isinstance(targets, str) else ", ".join(sorted({each.rpartition(".")[2] for each in targets}))
    return {"name": name, "rank": config["r"], "alpha": config["lora_alpha"], "targets": shown}


def _routing(routing: Mapping[str, Any], experts: int) -> str:
    if experts == 1:
        return "One expert serves everything."
    unit = "document, from its prompt" if routing["granularity"] == "sequence" else "token"
    if routing["router"] == "prototype":
        return f"One decision a {unit}: the expert of the nearest known skill. Where none is near: {routing['unsure']}."
    where = "one router for all layers" if routing["router_scope"] == "shared" else "one router a layer"
    return f"One decision a {unit}, by {where} that reads layer {routing['tap_layer']}; top {routing['top_k']}."


def _domains(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each once: a stage of a stream that learned a skill again has its rows again."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        for each in record.get("domains", []):
            licences = [str(licence or "not stated") for licence in each.get("licences", [])]
            found[each["domain"], each.get("sha256", "")] = {
                "domain": each["domain"],
                "sources": ", ".join(_source(str(source)) for source in each.get("sources", [])),
                "rows": each.get("num_train", 0),
                "licences": ", ".join(dict.fromkeys(licences)) or "not stated",
                "sha256": str(each.get("sha256", ""))[:16],
            }
    return list(found.values())


def _source(where: str) -> str:
    """A data set of the hub whole, of a file its name."""
    return where if where.startswith("hub:") else PurePath(where).name


def _results(run: RunRecord) -> list[dict[str, Any]]:
    result = run.result
    if summary := result.get("summary"):
        names, last = summary.get("skills", []), ((summary.get("loss") or {}).get("matrix") or [[]])[-1]
        base = _base_losses(run.path / RECORD)
        if len(last) != len(names):
            return []
        return [
            {"domain": name, "base": base[name], "mixture": loss, "rows": ""}
            for name, loss in zip(names, last, strict=True)
            if name in base and loss is not None
        ]
    before = {each["domain"]: each for each in (result.get("before") or {}).get("domains", [])}
    return [
        {
            "domain": each["domain"],
            "base": before[each["domain"]]["loss"],
            "mixture": each["loss"],
            "rows": each["rows"],
        }
        for each in (result.get("after") or {}).get("domains", [])
        if each["domain"] in before
    ]


def _base_losses(path: Path) -> dict[str, float]:
    """Skill -> the base's loss, as the library of a stream has it."""
    if not path.is_file():
        return {}
    return {each["name"]: each["base_loss"] for each in json.loads(path.read_text(encoding="utf-8"))["skills"]}


def _table(result: Mapping[str, Any]) -> dict[str, Any] | None:
    if summary := result.get("summary"):
        routing, names, shares = summary.get("routing") or {}, summary.get("skills", []), "confusion"
    else:
        routing, shares = (result.get("after") or {}).get("routing") or {}, "table"
        names = routing.get("domains", [])
    if not routing.get("experts") or len(routing.get(shares, [])) != len(names):
        return None
    rows = [["" if share is None else f"{share:.0%}" for share in row] for row in routing[shares]]
    return {"experts": routing["experts"], "rows": list(zip(names, rows, strict=True))}


def _limits(
    description: Mapping[str, Any],
    domains: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    run: RunRecord | None,
) -> list[str]:
    known = ", ".join(each["domain"] for each in results)  # skills that a stream took in were not trained on here
    lines = [
        "What the base gets wrong, and what it was not made for, holds for this model too.",
        f"It was measured on validation rows of {known} alone; elsewhere it may be worse than the base."
        if known
        else "Nothing is known of how good it is.",
    ]
    if len(description["experts"]) > 1 and description["routing"]["granularity"] == "sequence":
        lines.append("A prompt that mixes domains gets one expert for all of its answer.")
    if run and run.settings.get("load_in_4bit"):
        lines.append("It was trained on the base in 4 bits; on the base in full precision its losses are others.")
    if any("not stated" in each["licences"] for each in domains):
        lines.append("Some data came without a stated licence: see above before you use this for more than research.")
    return lines


def _markdown(value: Any) -> str:
    """Text as it is, whatever it holds: no markup, no line of its own, no table cell more."""
    flat = " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())
    return _MARKDOWN.sub(r"\\\1", flat)


_TEMPLATES = Environment(
    loader=PackageLoader("dylora_moe.export", "."),
    undefined=StrictUndefined,
    autoescape=False,  # Markdown, by the filter below
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters["md"] = _markdown
