"""Four independent LoRAs become a mixture: which router, and how many rows, send held-out prompts to the right one?

LoRAs of unlike ranks and targets are trained for a few steps each by stock PEFT; then routers are fitted to rows drawn
anew, and `dylora experts assemble` makes the mixture, whose own decisions are counted. One thread. Run with --help.
"""

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from _measure import environment
from peft import LoraConfig, get_peft_model

from dylora_moe import load
from dylora_moe.bases import load_base
from dylora_moe.data.batching import Collator, pad_token_id
from dylora_moe.data.build import build_data
from dylora_moe.data.settings import DataSettings
from dylora_moe.data.stream import parse_skills
from dylora_moe.skills.prototypes import fit_prototypes
from dylora_moe.train.assemble import assemble, read_prompts
from dylora_moe.tuner import DyLoraModel, ExpertConfig, RoutingConfig

FILES = {
    "gsm8k": "gsm8k/train.jsonl",
    "wikisql": "wikisql/train.jsonl",
    "mbpp": "mbpp/mbpp.jsonl",
    "code_alpaca": "code_alpaca/code_alpaca_2k.json",
}
LORAS: dict[str, dict[str, Any]] = {
    "gsm8k": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "wikisql": {"r": 4, "lora_alpha": 8, "target_modules": ["down_proj"]},
    "mbpp": {"r": 16, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "code_alpaca": {"r": 6, "lora_alpha": 12, "use_rslora": True, "target_modules": ["gate_proj", "up_proj"]},
}
_ROOT = Path(__file__).resolve().parents[1]


def entry(file: Path) -> dict[str, Any]:
    return {"path": str(file), "on_bad_row": "skip"}


def read_rows(files: dict[str, Path], base: Any, settings: DataSettings) -> dict[str, Any]:
    found = {}
    for name, file in files.items():
        (skill,) = parse_skills([{"skill": name, "datasets": [entry(file)]}])
        found[name] = build_data(skill.datasets, base.tokenizer, settings)
    return found


def train_lora(base: str, name: str, rows: list[Any], folder: Path, steps: int) -> None:
    loaded = load_base(base, dtype=torch.float32)
    model = get_peft_model(loaded.model, LoraConfig(task_type="CAUSAL_LM", **LORAS[name]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    collate = Collator(pad_token_id=pad_token_id(loaded.tokenizer))
    for step in range(steps):
        batch = {key: value for key, value in collate(rows[2 * step : 2 * step + 2]).items() if key != "domain"}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(folder))


def compare_routers(base: str, features: dict[str, Any], counts: list[int], draws: int) -> list[dict[str, Any]]:
    """Share of held-out prompts that go to their own expert, by router and rows; mean and least over draws."""
    names, found = list(features), []
    for count in counts:
        right: dict[str, list[list[float]]] = {"prototype": [], "prototype, 2 % unsure": [], "linear": []}
        for seed in range(draws):
            draw = np.random.default_rng(seed)
            order = {name: draw.permutation(len(rows)) for name, rows in features.items()}
            known = {name: features[name][places[:count]] for name, places in order.items()}
            held = {name: features[name][places[count:]] for name, places in order.items()}
            for router, shares in right.items():
                model = empty_mixture(base, names, "linear" if router == "linear" else "prototype")
                if router == "linear":
                    model.teach_routers(np.concatenate(list(known.values())), np.repeat(names, count).tolist())
                else:
                    fitted = fit_prototypes(known, unsure_rate=0.02 if "unsure" in router else 0)
                    model.set_prototypes(fitted.projection, fitted.centres, fitted.radii, fitted.skills)
                shares.append([share_right(model, at, held[name]) for at, name in enumerate(names)])
        for router, shares in right.items():
            table = np.asarray(shares)
            found.append(
                {
                    "router": router,
                    "rows": count,
                    "right": float(table.mean()),
                    "worst_draw": float(table.mean(1).min()),
                    "by_domain": dict(zip(names, table.mean(0).tolist(), strict=True)),
                }
            )
    return found


_LOADED: dict[str, Any] = {}


def empty_mixture(base: str, names: list[str], router: Any) -> DyLoraModel:
    """A mixture of untrained experts, of which only the router matters; made once for each kind."""
    if router not in _LOADED:
        model = load_base(base, dtype=torch.float32).model
        expert = ExpertConfig(rank=1, target_modules=("v_proj",))
        routing = RoutingConfig(granularity="sequence", router=router)
        _LOADED[router] = DyLoraModel(model, names, expert_config=expert, routing=routing).eval()
    return _LOADED[router]


@torch.no_grad()
def share_right(model: DyLoraModel, expert: int, features: Any) -> float:
    router: Any = model.routers["shared"]
    rows = torch.as_tensor(features)
    right = router(rows).argmax(1) == expert
    return float((right & router.sure(rows) if hasattr(router, "sure") else right).float().mean())


@torch.no_grad()
def share_routed(model: DyLoraModel, rows: list[Any], expert: int, pad: int) -> float:
    """Of the model's own decisions on whole prompts."""
    collate, right = Collator(pad_token_id=pad), 0.0
    for start in range(0, len(rows), 8):
        batch = {key: value for key, value in collate(rows[start : start + 8]).items() if key != "domain"}
        model(hidden_only=True, **batch)
        right += float((model.decisions[None].logits.argmax(1) == expert).sum())
    return right / len(rows)


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of the data sets.")
@click.option("--base", default="pypi:smollm2", show_default=True)
@click.option("--steps", default=3, show_default=True, help="Of each LoRA.")
@click.option("--held", default=100, show_default=True, help="Held-out prompts of each domain.")
@click.option("--draws", default=5, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=_ROOT / "benchmarks/results/assemble.json")
def main(data: Path, base: str, steps: int, held: int, draws: int, output: Path) -> None:
    torch.set_num_threads(1)
    start, scratch = time.monotonic(), Path(tempfile.mkdtemp())
    files = {name: data / place for name, place in FILES.items()}
    loaded = load_base(base, dtype=torch.float32)
    bundles = read_rows(files, loaded, DataSettings(max_length=1024, overlong="truncate", validation_split=0.2))
    reader, counts = empty_mixture(base, list(files), "prototype"), [8, 16, 32]
    # Training rows alone: `assemble` draws its own from the same, and is measured on validation rows.
    rows = {name: [bundle.train[at] for at in range(max(counts) + held)] for name, bundle in bundles.items()}
    features = {name: read_prompts(reader, each, loaded.tokenizer) for name, each in rows.items()}
    routers = compare_routers(base, features, counts, draws)
    _LOADED.clear()
    for name in files:
        train_lora(base, name, rows[name], scratch / name, steps)
    made = assemble(
        base,
        {name: scratch / name for name in files},
        {name: [entry(file)] for name, file in files.items()},
        scratch / "mixture",
        tell=click.echo,
    )
    model, tokenizer = load(scratch / "mixture")
    mixture = {}
    for at, name in enumerate(files):
        prompts = list(bundles[name].validation[name])[:held]
        share = share_routed(model, prompts, at, pad_token_id(tokenizer))
        mixture[name] = {"held_out": len(prompts), "right": share, "rows": made["experts"][name]["rows"]}
    record = {"base": base, "routers": routers, "mixture": mixture, "seconds": time.monotonic() - start}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**environment(_ROOT), **record}, indent=2) + "\n", encoding="utf-8")
    for row in routers:
        click.echo(f"{row['router']}, {row['rows']} rows: {row['right']:.1%} right, worst draw {row['worst_draw']:.1%}")
    for name, found in mixture.items():
        click.echo(f"assembled: {name}: {found['right']:.1%} of {found['held_out']}")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
