"""Settings of a training run: which there are for a method, whose they are, and what was given sorted by that."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from hub_router.errors import TrainingError

if TYPE_CHECKING:
    from hub_router.training.settings import TrainingSettings

# What trains an adapter of PEFT, not gates; and several of them, each on the examples of its name.
ADAPTER_KINDS = ("shared", "ewora")
EXPERTS = "experts"
# How many experts mixlora makes.
NUMBER = 8
# Methods whose adapters can be trained along with their gates.
JOINT_METHODS = ("lora-mixer", "mixlora")
_ARGUMENT = re.compile(r"^    (\w+) \(.*?\): (.+)$")
_FURTHER = " " * 8
# Of a config of PEFT: what only says what the config is, or is set by who loads it.
_PRIVATE = {"peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "peft_version", "revision"}


@dataclass(frozen=True)
class SettingInfo:
    """One setting of a run, for ``hub-router train METHOD --settings``.

    Args:
        name (str): keyword of ``train``.
        default (Any): the paper's; None where there is none.
        of (str): ``loop``, ``training`` (of the method) or ``method`` (its hyperparameters), or PEFT's config.
        help (str): what it is for.
    """

    name: str
    default: Any
    of: str
    help: str


@dataclass(frozen=True)
class Options:
    """What was given for a run.

    Args:
        settings (Mapping[str, Any]): of the loop.
        recipe (Mapping[str, Any]): of the method's training.
        method (Mapping[str, Any]): hyperparameters of the method.
    """

    settings: Mapping[str, Any]
    recipe: Mapping[str, Any]
    method: Mapping[str, Any]


def sorted_out(method: str, options: Mapping[str, Any]) -> Options:
    """Options of a run by whose they are.

    Args:
        method (str): that is trained.
        options (Mapping[str, Any]): by name.

    Returns:
        Options: all of them.

    Raises:
        TrainingError: a method that is not trained, or settings that there are not for it; names all.
    """
    from hub_router.routing.registry import describe
    from hub_router.training.registry import recipe_options
    from hub_router.training.settings import TrainingSettings

    own = recipe_options(method, options.get("balance"))
    loop = _loop_settings(method)
    valid = {
        "training": loop,
        f"training {method}": own,
        f"method {method}": tuple(each.name for each in describe(method).hyperparameters),
    }
    strangers = [key for key in options if not any(key in names for names in valid.values())]
    idle = [key for key in strangers if key in {each.name for each in fields(TrainingSettings)}]
    if strangers:
        unknown = [key for key in strangers if key not in idle]
        faults = [f"{method} searches without gradients, so {', '.join(idle)} would do nothing"] if idle else []
        faults += [f"there are no settings {', '.join(unknown)}"] if unknown else []
        lines = "\n".join(f"  {what}: {', '.join(names)}" for what, names in valid.items() if names)
        raise TrainingError(
            f"{'; '.join(faults)}; there are, of\n{lines}\ndefaults: hub-router train {method} --settings"
        )
    parts = ({key: value for key, value in options.items() if key in names} for names in valid.values())
    return Options(*parts)


def with_given(paper: TrainingSettings, given: Mapping[str, Any]) -> TrainingSettings:
    """The paper's settings with those that were given.

    Args:
        paper (TrainingSettings): of the method.
        given (Mapping[str, Any]): by name; epochs that are asked for stand in the place of the paper's steps.

    Returns:
        TrainingSettings: checked.

    Raises:
        TrainingError: invalid values.
    """
    return replace(paper, **({"steps": None, **given} if "epochs" in given else given))


def adapter_options(kind: str, options: Mapping[str, Any]) -> tuple[TrainingSettings, Any]:
    """What an adapter of PEFT is trained with, and its config, on all linear maps unless said otherwise.

    Args:
        kind (str): one of ``ADAPTER_KINDS``.
        options (Mapping[str, Any]): settings of the loop and of PEFT's config.

    Returns:
        tuple[TrainingSettings, PeftConfig]: both checked.

    Raises:
        TrainingError: settings that there are not, or invalid values.
    """
    from hub_router.training.peft_adapter import SETTINGS
    from hub_router.training.settings import TrainingSettings

    loop = {each.name for each in fields(TrainingSettings)}
    settings = with_given(SETTINGS, {key: value for key, value in options.items() if key in loop})
    return settings, adapter_config(kind, {key: value for key, value in options.items() if key not in loop})


def adapter_config(kind: str, own: Mapping[str, Any]) -> Any:
    """PEFT's config of an adapter that is trained, on all linear maps unless said otherwise.

    Args:
        kind (str): one of ``ADAPTER_KINDS``, or ``experts``.
        own (Mapping[str, Any]): settings of the config.

    Returns:
        PeftConfig: checked.

    Raises:
        TrainingError: another kind, settings that there are not, or invalid values.
    """
    make = _config_class(kind)
    if strangers := [name for name in own if name not in {each.name for each in fields(make)}]:
        raise TrainingError(
            f"there are no settings {', '.join(strangers)} of {kind}; all there are: hub-router train {kind} --settings"
        )
    if "peft_type" in own or not isinstance(own.get("r", 8), int):
        raise TrainingError(f"training {kind} takes an integer r, and no peft_type; got {own}")
    try:
        return make(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **own})
    except (TypeError, ValueError) as error:
        raise TrainingError(f"{make.__name__} cannot be made of {own}: {error}") from error


def training_settings(method: str, *, adapters: bool = False) -> list[SettingInfo]:
    """Every setting of a method's training, with the default that it has there.

    Args:
        method (str): that is trained, one of ``ADAPTER_KINDS``, or ``experts``.
        adapters (bool): whether the method's adapters are trained along with its gates.

    Returns:
        list[SettingInfo]: of the loop, of the method's training, of the method.

    Raises:
        TrainingError: a method that is not trained.
    """
    from hub_router.training.peft_adapter import SETTINGS
    from hub_router.training.registry import RECIPES

    if method in (*ADAPTER_KINDS, EXPERTS):
        from hub_router.training.experts import SETTINGS as OF_EXPERTS

        make = _config_class(method)
        own = [each for each in _of_class(make, make.__name__) if each.name not in _PRIVATE]
        set_here = {"target_modules": "all-linear"}
        return [
            *_of_loop(OF_EXPERTS if method == EXPERTS else SETTINGS, _loop_settings(method)),
            *(replace(each, default=set_here.get(each.name, each.default)) for each in own),
        ]
    loop = _loop_settings(method)  # first, for it refuses a method that is not trained
    found = [*_of_loop(RECIPES[method].settings, loop), *_of_recipe(method), *_of_method(method)]
    if not adapters or method not in JOINT_METHODS:
        return found
    own = _of_class(_config_class(EXPERTS), "LoraConfig")
    return [
        *(each for each in found if each.name != "prototypes"),
        *_of_joint(method),
        *(each for each in own if each.name not in _PRIVATE),
    ]


def _of_joint(method: str) -> list[SettingInfo]:
    """Settings of adapters that are trained along with their gates."""
    from hub_router.training.experts import PRESERVE

    kept = "weight of the squared distance of the adapters from their start"
    found = [SettingInfo("preserve", PRESERVE if method == "lora-mixer" else 0.0, "training", kept)]
    if method == "mixlora":
        found.append(SettingInfo("experts", NUMBER, "training", "number of new adapters, where none are named"))
    return found


def _loop_settings(method: str) -> tuple[str, ...]:
    """The loop's settings that mean something to a method."""
    from hub_router.training.recipe import SearchRecipe
    from hub_router.training.registry import create_recipe
    from hub_router.training.search import SEARCH_SETTINGS
    from hub_router.training.settings import TrainingSettings

    searches = method not in (*ADAPTER_KINDS, EXPERTS) and isinstance(create_recipe(method), SearchRecipe)
    return SEARCH_SETTINGS if searches else tuple(each.name for each in fields(TrainingSettings))


