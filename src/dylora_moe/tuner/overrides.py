"""Ways to set the router aside for a while, for the whole batch or row by row, and what it decided."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dylora_moe.errors import TunerError
from dylora_moe.tuner.routed import RoutedLinear
from dylora_moe.tuner.routing import BASE, ROUTED, Decision, RoutingState


class Overridable(nn.Module):
    """The part of a mixture that says who answers. `expert_names` are in the router's order."""

    state: RoutingState

    @property
    @abstractmethod
    def expert_names(self) -> tuple[str, ...]:
        """Names in the router's order."""

    @abstractmethod
    def routed_linears(self) -> Iterator[tuple[str, RoutedLinear]]:
        """All adapted Linears with their names."""

    @contextmanager
    def forced(self, name: str | None) -> Iterator[None]:
        """Inside the block one expert serves every token, whatever the router says; None for the router again.

        To train it alone, freeze the others: their gradients are zeros, and an optimizer may still decay them.
        """
        if name is not None:
            self.index_of(name)
        previous, self.state.forced = self.state.forced, name
        try:
            yield
        finally:
            self.state.forced = previous

    @contextmanager
    @torch.no_grad()
    def merged(self, name: str) -> Iterator[None]:
        """Inside the block one expert serves every token at the price of the base: its products are in the weights.

        The base's own weights are kept aside, at the memory of the adapted Linears once more, and put back bit for bit.
        Sums are rounded otherwise than those of `forced`. It is for generation: nothing inside trains the expert.

        Raises:
            TunerError: There is no such expert, the base is quantised, or it answers alone or merged already.
        """
        self.index_of(name)
        if self.state.disabled:
            raise TunerError(f"{name!r} cannot be merged while the base answers alone. Leave that block first.")
        linears = [linear for _, linear in self.routed_linears() if name in linear.lora_A]
        if wrong := {type(layer).__name__ for linear in linears if type(layer := linear.base_layer) is not nn.Linear}:
            raise TunerError(f"an expert is merged into Linears with plain weights, the base has {', '.join(wrong)}.")
        aside: list[tuple[Tensor, Tensor]] = []
        try:
            for linear in linears:
                weight = cast(nn.Linear, linear.base_layer).weight
                aside.append((weight, weight.data))
                weight.data = weight.data + linear.get_delta_weight(name).to(weight)
            with torch.set_grad_enabled(False), self.disabled():
                yield
        finally:
            for weight, data in aside:
                weight.data = data

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block the base answers alone."""
        previous, self.state.disabled = self.state.disabled, True
        try:
            yield
        finally:
            self.state.disabled = previous

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Inside the block all experts answer together, each with the router's weight."""
        previous, self.state.dense = self.state.dense, True
        try:
            yield
        finally:
            self.state.dense = previous

    @contextmanager
    def by_rows(self, rows: Sequence[int]) -> Iterator[None]:
        """Inside the block each row of the batch has its own say: requests of different kinds in one pass.

        Args:
            rows: For each row the number of the expert that serves it alone, `ROUTED` or `BASE`.

        Raises:
            TunerError: There is no such expert.
        """
        if wrong := [row for row in rows if row not in (ROUTED, BASE) and not 0 <= row < len(self.expert_names)]:
            raise TunerError(
                f"each row must go to one of the {len(self.expert_names)} experts, ROUTED ({ROUTED}) or BASE ({BASE}), "
                f"got {wrong[0]}."
            )
        previous, self.state.rows = self.state.rows, torch.tensor(rows, dtype=torch.long)
        try:
            yield
        finally:
            self.state.rows = previous

    @contextmanager
    def recording(self) -> Iterator[list[Decision]]:
        """Inside the block, every decision of every pass is kept in the list that this gives."""
        previous, self.state.recorded = self.state.recorded, []
        try:
            yield self.state.recorded
        finally:
            self.state.recorded = previous

    @torch.no_grad()
    def routing(self) -> Float[Tensor, "batch tokens experts"] | None:
        """The weight of each expert in serving each token that the last pass read, or the last `generate` together.

        Float32, on the CPU; the mean over layers where each has a router of its own. Rows sum to 1, and to 0 where the
        base served alone. Of `generate` the last token is missing, which was written and never read. None where no
        router decided.
        """
        parts = []
        for decisions in self.state.passes:
            if not decisions:
                return None
            gates = torch.stack([decision.token_gates().float() for decision in decisions.values()]).mean(0)
            batch = int(next(iter(decisions.values())).row_of_unit[-1]) + 1
            parts.append(gates.view(batch, -1, gates.shape[1]).cpu())
        return torch.cat(parts, dim=1) if parts else None

    def index_of(self, name: str) -> int:
        """The number by which the router knows an expert.

        Raises:
            TunerError: There is no such expert.
        """
        if name not in self.expert_names:
            raise TunerError(f"there is no expert {name!r}; there are {', '.join(self.expert_names)}.")
        return self.expert_names.index(name)
