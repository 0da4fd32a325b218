"""Passes of a twin, counted: which bytes its tensors take, and when they take most.

Nothing is computed: torch itself says, operation by operation, which tensors a pass makes, keeps for backward and
drops, for whatever the architecture and the executions of the experts do. What layers that were left out of the twin
would add is added.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dylora_moe.train.fit.twin import Twin
from dylora_moe.tuner import LoadWindow
from dylora_moe.tuner.head import Head
from dylora_moe.tuner.routing import Layout

# What torch's allocators round up to: c10's alignment on a CPU, the smallest block of the caching allocator on a GPU.
_GRAIN = {"cpu": 64, "cuda": 512}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """The shape of one forward pass.

    Attributes:
        rows: Rows of the batch.
        tokens: Tokens of its longest row, to which all are padded.
        labelled: Share of the tokens that are learned, 0 to 1.
        documents: The most documents of one row; above 1 only where rows are packed.
    """

    rows: int
    tokens: int
    labelled: float = 1.0
    documents: int = 1

    @property
    def num_labelled(self) -> int:
        """Positions that reach the head."""
        return round(self.rows * (self.tokens - 1) * self.labelled)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """Bytes of one forward and backward pass, beyond weights, gradients that were there before, and optimizer.

    Attributes:
        activations: Kept for backward when the decoder is done.
        forward: Most held at once until then.
        loss: Most held while the loss is made, beyond the activations.
        backward: Most held from then on, the gradients made so far among it.
    """

    activations: int
    forward: int
    loss: int
    backward: int


class Meter(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it that are alive, and the most there were since `restart`.

    Args:
        device: Where they are.
        num_labelled: What a mask picks where tensors have no values; None where they have.
    """

    def __init__(self, device: torch.device, num_labelled: int | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._grain = _GRAIN.get(device.type, 1)
        self._num_labelled = num_labelled
        self._seen: dict[int, tuple[weakref.ref[Any], int]] = {}

    def restart(self) -> int:
        """The peak so far; from here on another one is taken."""
        peak, self.peak = self.peak, self.live
        return peak

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Never count these and what shares their memory."""
        for tensor in tensors:
            self._note(tensor, counts=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs) if self._num_labelled is None else self._without_values(func, args, kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf, counts=True)
        return out

    def _without_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call an operation on tensors without values, where torch itself knows how or not."""
        if func is torch.ops.aten._grouped_mm.default:  # torch 2.13 knows it for bfloat16 alone
            left, right, offsets = args[0], args[1], args[2] if len(args) > 2 else kwargs["offs"]
            groups = (offsets.shape[0],) if right.dim() == 2 else ()
            return left.new_empty(*groups, left.shape[0], right.shape[-1])
        if func is torch.ops.aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            assert self._num_labelled is not None
            mask = args[1][0]  # how many are true, no tensor without values can say
            places = torch.empty(self._num_labelled, dtype=torch.int64, device=mask.device)
            args = (args[0], [places] * mask.dim())
        return func(*args, **kwargs)

    def _note(self, tensor: Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = -(-storage.nbytes() // self._grain) * self._grain if counts else 0

        def forget(_: Any) -> None:
            self.live -= self._seen.pop(key)[1]

        self._seen[key] = (weakref.ref(storage, forget), size)
        self.live += size
        self.peak = max(self.peak, self.live)


def trace_step(
    twin: Twin,
    batch: Pass,
    *,
    checkpointing: bool = False,
    autocast: torch.dtype | None = None,
    accumulates: bool = False,
) -> StepTrace:
    """Forward and backward passes of a micro-batch.

    Args:
        twin: Left without gradients.
        batch: Its shape.
        checkpointing: Whether layers keep their inputs only.
        autocast: The dtype of mixed precision; None without.
        accumulates: Whether earlier passes of the same optimizer step have left gradients, which are not counted.
    """
    model, borders = twin.model.train(), _Borders(twin)
    with twin.mode:
        earlier = {part: torch.empty_like(part) for part in model.parameters() if accumulates and part.requires_grad}
        for part, gradient in earlier.items():
            part.grad = gradient
    with twin.mode, _checkpointing(twin, checkpointing), _metered(twin, batch, earlier.values()) as meter:
        with _autocast(twin, autocast):
            with borders.watching(meter):
                hidden = _decode(twin, batch)
            forward, kept = meter.restart(), meter.live
            nll = _head(twin).nll(hidden, _labels(twin, batch))
            loss = nll.sum() + model.auxiliary_losses(LoadWindow()).balance
            of_loss = meter.restart() - kept
        del nll, hidden
        loss.backward()
        borders.end()
        gradients = [0 if accumulates else _gradients(layer) for layer in twin.layers]
        model.zero_grad(set_to_none=True)
        model.state.decisions = {}
    more_kept, more_made = _left_out(twin, borders.kept), _left_out(twin, gradients)
    return StepTrace(
        activations=kept + more_kept,
        forward=forward + more_kept,
        loss=of_loss,
        backward=borders.backward_peak(more_kept, more_made),
    )


def trace_evaluation(twin: Twin, batch: Pass, *, autocast: torch.dtype | None = None) -> int:
    """Most bytes held at once in a pass of evaluation."""
    twin.model.eval()
    with twin.mode, torch.no_grad(), _metered(twin, batch) as meter:
        with _autocast(twin, autocast):
            _head(twin).nll(_decode(twin, batch), _labels(twin, batch))
        peak = meter.peak
        twin.model.state.decisions = {}
    twin.model.train()
    return peak


class _Borders:
    """What is held at the borders between layers, on the way forth and back."""

    def __init__(self, twin: Twin) -> None:
        self._twin = twin
        self._at: list[int] = []
        self._peaks: list[int] = []
        self._meter: Meter | None = None

    @contextmanager
    def watching(self, meter: Meter) -> Iterator[None]:
        """Inside the block, the forward pass is watched; its backward pass will be."""
        self._meter = meter

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            self._at.append(meter.live)
            if states.requires_grad:
                states.register_hook(lambda grad: self._peaks.append(meter.restart()))

        handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in self._twin.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def end(self) -> None:
        """The backward pass is done."""
        assert self._meter is not None
        self._peaks.append(self._meter.restart())

    @property
    def kept(self) -> list[int]:
        """What each layer keeps; of the last it is not asked."""
        return [after - before for before, after in zip(self._at, self._at[1:], strict=False)] + [0]

    def backward_peak(self, more_kept: int, more_made: int) -> int:
        """The peak of the backward pass of a model with all layers.

        The last layer's part begins with what all layers keep, the first one's ends with the gradients of all.
        """
        first, *between, last = self._peaks if len(self._peaks) > 1 else [self._peaks[0]] * 2
        return max([first + more_kept, last + more_made, *(peak + max(more_kept, more_made) for peak in between)])


class _Layout(Layout):
    """A layout whose documents were counted beforehand."""

    __slots__ = ("count",)

    @property
    def documents_per_row(self) -> int:
        return self.count


def _left_out(twin: Twin, of_kept: Sequence[int]) -> int:
    return sum((layer.stands_for - 1) * size for layer, size in zip(twin.kept, of_kept, strict=True))


@contextmanager
def _metered(twin: Twin, batch: Pass, others: Iterable[Tensor] = ()) -> Iterator[Meter]:
    meter = Meter(twin.device, batch.num_labelled)
    meter.leave_out([*twin.model.parameters(), *twin.model.buffers(), *others])
    with meter:
        yield meter


@contextmanager
def _checkpointing(twin: Twin, wanted: bool) -> Iterator[None]:
    if wanted:
        twin.model.activation_checkpointing_enable()
    try:
        yield
    finally:
        for layer in twin.layers:
            layer.gradient_checkpointing = False  # type: ignore[assignment]


def _autocast(twin: Twin, dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast(twin.device.type, dtype)


def _decode(twin: Twin, batch: Pass) -> Tensor:
    """Last hidden states; routers decide from a layout that needs no values."""
    model, shape = twin.model, (batch.rows, batch.tokens)
    ids = torch.empty(shape, dtype=torch.int64, device=twin.device)
    flags = torch.empty(shape, dtype=torch.bool, device=twin.device)
    layout = _Layout(valid=flags, document=ids, prompt=flags)
    object.__setattr__(layout, "count", batch.documents)

    def give(*_: Any) -> None:
        model.state.forced, model.state.layout = None, layout

    borders = {"position_ids": ids} if batch.documents > 1 else {"attention_mask": torch.empty_like(ids)}
    with ExitStack() as stack:
        # While an expert is forced the tap asks no tensor for values; then it goes on as if there had been none.
        stack.enter_context(model.forced(model.expert_names[0]))
        handle = model.lm.get_decoder().register_forward_pre_hook(give)
        stack.callback(handle.remove)
        return model(hidden_only=True, input_ids=ids, **borders)


def _labels(twin: Twin, batch: Pass) -> Tensor:
    return torch.empty(batch.rows, batch.tokens, dtype=torch.int64, device=twin.device)


def _head(twin: Twin) -> Head:
    layer: Any = twin.model.lm.get_output_embeddings()
    softcap = getattr(twin.model.config.get_text_config(), "final_logit_softcapping", None)
    return Head(weight=layer.weight, bias=getattr(layer, "bias", None), softcap=softcap)


def _gradients(layer: nn.Module) -> int:
    return sum(parameter.grad.nbytes for parameter in layer.parameters() if parameter.grad is not None)
