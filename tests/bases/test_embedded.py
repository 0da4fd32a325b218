"""The pinned facts about embedded bases hold together."""

import re

from dylora_moe.bases import EMBEDDED


def test_every_entry_is_pinned_exactly_and_names_its_licence() -> None:
    assert {"pypi:gemma3-270m", "pypi:smollm2"} <= set(EMBEDDED)
    for key, entry in EMBEDDED.items():
        assert entry.key == key
        assert all(re.fullmatch(r"[a-z0-9-]+==\d+\.\d+\.\d+", pin) for pin in entry.requirements)
        assert re.fullmatch(r"[0-9a-f]{64}", entry.gguf_sha256)
        assert re.fullmatch(r"[a-z0-9-]+-[0-9a-f]{8}", entry.folder_name)
        assert entry.licence and entry.licence_note and entry.source
        assert entry.disk_bytes > 2 * entry.gguf_bytes + entry.download_bytes


def test_gemma_chunks_are_joined_in_order() -> None:
    parts = EMBEDDED["pypi:gemma3-270m"].parts
    assert [part.member[-6:] for part in parts] == ["part00", "part01", "part02", "part03"]
    assert [part.requirement.split("==")[0][-5:] for part in parts] == ["part1", "part2", "part3", "part4"]
