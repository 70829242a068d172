"""The objectives by their names in a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pentad.datasets.examples import DOCUMENTS, PAIRS, REPLIES, UNPAIRED
from pentad.datasets.store import Examples, Tokens
from pentad.errors import BadInput
from pentad.nn.decoder import Decoder
from pentad.nn.moe.layer import MixtureOfExperts
from pentad.train.objectives.causal import CausalLM
from pentad.train.objectives.kto import KTO, mismatched
from pentad.train.objectives.loss import Objective
from pentad.train.objectives.preference import LOSSES, REFERENCE_FREE, PairObjective
from pentad.train.objectives.references import reference_log_probs
from pentad.train.objectives.reward import RewardObjective
from pentad.train.recipe import IMAGE_OBJECTIVES, Recipe

OBJECTIVES = {**dict.fromkeys(LOSSES, PAIRS), "pretrain": DOCUMENTS, "sft": REPLIES, "kto": UNPAIRED, "reward": PAIRS}
"""Name in a recipe -> the data that it learns from; see `pentad.datasets.examples`."""


def data_for(objective: str | Mapping[str, float]) -> str:
    """The data that an objective, or a mixture of losses of pairs, learns from.

    Raises:
        BadInput: a name is unknown.
    """
    known = OBJECTIVES if isinstance(objective, str) else LOSSES
    for name in [objective] if isinstance(objective, str) else objective:
        if name not in known:
            raise BadInput(f"objective is {name!r}; expected one of {', '.join([*known, *IMAGE_OBJECTIVES])}")
    return OBJECTIVES[objective] if isinstance(objective, str) else PAIRS


def make_objective(
    recipe: Recipe,
    network: Decoder,
    stores: Sequence[Examples],
    dtype: torch.dtype,
    reference_log_probs: Callable[..., list[np.ndarray[Any, Any]]] = reference_log_probs,
) -> Objective:
    """The objective of a recipe; `network` still has the weights of the base model, which is the reference.

    Args:
        recipe: the recipe.
        network: the network.
        stores: the data.
        dtype: dtype of the computation.
        reference_log_probs: computes what the objective knows of the reference.

    Raises:
        BadInput: an option doesn't fit the model, or the data.
    """
    name, options, balance = recipe.objective, recipe.preference, recipe.model.router_aux_loss_coef
    if balance and name not in ("pretrain", "sft"):
        raise BadInput("model.router_aux_loss_coef is for pretrain and sft; expected 0 with this objective")
    if balance and not any(isinstance(part, MixtureOfExperts) for part in network.modules()):
        raise BadInput(f"model.router_aux_loss_coef is {balance}; expected 0, since this model has no router")
    if name in ("pretrain", "sft"):
        return CausalLM(balance)
    if name == "reward":
        return RewardObjective([store.scores for store in stores], options.center_rewards_coefficient)
    if name == "kto":
        length = recipe.run.sequence_length

        def sequences(store: Examples, number: int) -> list[Tokens]:
            return [*store[number], mismatched(store, number, length)]

        references = reference_log_probs(network, stores, dtype, sequences, f" kto {length}")
        weights = options.desirable_weight, options.undesirable_weight
        return KTO(stores, references, length, options.beta or 0.1, *weights)
    weights_of = {name: 1.0} if isinstance(name, str) else name
    needed = stores if weights_of.keys() - REFERENCE_FREE else []
    return PairObjective(weights_of, options, reference_log_probs(network, needed, dtype))
