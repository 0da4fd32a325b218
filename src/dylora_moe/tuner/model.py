"""The model: a frozen causal language model, N LoRA experts over its Linears, and the router between them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from peft import LoraConfig, PeftModelForCausalLM
from peft.tuners.lora.model import LoraModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylora_moe.errors import TunerError
from dylora_moe.tuner.auxiliary import AuxiliaryLosses, BatchLoad, LoadWindow, auxiliary_losses
from dylora_moe.tuner.config import Execution, ExpertConfig, RoutingConfig
from dylora_moe.tuner.inspect import check_name, check_reach, decoder_layers, layer_index, lora_config
from dylora_moe.tuner.overrides import Overridable
from dylora_moe.tuner.prototype import PrototypeRouter, Router
from dylora_moe.tuner.routed import RoutedLinear
from dylora_moe.tuner.router import LinearRouter
from dylora_moe.tuner.routing import Decision, RoutingState
from dylora_moe.tuner.tap import Tap, find_documents, mean_prompts, prompt_of_labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """One expert's place in the mixture. Its weights are the PEFT adapter of the same name."""

    name: str
    maturity: float = 1.0
    """0 new, 1 trained; below 1 the mixture works by dense collaboration."""
    frozen: bool = False
    """True when its weights take no more gradients."""