def _of_loop(paper: TrainingSettings, names: Sequence[str]) -> list[SettingInfo]:
    told = _arguments(type(paper))
    return [SettingInfo(name, getattr(paper, name), "loop", told.get(name, "")) for name in names]


def _of_recipe(method: str) -> list[SettingInfo]:
    from hub_router.training.balance import BALANCE_LOSSES
    from hub_router.training.registry import RECIPES, create_recipe, recipe_options

    recipe: Any = create_recipe(method)
    loss = getattr(recipe, "loss", None)
    told = {**_arguments(RECIPES[method]), **(_arguments(type(loss)) if loss else {})}
    told["balance"] = f"loss on how tokens are spread: none or one of {', '.join(BALANCE_LOSSES)}"
    values = {"balance": loss.name if loss else "none"}
    return [
        SettingInfo(
            name, values.get(name, getattr(loss, name, getattr(recipe, name, None))), "training", told.get(name, "")
        )
        for name in recipe_options(method)
    ]


def _of_method(method: str) -> list[SettingInfo]:
    from hub_router.routing.registry import describe

    return [
        SettingInfo(each.name, each.default, "method", f"{each.help}; {each.valid}")
        for each in describe(method).hyperparameters
    ]


def _of_class(kind: Any, of: str) -> list[SettingInfo]:
    """Fields of a config of PEFT; those that it has no value for by itself are None."""
    return [
        SettingInfo(
            each.name,
            each.default if each.default is not MISSING else None,
            of,
            " ".join(str(each.metadata.get("help", "")).split()),
        )
        for each in fields(kind)
    ]


def _config_class(kind: str) -> Any:
    import peft

    from hub_router.ewora import EworaConfig

    classes = {"shared": peft.LoraConfig, "ewora": EworaConfig, EXPERTS: peft.LoraConfig}
    if kind not in classes:
        known = (*ADAPTER_KINDS, EXPERTS, *JOINT_METHODS)
        raise TrainingError(f"{kind!r} is no kind of adapter that is trained; kinds: {', '.join(known)}")
    return classes[kind]


def _arguments(kind: Any) -> dict[str, str]:
    """What a class says of its arguments."""
    found: dict[str, str] = {}
    name = None
    for line in (inspect.getdoc(kind) or "").splitlines():
        argument = _ARGUMENT.match(line)
        if argument:
            name = argument[1]
            found[name] = argument[2].replace("``", "")
        elif name is not None and line.startswith(_FURTHER):
            found[name] += f" {line.strip()}".replace("``", "")
        else:
            name = None
    return found
