"""vLLM's rules for adapters."""

import json
import shlex
from pathlib import Path

import pytest

from dylora_moe.errors import ExportError
from dylora_moe.export.vllm import check_rules, serve_command


def adapter(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "bias": "none"} | changes))
    return folder


@pytest.mark.parametrize(("ranks", "room"), [((1,), 1), ((2, 8), 8), ((9, 4), 16), ((200,), 256), ((512,), 512)])
def test_the_rank_is_the_least_that_has_room(tmp_path: Path, ranks: tuple[int, ...], room: int) -> None:
    assert check_rules({f"e{rank}": adapter(tmp_path / str(rank), r=rank) for rank in ranks}) == room


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"r": 513}, "ranks up to 512"),
        ({"bias": "all"}, "without biases"),
        ({"use_dora": True}, "without DoRA"),
        ({"modules_to_save": ["lm_head"]}, "without modules saved whole"),
        ({"peft_type": "LOHA"}, "a plain LoRA"),
    ],
)
def test_each_rule_is_held(tmp_path: Path, change: dict[str, object], told: str) -> None:
    with pytest.raises(ExportError, match=told):
        check_rules({"mine": adapter(tmp_path / "mine", **change)})


def test_the_command_pins_a_commit_and_quotes_folders(tmp_path: Path) -> None:
    place = adapter(tmp_path / "two words")
    words = shlex.split(serve_command("org/base", "abc", {"mine": place}))
    assert words == [
        *("vllm", "serve", "org/base", "--revision", "abc", "--enable-lora", "--max-lora-rank", "8"),
        *("--lora-modules", f"mine={place}"),
    ]