class DyLoraModel(Overridable):
    """N experts and a router over one frozen base, in one pass of the base.

    Call it like the base: `model(input_ids=...)`, `model.generate(...)`. `peft_model` is the PEFT model that holds
    the experts as ordinary LORA adapters; `lm` the base's causal language model class with its Linears adapted.
    The base is changed in place and frozen.

    Raises:
        TunerError: a target module matches nothing, top_k exceeds the experts, the tap is no layer of the base.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        experts: Sequence[str],
        *,
        expert_config: ExpertConfig | None = None,
        routing: RoutingConfig | None = None,
        peft_configs: Sequence[LoraConfig] | None = None,
    ) -> None:
        super().__init__()
        self.routing_config = routing = routing or RoutingConfig()
        if not experts:
            raise TunerError("a mixture needs at least one expert, got none. Give at least one name.")
        if routing.top_k > len(experts):
            raise TunerError(
                f"top_k must be between 1 and the number of experts {len(experts)}, got {routing.top_k}. "
                "Lower top_k or raise num_experts."
            )
        layers_path, layers = decoder_layers(base)
        if not routing.tap_layer < len(layers):
            raise TunerError(
                f"tap_layer must be below the {len(layers)} layers of {base.name_or_path}, got {routing.tap_layer}."
            )
        self.state = RoutingState()
        self._experts: dict[str, Expert] = {}
        base.requires_grad_(False)
        self._layers_path, self._tap_start = layers_path, routing.tap_layer
        tap, wanted = routing.tap_layer, expert_config or ExpertConfig()
        configs = peft_configs or [lora_config(base, wanted, tap) for _ in experts]
        self.peft_model: PeftModelForCausalLM
        for name, config in zip(experts, configs, strict=True):
            check_name(base, name, self._experts)
            self._inject(base, name, config)
        self.tap = Tap(self.lm.get_decoder(), layers, {}, routing, self.state, self._maturity)
        self._build_routers()
        self._connect()

    @property
    def lm(self) -> PreTrainedModel:
        """The base's causal language model, with adapted Linears."""
        return cast(PreTrainedModel, self.peft_model.get_base_model())

    @property
    def config(self) -> Any:
        """transformers' config of the base."""
        return self.lm.config

    @property
    def device(self) -> torch.device:
        """Where the base lives."""
        return self.lm.device

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The experts, in the order in which the router numbers them."""
        return tuple(self._experts.values())

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names in the router's order."""
        return tuple(self._experts)

    @property
    def decisions(self) -> dict[int | None, Decision]:
        """Decisions of the last pass: key None for the shared router, else the layer's index."""
        return self.state.decisions

    @property
    def dtype(self) -> torch.dtype:
        """Of the base."""
        return self.lm.dtype

    @property
    def generation_config(self) -> Any:
        """transformers' defaults for `generate`, of the base."""
        return self.lm.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.lm.generation_config = config

    def can_generate(self) -> bool:
        """What transformers' pipelines ask first."""
        return self.lm.can_generate()

    def routed_linears(self) -> Iterator[tuple[str, RoutedLinear]]:
        """All adapted Linears with their names in `lm`."""
        for name, module in self.lm.named_modules():
            if isinstance(module, RoutedLinear):
                yield name, module

    def follow_moved_weights(self) -> None:
        """Let all experts, which must all train, lie where an engine has put what an optimizer sees of them."""
        for _, linear in self.routed_linears():
            linear.follow_moved_weights()

    def forward(
        self,
        *,
        labels: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        hidden_only: bool = False,
        **inputs: Any,
    ) -> Any:
        """Run the base with its experts, head and all.

        Args:
            labels: (batch, tokens), -100 where not trained; they also tell where each prompt ends.
            prompt_mask: (batch, tokens) bool, the prompts, when there are no labels. Without either, sequence
                granularity routes each document by its first `prefix_tokens` tokens.
            token_mask: (batch, tokens) bool, False at padding, where that cannot be told by an attention mask: rows
                of several documents, their position_ids restarting, have none.
            hidden_only: Return the last hidden states, (batch, tokens, features), and make no logits.
            inputs: What the base takes: input_ids, attention_mask, position_ids, ...
        """
        if inputs.get("position_ids") is not None and inputs.get("attention_mask") is None:
            # transformers sees the borders of packed documents only without a cache.
            inputs.setdefault("use_cache", False)
        with self._reading(labels, prompt_mask, token_mask, inputs):
            if hidden_only:
                return self.lm.get_decoder()(**{**inputs, "use_cache": False}).last_hidden_state
            return self.lm(labels=labels, **inputs)

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, each row with its own experts; the input is the prompt that decides."""
        chunk = kwargs.get("prefill_chunk_size") or getattr(kwargs.get("generation_config"), "prefill_chunk_size", None)
        if chunk and self.routing_config.granularity == "sequence":
            raise TunerError(
                "sequence granularity decides from the whole prompt at once; leave prefill_chunk_size out."
            )
        with self.tap.generating():
            return cast(Any, self.lm).generate(*args, **kwargs)

    def join_decisions(self, cache: Any, parts: Sequence[tuple[Any, Sequence[int]]]) -> None:
        """Say of which documents a cache holds the tokens, when it was put together from others.

        Args:
            cache: Filled with rows of other caches.
            parts: A cache that this model filled, and the rows that were taken from it; in the order of the rows.
        """
        self.tap.join(cache, parts)

    def auxiliary_losses(self, window: LoadWindow | BatchLoad) -> AuxiliaryLosses:
        """Balance and z-loss of the last pass, whose load is added to the window of the optimizer step."""
        return auxiliary_losses(self.decisions, window, self.device)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute activations in backward, above the tap only; the decisions are remembered, not made again.

        Args:
            activation_checkpointing_kwargs: Of `torch.utils.checkpoint.checkpoint`.
            **kwargs: Of the method of this name of transformers' models, such as `offload`.

        Raises:
            TunerError: Checkpointing would be reentrant, or the installed transformers cannot offload.
        """
        given = dict(activation_checkpointing_kwargs or {})
        if given.pop("use_reentrant", False):
            raise TunerError("gradient checkpointing must be non-reentrant, got use_reentrant=True. Leave it out.")

        def contexts() -> tuple[Any, Any]:
            return nullcontext(), self.state.replay()

        given |= {"use_reentrant": False, "context_fn": contexts}
        if hasattr(self.lm, "activation_checkpointing_enable"):
            self.lm.activation_checkpointing_enable(activation_checkpointing_kwargs=given, **kwargs)
        else:  # transformers before 5.23
            if kwargs.pop("offload", False) or given.pop("offload", False):
                raise TunerError("activation_offload needs transformers 5.23 or later. Update it, or leave this out.")
            self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=given, **kwargs)
        # Only reentrant checkpointing needs inputs that require gradients; here they would keep the layers below
        # the tap in the graph.
        self.lm.disable_input_require_grads()
        for layer in decoder_layers(self.lm)[1][: self.routing_config.tap_layer]:
            layer.gradient_checkpointing = False  # type: ignore[assignment]

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """The name that transformers' Trainer calls before 5.23."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    @torch.no_grad()
    def calibrate(self, batches: Sequence[dict[str, Tensor]]) -> None:
        """Give every router the mean, the deviation and the clusters of its features on a sample, before training.

        Args:
            batches: inputs of the model, without domain; a few thousand tokens, or a hundred documents, are enough.

        Raises:
            TunerError: the router is made of prototypes, which have nothing to calibrate.
        """
        if self.routing_config.router == "prototype":
            raise TunerError("only a linear router is calibrated; give a prototype router its skills: set_prototypes.")
        features = self.router_features(batches)
        for key, router in self._routers().items():
            assert isinstance(router, LinearRouter)
            router.calibrate(features[key])
            router.seed_from(features[key])

    @torch.no_grad()
    def router_features(self, batches: Sequence[dict[str, Tensor]]) -> dict[int | None, Tensor]:
        """What each router reads on these batches, (units, features), float32, padding left out."""
        found: dict[int | None, list[Tensor]] = {key: [] for key in self._routers()}

        was_training = self.training
        self.eval()
        self.tap.on_features = lambda key, features: found[key].append(features)
        try:
            for batch in batches:
                self(hidden_only=True, **batch)
        finally:
            self.tap.on_features = None
            self.train(was_training)
        return {key: torch.cat(parts) for key, parts in found.items()}

    @torch.no_grad()
    def prompt_features(self, batches: Iterable[dict[str, Tensor]]) -> Tensor:
        """Mean hidden state at the tap over each row's prompt, (rows, features), float32, on the CPU.

        A function of the frozen base alone, whatever the experts. Only the layers below the tap run, on the prompts.

        Args:
            batches: input_ids, attention_mask and labels, (batch, tokens), one document a row.

        Raises:
            TunerError: a row has no token before its first label.
        """
        layer = decoder_layers(self.lm)[1][self.routing_config.tap_layer]
        was_training = self.training
        self.eval()
        try:
            with self.disabled():
                parts = [mean_prompts(self.lm.get_decoder(), layer, batch) for batch in batches]
        finally:
            self.train(was_training)
        return torch.cat(parts)

    def add_expert(
        self,
        name: str,
        config: ExpertConfig | None = None,
        *,
        peft_config: LoraConfig | None = None,
        maturity: float = 0.0,
    ) -> None:
        """Add an untrained expert (its B is zero); those that exist keep weights, gradients and outputs."""
        check_name(self.lm, name, self._experts)
        if peft_config is None:
            peft_config = copy(self._first_config) if config is None else lora_config(self.lm, config, self._tap_start)
        self._inject(self.lm, name, peft_config)
        self._experts[name] = replace(self._experts[name], maturity=maturity)
        if not self.routers:
            self._build_routers()
        else:
            for router in self._routers().values():
                router.resize(list(range(len(self._experts) - 1)), added=1)
        self._connect()
        self.train(self.training)  # new modules are born in training mode

    def remove_expert(self, name: str) -> None:
        """Forget an expert; the router keeps its rows for the others."""
        self._require(name)
        if len(self._experts) == 1:
            raise TunerError(f"a mixture needs at least one expert, and {name!r} is the last. Add another first.")
        if len(self._experts) - 1 < self.routing_config.top_k:
            raise TunerError(
                f"top_k={self.routing_config.top_k} needs as many experts, removing {name!r} leaves "
                f"{len(self._experts) - 1}. Lower top_k first."
            )
        keep = [index for index, other in enumerate(self._experts) if other != name]
        self._make_active(self.expert_names[keep[0]])  # PEFT warns of an active one that is deleted
        self.peft_model.delete_adapter(name)
        del self._experts[name]
        for router in self._routers().values():
            router.resize(keep, added=0)
        if len(self._experts) == 1:
            self._build_routers()
        self._connect()

    def rename_expert(self, old: str, new: str) -> None:
        """Give an expert another name, on disk and in the API."""
        self._require(old)
        check_name(self.lm, new, self._experts)
        for _, linear in self.routed_linears():
            for attribute in (*linear.adapter_layer_names, *linear.other_param_names):
                table = getattr(linear, attribute)
                if old in table:
                    table[new] = table.pop(old)
        self.peft_model.peft_config[new] = self.peft_model.peft_config.pop(old)
        self._make_active(new)
        renamed = {new if name == old else name: expert for name, expert in self._experts.items()}
        self._experts = {name: replace(expert, name=name) for name, expert in renamed.items()}
        self._connect()

    def freeze_expert(self, name: str, *, frozen: bool = True) -> None:
        """Stop (or resume) training an expert; its bytes do not change while frozen."""
        self._experts[name] = replace(self._require(name), frozen=frozen)
        self._connect()

    def set_maturity(self, name: str, maturity: float) -> None:
        """0 new to 1 trained. Below 1 for any expert, the mixture works by dense collaboration."""
        if not 0 <= maturity <= 1:
            raise TunerError(f"maturity must be between 0 and 1, got {maturity} for expert {name!r}.")
        self._experts[name] = replace(self._require(name), maturity=maturity)

    def set_prototypes(
        self, projection: ArrayLike, centres: ArrayLike, radii: ArrayLike, expert_of_skill: Sequence[str]
    ) -> None:
        """Route by these skills from now on, in the place of those before. One expert alone serves all, unrouted.

        Args:
            projection: (features, dimensions), from features at the tap, of unit root mean square, to where the skills
                differ.
            centres: (skills, dimensions), the skills there.
            radii: (skills,), the distance from its centre up to which a prompt is surely of the skill.
            expert_of_skill: The name of the expert that serves each skill. An expert may serve several, or none.

        Raises:
            TunerError: the router is not of prototypes, there is no such expert, or the arrays do not fit.
        """
        if self.routing_config.router != "prototype":
            raise TunerError(
                f"set_prototypes needs router prototype, got {self.routing_config.router}. Make the model with it."
            )
        numbers = [self.expert_names.index(self._require(name).name) for name in expert_of_skill]
        arrays = (projection, centres, radii)
        space, places, reach = (torch.as_tensor(np.asarray(array), dtype=torch.float32) for array in arrays)
        for router in self._routers().values():
            assert isinstance(router, PrototypeRouter)
            router.set_skills(projection=space, centres=places, radii=reach, expert_of_skill=numbers)

    def teach_routers(self, features: ArrayLike, experts: Sequence[str]) -> None:
        """Fit the shared linear router to features whose expert is known. One expert alone serves all, unrouted.

        Args:
            features: (units, features), as `prompt_features` reads them.
            experts: The name of the expert of each.

        Raises:
            TunerError: the router is not a shared linear one of sequence granularity, or there is no such expert.
        """
        routing = self.routing_config
        if (routing.router, routing.router_scope, routing.granularity) != ("linear", "shared", "sequence"):
            raise TunerError(
                "teach_routers needs a shared linear router of sequence granularity, got "
                f"{routing.router}, {routing.router_scope}, {routing.granularity}."
            )
        numbers = torch.tensor([self.expert_names.index(self._require(name).name) for name in experts])
        for router in self._routers().values():
            assert isinstance(router, LinearRouter)
            router.fit(torch.as_tensor(np.asarray(features), dtype=torch.float32), numbers)

    @contextmanager
    def _reading(
        self, labels: Tensor | None, prompt: Tensor | None, real: Tensor | None, inputs: dict[str, Any]
    ) -> Iterator[None]:
        if prompt is None and labels is not None and self.routing_config.granularity == "sequence":
            document = find_documents(
                (labels.shape[0], labels.shape[1]),
                inputs.get("position_ids"),
                inputs.get("attention_mask"),
                labels.device,
            )
            prompt = prompt_of_labels(labels, document)
        with self.tap.reading(prompt, real):
            yield

    def _make_active(self, name: str) -> None:
        self.peft_model.active_adapter = name
        cast(LoraModel, self.peft_model.base_model).set_adapter(name)

    def _maturity(self) -> float:
        """Of the least mature expert."""
        return min(expert.maturity for expert in self._experts.values())

    def _require(self, name: str) -> Expert:
        self.index_of(name)
        return self._experts[name]

    @property
    def _first_config(self) -> LoraConfig:
        config = self.peft_model.peft_config[self.expert_names[0]]
        assert isinstance(config, LoraConfig)
        return config

    def _inject(self, base: PreTrainedModel, name: str, config: LoraConfig) -> None:
        check_reach(base, config, self._tap_start)
        config._register_custom_module({nn.Linear: RoutedLinear})
        config.inference_mode = False
        if not self._experts:
            self.peft_model = PeftModelForCausalLM(base, config, adapter_name=name)
        else:
            self.peft_model.add_adapter(name, config)
        self._experts[name] = Expert(name=name)

    def _routers(self) -> dict[int | None, Router]:
        return {None if key == "shared" else int(key): router for key, router in self.routers.items()}  # type: ignore[misc]

    @property
    def _execution(self) -> Execution:
        """Of the adapted Linears.

        A prototype router promises an old expert's answers bit for bit while other rows of the batch go elsewhere.
        Grouped products round otherwise for groups of another size, in 1 to 5 of 20 draws; those of a row never.
        """
        wanted, by_rows = self.routing_config.execution, self.routing_config.router == "prototype"
        return "rowwise" if wanted == "auto" and by_rows else wanted

    def _build_routers(self) -> None:
        """Routers for two experts or more, freshly drawn, and the hooks that feed them."""
        self.routers = nn.ModuleDict()
        layers = decoder_layers(self.lm)[1]
        if len(self._experts) > 1:
            width = int(self.config.get_text_config().hidden_size)
            shared = self.routing_config.router_scope == "shared"
            router_class = PrototypeRouter if self.routing_config.router == "prototype" else LinearRouter
            keys = ["shared"] if shared else [str(index) for index in range(self._tap_start, len(layers))]
            for key in keys:
                self.routers[key] = router_class(width, len(self._experts)).to(self.device)
        self.tap.remove()
        decoder = self.lm.get_decoder()
        self.tap = Tap(decoder, layers, self._routers(), self.routing_config, self.state, self._maturity)

    def _connect(self) -> None:
        """Tell every adapted Linear the experts' order, and set what is trainable."""
        for name, linear in self.routed_linears():
            index = layer_index(self._layers_path, name)
            assert index is not None  # check_reach saw to it
            linear.connect(
                self.state,
                index,
                names=self.expert_names,
                frozen=frozenset(expert.name for expert in self.experts if expert.frozen),
                execution=self._execution,
            )
