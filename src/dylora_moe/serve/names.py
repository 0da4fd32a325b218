"""Names under which clients ask for the mixture, its base and its experts."""

from collections.abc import Sequence

from dylora_moe.evaluate.load import Speaker

BASE_NAME = "base"


def name_speakers(run_name: str, experts: Sequence[str]) -> dict[str, Speaker]:
    """Name -> who answers; the mixture first.

    The mixture is called as its run, the base `base`, an expert by its name. Where that is taken, its kind
    goes before it: `mixture-base`, `expert-base`, `expert-base-2`.
    """
    named = {BASE_NAME: Speaker(kind="base")}
    named[_free(run_name, "mixture", named)] = Speaker()
    for expert in experts:
        named[_free(expert, "expert", named)] = Speaker(kind="expert", expert=expert)
    return dict(sorted(named.items(), key=lambda item: ("routed", "base", "expert").index(item[1].kind)))


def _free(name: str, kind: str, taken: dict[str, Speaker]) -> str:
    choices = [name, f"{kind}-{name}", *(f"{kind}-{name}-{number}" for number in range(2, len(taken) + 3))]
    return next(choice for choice in choices if choice not in taken)
