"""Languages by the names that columns and files bear (`it`, `ita`, `italian`), and whether two columns are swapped."""

from collections.abc import Iterable, Mapping

from dylora_moe.errors import DataError

# ISO 639-1 code -> English name and the other names that a column or a file's ending may bear.
_NAMES = {
    "ar": ("Arabic", "ara"),
    "cs": ("Czech", "ces", "cze"),
    "da": ("Danish", "dan"),
    "de": ("German", "deu", "ger", "deutsch"),
    "el": ("Greek", "ell", "gre"),
    "en": ("English", "eng"),
    "es": ("Spanish", "spa", "espanol"),
    "fi": ("Finnish", "fin"),
    "fr": ("French", "fra", "fre", "francais"),
    "he": ("Hebrew", "heb"),
    "hi": ("Hindi", "hin"),
    "hu": ("Hungarian", "hun"),
    "it": ("Italian", "ita", "italiano"),
    "ja": ("Japanese", "jpn"),
    "ko": ("Korean", "kor"),
    "nl": ("Dutch", "nld", "dut"),
    "pl": ("Polish", "pol"),
    "pt": ("Portuguese", "por"),
    "ro": ("Romanian", "ron", "rum"),
    "ru": ("Russian", "rus"),
    "sv": ("Swedish", "swe"),
    "tr": ("Turkish", "tur"),
    "uk": ("Ukrainian", "ukr"),
    "zh": ("Chinese", "zho", "cmn"),
}
_CODES = {name.lower(): code for code, names in _NAMES.items() for name in (code, *names)}
# Enough for a sure answer: of real pairs of five words, 20 already decide.
NUM_ROWS_CHECKED = 200


def language_code(name: str) -> str | None:
    """The ISO 639-1 code of a language that a column is named after, or None."""
    return _CODES.get(name.strip().lower())


def language_name(code: str) -> str:
    """The English name of a known code."""
    return _NAMES[code][0]


def language_columns(columns: Iterable[object]) -> dict[str, str]:
    """Code -> column, for the columns that are named after a language; of one language the first column counts."""
    found: dict[str, str] = {}
    for column in columns:
        if isinstance(column, str) and (code := language_code(column)):
            found.setdefault(code, column)
    return found


def check_language_columns(rows: Iterable[Mapping[str, object]], *, where: str) -> None:
    """Stop where two columns named after languages hold each other's text.

    Only a clear swap stops: both columns must look more like the other's language. Rows without exactly two such
    columns are not looked at.

    Args:
        rows: The first rows, `NUM_ROWS_CHECKED` are plenty.
        where: What stands at the front of the error.

    Raises:
        DataError: With the column map that mends it.
    """
    texts: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for row in rows:
        columns = language_columns(row)
        if len(columns) == 2:
            held = texts.setdefault(tuple(columns.values()), {code: [] for code in columns})
            for code, column in columns.items():
                held[code].append(str(row[column]))
    for (first, second), held in texts.items():
        if _are_swapped({code: "\n".join(parts) for code, parts in held.items()}):
            one, other = (language_name(code) for code in held)
            raise DataError(
                f"{where}: columns {first!r} and {second!r} must hold {one} and {other} text, but of the first "
                f"{len(next(iter(held.values())))} rows {first!r} reads as {other} and {second!r} as {one}. Map the "
                f"columns the other way round: columns: {{{first}: {second}, {second}: {first}}}"
            )


def _are_swapped(texts: Mapping[str, str]) -> bool:
    # Its model takes a second and 100 MB, and only such columns need it.
    from py3langid import rank

    (first, first_text), (second, second_text) = texts.items()
    scores = [dict(rank(text)) for text in (first_text, second_text)]
    if not all(code in score for code in (first, second) for score in scores):
        return False
    return bool(scores[0][second] > scores[0][first] and scores[1][first] > scores[1][second])
