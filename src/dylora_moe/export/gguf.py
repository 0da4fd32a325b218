"""A merged folder -> a GGUF file, by llama.cpp's own converter where it is installed; the chat template is kept."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from gguf import GGUFReader

from dylora_moe.errors import ExportError

VARIABLE = "LLAMA_CPP"
TYPES = ("f32", "f16", "bf16", "q8_0")
_CONVERTER = "convert_hf_to_gguf.py"


def find_converter(folder: Path | None) -> Path:
    """llama.cpp's converter: in a folder, else in that of LLAMA_CPP, else on PATH.

    Raises:
        ExportError: It is not there.
    """
    named = folder or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is not None:
        found = named.expanduser() / _CONVERTER
        if found.is_file():
            return found.absolute()
        raise ExportError(f"{named} must hold llama.cpp's {_CONVERTER}, and does not. Give the folder that does.")
    if on_path := shutil.which(_CONVERTER):
        return Path(on_path)
    raise ExportError(
        f"GGUF files are written by llama.cpp's {_CONVERTER}, which is not installed here. Get it with `git clone "
        f"https://github.com/ggml-org/llama.cpp`, and name its folder by --llama-cpp or {VARIABLE}, or put it on PATH."
    )


def convert(merged: Path, target: Path, kind: str, converter: Path) -> None:
    """Write a GGUF of an ordinary transformers folder.

    Args:
        merged: The folder, with tokenizer and chat template.
        target: The file to write.
        kind: One of `TYPES`.
        converter: As `find_converter` gave it.

    Raises:
        ExportError: The converter fails, or leaves out the chat template.
    """
    command = [sys.executable, str(converter), str(merged), "--outfile", str(target), "--outtype", kind]
    # Its own `gguf` lies beside it, and may be newer than that of this package.
    done = subprocess.run(command, capture_output=True, text=True, cwd=converter.parent)
    if done.returncode or not target.is_file():
        last = [line for line in done.stderr.strip().splitlines() if line.strip()][-3:]
        raise ExportError(
            f"llama.cpp's converter must be able to convert the merged model, and it says: {' '.join(last)[-600:]} "
            "Its requirements are those of its requirements/requirements-convert_hf_to_gguf.txt."
        )
    wanted = (merged / "chat_template.jinja").read_text(encoding="utf-8")
    field = GGUFReader(target).get_field("tokenizer.chat_template")
    if field is None or str(field.contents()).strip() != wanted.strip():
        raise ExportError(f"the GGUF must have the chat template of the model, and {converter} wrote another or none.")
