"""Every recipe by its method's name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any, cast

from hub_router.errors import TrainingError
from hub_router.training.balance import BALANCE_LOSSES, BalanceLoss
from hub_router.training.lora_mixer import LoraMixerRecipe
from hub_router.training.lorahub import LorahubRecipe
from hub_router.training.maple import MapleRecipe
from hub_router.training.mixlora import MixloraRecipe
from hub_router.training.mole import MoleRecipe
from hub_router.training.phatgoose import PhatgooseRecipe
from hub_router.training.recipe import Recipe
from hub_router.training.settings import TrainingSettings
from hub_router.training.xlora import XloraRecipe

_BALANCE, NONE = "balance", "none"

RECIPES: Mapping[str, type[Recipe]] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            PhatgooseRecipe,
            MapleRecipe,
            LoraMixerRecipe,
            LorahubRecipe,
            MoleRecipe,
            XloraRecipe,
            MixloraRecipe,
        )
    }
)


def create_recipe(name: str, options: Mapping[str, Any] | None = None) -> Recipe:
    """Make a recipe.

    Args:
        name (str): a method that is trained.
        options (Mapping[str, Any] | None): of :func:`recipe_options`.

    Returns:
        Recipe: ready to train.

    Raises:
        TrainingError: unknown method or option, or an invalid value; names the valid ones.
    """
    recipe = _recipe(name)
    given = dict(options or {})
    if strangers := sorted(set(given) - set(recipe_options(name, given.get(_BALANCE)))):
        valid = ", ".join(recipe_options(name, given.get(_BALANCE))) or "none"
        hint = "; settings of the loop go into settings=TrainingSettings(...)" if _are_settings(strangers) else ""
        raise TrainingError(f"method {name!r} is trained without options {', '.join(strangers)}; it has: {valid}{hint}")
    if _has_balance(recipe):
        named = given.pop(_BALANCE, _own_loss(recipe))
        coefficients = {key: given.pop(key) for key in list(given) if key != "loss"}
        wrong = [
            f"{key}={value!r}" for key, value in coefficients.items() if key != "entropy" and not _is_coefficient(value)
        ]
        if wrong:
            raise TrainingError(f"balance loss {named!r} cannot use {', '.join(wrong)}, expected finite numbers from 0")
        given["loss"] = None if named == NONE else replace(_default_loss(recipe, named), **coefficients)
    return recipe(**given)


def recipe_options(name: str, balance: str | None = None) -> tuple[str, ...]:
    """Names of a recipe's options: its fields; for a balance loss ``balance``, its name, and the loss's own fields.

    Args:
        name (str): a method that is trained.
        balance (str | None): the balance loss that is asked for; None for the default one.

    Returns:
        tuple[str, ...]: keywords of ``fit``.

    Raises:
        TrainingError: there is no such recipe or loss.
    """
    recipe = _recipe(name)
    if not _has_balance(recipe):
        return tuple(each.name for each in fields(cast(Any, recipe)))
    if balance == NONE:
        return (_BALANCE,)
    return (_BALANCE, *(each.name for each in fields(cast(Any, _loss(balance or _own_loss(recipe))))))


def _are_settings(names: Sequence[str]) -> bool:
    return any(name in {each.name for each in fields(TrainingSettings)} for name in names)


def _is_coefficient(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _recipe(name: str) -> type[Recipe]:
    recipe = RECIPES.get(name)
    if recipe is None:
        raise TrainingError(f"method {name!r} is not trained; methods that are: {', '.join(RECIPES)}")
    return recipe


def _loss(name: str) -> type[BalanceLoss]:
    loss = BALANCE_LOSSES.get(name)
    if loss is None:
        raise TrainingError(f"balance={name!r}, expected {NONE} or one of {', '.join(BALANCE_LOSSES)}")
    return loss


def _default_loss(recipe: type[Recipe], name: str) -> Any:
    """A balance loss with the recipe's coefficients where it is the recipe's own, else with those of its paper."""
    return cast(Any, recipe)().loss if name == _own_loss(recipe) else _loss(name)()


def _own_loss(recipe: type[Recipe]) -> str:
    """Name of the balance loss that a recipe has by default."""
    return cast(Any, recipe)().loss.name


def _has_balance(recipe: type[Recipe]) -> bool:
    return "loss" in {each.name for each in fields(cast(Any, recipe))}
