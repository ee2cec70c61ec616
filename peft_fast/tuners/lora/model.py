"""`LoraModel`: LoRA layers in a model, and what can be done with several LoRA adapters at once."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from ...utils.other import ModulesToSaveWrapper, _freeze_adapter, walk
from ..tuners_utils import BaseTuner, get_pattern_key
from .bnb import dispatch_quantized
from .init import changes_base, check_init
from .layer import LoraLayer, dispatch_default
from .mixed_model import MixedBatches
from .tensor_parallel import split_like_base
from .weighted import COMBINATION_TYPES, PLAIN_TYPES, Recipe, combine_layer


class LoraModel(MixedBatches, BaseTuner):
    """A base model with LoRA adapters: y = base(x) + scaling * dropout(x) @ A.T @ B.T in every targeted layer.

    Args: as `BaseTuner`.
    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    prefix: str = "lora_"
    tuner_layer_cls = LoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # -------------------------------------------------------------------------------------------------- injection
    def _check_new_adapter_config(self, config: Any) -> None:
        """As `BaseTuner`. Raises: ValueError for an initialisation that takes its values out of the base weights, where
        other adapters use them."""
        super()._check_new_adapter_config(config)
        others = [name for name, other in self.peft_config.items() if other is not config]
        if others and changes_base(getattr(config, "init_lora_weights", True)):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes the base weights, which the adapters "
                f"{', '.join(sorted(others)[:3])} use as well: load it onto a base model of its own, or save it as "
                "plain LoRA (save_pretrained(..., path_initial_model_for_weight_conversion=DIR))"
            )

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if getattr(peft_config, "layer_replication", None):
            raise ValueError("layer_replication is not supported by peft_fast yet; leave it at None")

    def _check_targets(self, peft_config: Any, targets: Sequence[tuple[str, nn.Module]]) -> None:
        """Raises: ValueError for a module whose groups do not divide the rank, or that lacks what the config asks for;
        TypeError for a base weight that the initialisation cannot read.
        """
        for name, module in targets:
            base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
            r, groups = self._rank_and_alpha(peft_config, name)[0], getattr(base, "groups", 1)
            if isinstance(groups, int) and r % groups != 0:
                raise ValueError(
                    f"{name!r}: targeting a {type(base).__name__} with groups={groups} and rank {r}, which is no "
                    "multiple of them. Choose a different rank or do not target this layer."
                )
            if isinstance(base, nn.Embedding) and peft_config.lora_bias:
                raise ValueError(f"{name!r}: lora_bias=True is not supported for Embedding.")
            check_init(base, peft_config.init_lora_weights)

    @staticmethod
    def _rank_and_alpha(config: Any, key: str) -> tuple[int, float]:
        """r and lora_alpha of the module `key`, whose name may match a pattern."""
        ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
        r = ranks.get(get_pattern_key(ranks, key), config.r) if ranks else config.r
        return r, alphas.get(get_pattern_key(alphas, key), config.lora_alpha) if alphas else config.lora_alpha

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if parameter_name is not None:
            raise ValueError("target_parameters is not supported by peft_fast yet; leave it at None")
        r, alpha = self._rank_and_alpha(peft_config, current_key)
        if isinstance(target, LoraLayer):
            target.update_layer(adapter_name, r, alpha, peft_config)
            split_like_base(self.model, target, adapter_name, current_key)
            return
        quantizer = getattr(getattr(self.model, "hf_quantizer", None), "quantization_config", None)
        requantize = getattr(quantizer, "get_apply_tensor_subclass", None)  # torchao's
        layer = self._create_new_module(
            peft_config, adapter_name, target, r=r, lora_alpha=alpha, get_apply_tensor_subclass=requantize
        )
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)
        split_like_base(self.model, layer, adapter_name, current_key)
        self._replace_module(parent, target_name, layer, target)

    @staticmethod
    def _create_new_module(
        lora_config: Any, adapter_name: str, target: nn.Module, get_apply_tensor_subclass: Any = None, **kwargs: Any
    ) -> Any:
        """The layer for a target. Raises: ValueError for a type that LoRA cannot adapt."""
        layer = dispatch_quantized(target, adapter_name, lora_config, get_apply_tensor_subclass, **kwargs)
        if layer is None:
            layer = dispatch_default(target, adapter_name, lora_config, **kwargs)
        if layer is None:
            raise ValueError(
                f"Target module {target} is not supported. Currently, only the following modules are supported: "
                "`torch.nn.Linear`, `torch.nn.Embedding`, `torch.nn.Conv1d`, `torch.nn.Conv2d`, `torch.nn.Conv3d`, "
                "`transformers.pytorch_utils.Conv1D`, and layers that tell in_features and out_features."
            )
        return layer

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if getattr(self.model, "quantization_method", None) == "gptq":
            raise ValueError("Cannot merge LORA layers when the model is gptq quantized")

    def take_scaling(self, adapter_name: str, saved: Any) -> None:
        """Scale an adapter as the configuration says that its new weights were saved with."""
        config = self.peft_config.get(adapter_name)
        if not isinstance(saved, type(config)):
            return
        for field in ("lora_alpha", "use_rslora", "alpha_pattern"):
            setattr(config, field, getattr(saved, field))
        for site in walk(self.model):
            layer = site.module
            if isinstance(layer, LoraLayer) and adapter_name in layer.lora_alpha:
                _, layer.lora_alpha[adapter_name] = self._rank_and_alpha(config, site.name)
                layer.use_rslora[adapter_name] = saved.use_rslora
                layer.set_scale(adapter_name, 1)

    # ---------------------------------------------------------------------------------------- several adapters in one
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add a combination of adapters as a new one, frozen and not active. If its name exists, nothing happens.

        Args:
            adapters, weights: what to combine, and by which factor each; factors may be negative.
            combination_type: one of `weighted.COMBINATION_TYPES`. "cat" and (with enough rank) "svd" are exact;
                "linear", which one adapter alone always takes, is cheap and rough.
            svd_rank: rank of the result of an svd type; the largest of the adapters' if None. "cat" adds the ranks up,
                the others need adapters of one rank.
            svd_clamp: quantile at which the factors of an svd type are clamped.
            svd_full_matrices, svd_driver: as in torch.linalg.svd.
            density: part of the values, 0 to 1, that the pruning types keep.
            majority_sign_method: "total" or "frequency": how ties elects signs, by sums or by counts.
        Raises: ValueError for unknown adapters or types, lengths or ranks that disagree, several adapters that train
            the same module whole, and mixed kinds of target_modules. The model has not changed then.
        """
        if adapter_name in self.peft_config:
            return
        if len(adapters) != len(weights):
            raise ValueError(f"adapters and weights must have one length, got {len(adapters)} and {len(weights)}")
        combination_type, rank, targets = self._check_add_weighted_adapter(adapters, combination_type, svd_rank)
        recipe = Recipe(combination_type, density, majority_sign_method, svd_clamp, svd_full_matrices, svd_driver)
        # scaling 1; a plain start, since initialising from the base weight would change the base once more
        self.peft_config[adapter_name] = replace(
            self.peft_config[adapters[0]],
            r=rank,
            lora_alpha=rank,
            target_modules=targets,
            alpha_pattern={},
            rank_pattern={},
            use_rslora=False,
            init_lora_weights=True,
        )
        self.inject_adapter(self.model, adapter_name)
        try:
            for layer in self.model.modules():
                if isinstance(layer, LoraLayer) and adapter_name in layer.scaling:
                    combine_layer(layer, list(zip(adapters, weights, strict=True)), adapter_name, recipe)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise
        _freeze_adapter(self.model, adapter_name)

    def _check_add_weighted_adapter(
        self, adapters: list[str], combination_type: str, svd_rank: int | None
    ) -> tuple[str, int, Any]:
        """The type, the rank and the target_modules of the combination. Raises: as `add_weighted_adapter`."""
        if not adapters:
            raise ValueError("add_weighted_adapter needs at least one adapter, got none")
        for name in adapters:
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name} does not exist")
        wrappers = [module for module in self.modules() if isinstance(module, ModulesToSaveWrapper)]
        shared = [w for w in wrappers if sum(name in w.modules_to_save for name in adapters) > 1]
        if shared:
            raise ValueError(
                "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
                f"{len(shared)} such instance(s)."
            )
        configs = [self.peft_config[name] for name in adapters]
        kind = "linear" if len(adapters) == 1 else combination_type
        if kind not in COMBINATION_TYPES:
            raise ValueError(f"Invalid combination_type: {kind}")
        ranks = [max(config.r, *(config.rank_pattern or {}).values(), 0) for config in configs]
        if kind in PLAIN_TYPES and len(set(ranks)) > 1:
            raise ValueError(
                "All adapters must have the same r value when using combination_type linear, ties, dare_ties or "
                f"dare_linear. Got {dict(zip(adapters, ranks, strict=True))}."
            )
        rank = sum(ranks) if kind == "cat" else max(ranks)
        rank = svd_rank or rank if kind.endswith("svd") else rank
        targets = [config.target_modules for config in configs]
        if all(isinstance(target, str) for target in targets):
            return kind, rank, "|".join(f"({target})" for target in targets)
        if any(isinstance(target, str) for target in targets):
            raise ValueError(
                "all adapter configs should follow the same target modules type. "
                "Combining adapters with `target_modules` type being a mix of list/set and string is not supported."
            )
        return kind, rank, {name for target in targets for name in target}

    # ----------------------------------------------------------------------------- adapters that changed the base
    def subtract_mutated_init(
        self, output_state_dict: Mapping[str, Tensor], adapter_name: str, kwargs: Any = None
    ) -> dict[str, Tensor]:
        """Turn a trained pissa or olora adapter into plain LoRA for the unchanged base: A B - A0 B0, at twice the rank.

        Args:
            output_state_dict: the trained adapter under its names in a file.
            adapter_name: the adapter with its initial values A0, B0, loaded into this model.
        Returns: A and A0 stacked, B and -B0 side by side; other entries are left out.
        """
        tensors = {}
        for key, value in output_state_dict.items():
            path, _, rest = key.rpartition(".lora_")
            if rest not in ("A.weight", "B.weight"):
                continue
            layer = self.model.get_submodule(path.removeprefix("base_model.model."))
            a, b = (factor.detach().to(value.device, value.dtype) for factor in layer._factors(adapter_name))
            tensors[key] = torch.cat([value, a]) if rest == "A.weight" else torch.cat([value, -b], dim=1)
        return tensors
