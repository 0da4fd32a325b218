"""A prompt -> the expert that its router sends it to, by the layers below the tap alone."""

from collections.abc import Sequence

import torch

from dylora_moe.errors import ServeError
from dylora_moe.tuner import DyLoraModel, PrototypeRouter


def check_routable(model: DyLoraModel) -> None:
    """See that a prompt alone decides for one expert.

    Raises:
        ServeError: It does not.
    """
    routing = model.routing_config
    wanted = {
        "granularity": (routing.granularity, "sequence"),
        "top_k": (routing.top_k, 1),
        "router_scope": (routing.router_scope, "shared"),
    }
    for name, (got, needed) in wanted.items():
        if got != needed:
            raise ServeError(
                f"--upstream needs a run with {name} {needed}, as the prompt alone must decide for one expert, and "
                f"this one has {got}. Serve it without --upstream."
            )
    if min(expert.maturity for expert in model.experts) < 1:
        raise ServeError("--upstream needs experts that are all mature, and this run has one on its way. Train it on.")


@torch.no_grad()
def route(model: DyLoraModel, prompt: Sequence[int]) -> str | None:
    """The expert for a prompt; None where no skill is near enough and the base answers.

    Raises:
        ServeError: No skill is near enough, and the run wants all experts together then.
    """
    if not model.routers:
        return model.expert_names[0]
    ids = torch.tensor([list(prompt)])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
    features = model.prompt_features([batch]).to(model.device)
    (router,) = model.routers.values()
    if isinstance(router, PrototypeRouter):
        logits, sure = router.judge(features)
        if not bool(sure[0]):
            if model.routing_config.unsure == "base":
                return None
            raise ServeError("no skill is near enough to this prompt, and all experts together are not to be had here.")
    else:
        logits = router(features)
    return model.expert_names[int(logits[0].argmax())]
