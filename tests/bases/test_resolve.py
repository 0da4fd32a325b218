"""Names: what is taken for a folder, a hub id or an embedded base, and what is refused with which advice."""

from pathlib import Path

import pytest

from dylora_moe.bases import resolve, resolve_base
from dylora_moe.errors import BaseModelError


def test_a_local_folder_is_taken_as_it_is(llama: Path) -> None:
    lines: list[str] = []
    resolved = resolve_base(str(llama), progress=lines.append)
    assert resolved.path_or_id == str(llama)
    assert resolved.licence == "mit"
    assert lines == [f"{llama}: licence: mit"]
    resolve_base(str(llama), progress=lines.append)
    assert len(lines) == 1  # the licence is named once in a process


def test_the_revision_of_a_folder_changes_with_its_weights(llama: Path) -> None:
    before = resolve_base(str(llama)).revision
    assert resolve_base(str(llama)).revision == before
    weights = llama / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert resolve_base(str(llama)).revision != before


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: other\nlicense_name: my-terms\n---\n", "my-terms"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("no front matter", "not stated"),
        ("---\nlicense: [unclosed\n---\n", "not stated"),
        ("---\n- a list\n---\n", "not stated"),
        (None, "not stated"),
    ],
)
def test_the_licence_is_read_from_the_model_card(llama: Path, card: str | None, licence: str) -> None:
    (llama / "README.md").unlink()
    if card is not None:
        (llama / "README.md").write_text(card)
    assert resolve_base(str(llama)).licence == licence


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere/x", "~nobody-here/x", "a/b/c", "x\\y", ""])
def test_a_path_that_does_not_exist_is_not_asked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelError, match=r"must exist, got no folder there .*pypi:gemma3-270m"):
        resolve_base(name)


def test_a_missing_folder_under_an_existing_one_is_not_asked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(BaseModelError, match=r"'models/mine' must exist"):
        resolve_base("models/mine")


def test_a_file_is_refused(llama: Path) -> None:
    with pytest.raises(BaseModelError, match="got the file"):
        resolve_base(str(llama / "model.safetensors"))


@pytest.mark.parametrize(("name", "nearest"), [("pypi:gemma-270m", "pypi:gemma3-270m"), ("pypi:smolm", "pypi:smollm2")])
def test_an_unknown_embedded_base_gets_the_nearest_name(name: str, nearest: str) -> None:
    with pytest.raises(
        BaseModelError, match=rf"pypi:gemma3-270m, pypi:smollm2, got '{name}'. Did you mean {nearest}\?"
    ):
        resolve_base(name)


def test_a_revision_is_for_the_hub_only(llama: Path) -> None:
    with pytest.raises(BaseModelError, match="only for a hub model"):
        resolve_base(str(llama), revision="main")
    with pytest.raises(BaseModelError, match="only for a hub model"):
        resolve_base("pypi:smollm2", revision="main")


def test_a_folder_without_config_is_refused(llama: Path) -> None:
    (llama / "config.json").unlink()
    with pytest.raises(BaseModelError, match=r"must hold config\.json, got none"):
        resolve_base(str(llama))


def test_an_adapter_is_no_base(llama: Path) -> None:
    (llama / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="got a PEFT adapter"):
        resolve_base(str(llama))


def test_pickled_weights_are_refused(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"got only pickles \(pytorch_model.bin\).*Convert it"):
        resolve_base(str(llama))
    (llama / "pytorch_model.bin").unlink()
    with pytest.raises(BaseModelError, match=r"must hold safetensors weights .* got none"):
        resolve_base(str(llama))


def test_a_missing_shard_is_named(llama: Path) -> None:
    index = llama / "model.safetensors.index.json"
    (llama / "model.safetensors").rename(llama / "model-00001-of-00002.safetensors")
    index.write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    with pytest.raises(BaseModelError, match=r"got none named model-00002-of-00002.safetensors\."):
        resolve_base(str(llama))
    index.write_text("{}")
    with pytest.raises(BaseModelError, match="must map weight names to files"):
        resolve_base(str(llama))


def test_the_revision_sees_both_ends_of_a_large_file(llama: Path) -> None:
    weights = llama / "model.safetensors"
    seen: set[str] = set()
    for place in (None, 0, 3 << 20):
        content = bytearray((3 << 20) + 1)
        if place is not None:
            content[place] = 1
        weights.write_bytes(content)
        seen.add(resolve_base(str(llama)).revision)
    assert len(seen) == 3


def test_the_base_of_an_earlier_time_is_told_from_another(llama: Path) -> None:
    lines: list[str] = []
    before = resolve_base(str(llama)).revision
    resolve._licence_named.clear()
    assert resolve_base(str(llama), expected=before, progress=lines.append).revision == before
    assert lines == []  # its licence was read when it was trained on
    (llama / "config.json").write_text((llama / "config.json").read_text() + "\n")
    with pytest.raises(BaseModelError, match=f"must be the one that the experts were trained on, of revision {before}"):
        resolve_base(str(llama), expected=before)


@pytest.mark.parametrize("name", ["mine", "org/mine", "/no/where"])
def test_a_base_that_was_a_folder_is_not_asked_for_on_the_hub(name: str) -> None:
    with pytest.raises(BaseModelError, match=f"The base {name} must be a folder here: .* of revision sha256-of-parts"):
        resolve_base(name, expected="sha256-of-parts:0123456789abcdef")
