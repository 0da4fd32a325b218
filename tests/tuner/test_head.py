"""The loss without the logits against the loss from all of them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from dylora_moe.errors import TunerError
from dylora_moe.tuner import head as head_module
from dylora_moe.tuner.head import read_head


def full_loss(lm: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """The loss of each labelled token from all logits, as transformers makes them."""
    logits = lm.lm_head(hidden) * getattr(lm.config, "logit_scale", 1.0) / getattr(lm.config, "logits_scaling", 1.0)
    if cap := getattr(lm.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none")
    return losses[labels[:, 1:].flatten() != -100]


def scaled(architecture: str) -> Any:
    """A tiny model that multiplies or divides its logits."""
    changes = {"Granite": {"logits_scaling": 4.0}, "Cohere": {"logit_scale": 0.25}}[architecture]
    common = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0}
    config = getattr(transformers, f"{architecture}Config")(**common | heads | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{architecture}ForCausalLM")(config).eval()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi", "gemma3", "Granite", "Cohere"])
@pytest.mark.parametrize("chunk_rows", [1000, 4])
def test_loss_and_gradient_equal_those_of_all_logits(
    make_base: Any, batch: Any, assert_near: Any, monkeypatch: Any, architecture: str, chunk_rows: int
) -> None:
    monkeypatch.setattr(head_module, "_CHUNK_ELEMENTS", chunk_rows * 99)
    lm = (make_base(architecture) if architecture.islower() else scaled(architecture)).requires_grad_(False)
    hidden = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weight = torch.rand(int((batch["labels"][:, 1:] != -100).sum()), generator=torch.Generator().manual_seed(2))
    expected = full_loss(lm, hidden, batch["labels"])
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), hidden)
    found = read_head(lm).nll(hidden, batch["labels"])
    (found_grad,) = torch.autograd.grad((found * weight).sum(), hidden)
    assert_near(found, expected)
    assert_near(found_grad, expected_grad)


@pytest.mark.parametrize("chunk_rows", [1000, 4])
def test_scores_are_losses_and_whether_the_likeliest_token_came(
    make_base: Any, batch: Any, assert_near: Any, monkeypatch: Any, chunk_rows: int
) -> None:
    monkeypatch.setattr(head_module, "_CHUNK_ELEMENTS", chunk_rows * 99)
    lm, labels = make_base("gemma2"), batch["labels"].clone()
    hidden = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(1))
    likeliest = read_head(lm).logits(hidden[:, :-1].flatten(0, 1)).argmax(-1).reshape(3, 11)
    labels[:, 1::2] = torch.where(labels[:, 1::2] == -100, -100, likeliest[:, ::2])
    nll, right = read_head(lm).score(hidden, labels)
    assert_near(nll, full_loss(lm, hidden, labels))
    wanted = labels[:, 1:] != -100
    assert right.tolist() == (likeliest == labels[:, 1:])[wanted].tolist()
    assert 0 < right.sum() < len(right)


def test_the_mean_is_the_models_own_loss(make_model: Any, batch: Any, gradients: Any, assert_near: Any) -> None:
    model = make_model(2).train()
    loss = model(**batch).loss
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    found = read_head(model.lm).nll(model(hidden_only=True, **batch), batch["labels"]).mean()
    found.backward()
    assert_near(found, loss)
    assert_near(gradients(model), expected)


def test_no_label_at_all_is_no_loss_and_no_gradient(make_base: Any, batch: Any) -> None:
    hidden = torch.randn(3, 12, 32, requires_grad=True)
    losses = read_head(make_base()).nll(hidden, torch.full_like(batch["labels"], -100))
    assert losses.shape == (0,) and losses.dtype == torch.float32
    losses.sum().backward()
    assert hidden.grad is None or not hidden.grad.any()


def test_bfloat16_heads_lose_in_float32(make_base: Any, batch: Any) -> None:
    lm = make_base().bfloat16()
    hidden = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    found = read_head(lm).nll(hidden, batch["labels"])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, full_loss(lm, hidden, batch["labels"]))
    found.mean().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


def test_float32_states_of_a_16_bit_base(make_base: Any, batch: Any) -> None:
    """Mixed precision hands such out."""
    lm = make_base().bfloat16()
    hidden = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = read_head(lm).nll(hidden, batch["labels"])
    torch.testing.assert_close(found, full_loss(lm, hidden.bfloat16(), batch["labels"]))
    found.mean().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32 and hidden.grad.any()


def test_a_model_that_changes_its_logits_otherwise_is_refused(make_base: Any) -> None:
    lm = make_base()
    lm.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(TunerError, match="changes its logits"):
        read_head(lm)


def test_what_happens_to_the_logits_after_the_head_is_not_guessed(make_base: Any) -> None:
    lm = make_base()

    def change(module: Any, args: Any, output: Any) -> Any:
        output.logits = output.logits + torch.linspace(0, 1, 99)
        return output

    lm.register_forward_hook(change)
    with pytest.raises(TunerError, match="LlamaForCausalLM changes its logits"):
        read_head(lm)


def test_a_model_without_an_output_layer_is_refused(make_base: Any) -> None:
    with pytest.raises(TunerError, match="LlamaModel has none"):
        read_head(make_base().get_decoder())


@pytest.mark.parametrize("training", [True, False])
def test_reading_the_head_leaves_the_mode(make_base: Any, training: bool) -> None:
    lm = make_base().train(training)
    read_head(lm)
    assert all(module.training is training for module in lm.modules())


def test_one_label_is_the_token_after_one_position(make_base: Any) -> None:
    lm = make_base()
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.full((2, 5), -100)
    labels[1, 3] = 7
    (loss,) = read_head(lm).nll(hidden, labels)
    torch.testing.assert_close(loss, -lm.lm_head(hidden)[1, 2].log_softmax(-1)[7])
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum(-1).nonzero().tolist() == [[1, 2]]


def test_the_label_of_the_first_token_is_not_predicted(make_base: Any) -> None:
    labels = torch.full((1, 4), -100)
    labels[0, 0] = 7
    assert read_head(make_base()).nll(torch.randn(1, 4, 32), labels).shape == (0,)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., Any]], bool]]:
    """(what stands for Liger's kernels) -> whether it passes the trial, on the CPU as if it ran there."""
    monkeypatch.setattr(head_module.kernels, "has_liger", lambda device, dtype: True)

    def run(compute: Callable[..., Any]) -> bool:
        monkeypatch.setattr(head_module, "by_liger", compute)
        head_module.passes_trial.cache_clear()
        return head_module.passes_trial(torch.device("cpu"), torch.float32, has_bias=True, is_capped=True)

    yield run
    head_module.passes_trial.cache_clear()


def test_kernels_of_others_pass_a_trial_first(
    tried: Callable[[Callable[..., Any]], bool], caplog: pytest.LogCaptureFixture
) -> None:
    def changed(loss: float, gradient: float) -> Callable[..., Any]:
        def compute(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            losses, gradients = head_module.by_chunks(*args, **kwargs)
            assert gradients is not None
            return losses * loss, gradients * gradient

        return compute

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("another version")

    before = torch.get_rng_state()
    with torch.no_grad():
        assert tried(changed(1.0, 1.0)) and not caplog.records
        assert not tried(changed(1.001, 1.0)) and not tried(changed(1.0, 1.001)) and not tried(changed(1.0, torch.nan))
    assert "liger-kernel is left aside on cpu in torch.float32: its numbers are not" in caplog.records[0].getMessage()
    assert not tried(fail) and "ImportError: another version" in caplog.records[-1].getMessage()
    assert torch.equal(torch.get_rng_state(), before)


def test_outside_a_gpu_nothing_is_tried(
    tried: Callable[[Callable[..., Any]], bool], make_base: Any, batch: Any
) -> None:
    asked: list[Any] = []
    tried(lambda *args, **kwargs: asked.append(args))
    asked.clear()
    read_head(make_base()).nll(torch.randn(3, 12, 32), batch["labels"])
    assert asked == []
