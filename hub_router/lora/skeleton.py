"""A model of nothing but an adapter's modules, on which PEFT sets up an adapter of any type without its base model.

The names of the modules come from the tensors, their widths from the tensors or the base model's architecture. Their
weights are zeros that take no memory.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hub_router.errors import UnsupportedAdapterError
from hub_router.lora.convertible import Convertible
from hub_router.lora.fields import Fields, number, rank, short, wrong
from hub_router.lora.keys import is_printable
from hub_router.lora.patterns import PatternValue, first_values
from hub_router.lora.text import listing

PEFT_PREFIX = "base_model.model."
ADAPTER = "default"
# Elements of one update, of which the conversion holds several dense copies; every layer of a 70B Llama has fewer.
MAX_ELEMENTS = 1 << 28

Shape = tuple[int, ...]
# (D_out, D_in) by module, in the order of the base model.
Widths = Mapping[str, tuple[int, int]]
_Tensors = Mapping[str, torch.Tensor]
# From the shapes of one module's tensors, by role, and of those that all modules share.
_Rule = Callable[[Mapping[str, Shape], Mapping[str, Shape]], tuple[int, int]]

# Fields that size what PEFT allocates before it compares anything with the tensors.
_SIZES = ("r", "hybrid_r", "num_vectors")
# Fields about the base model or about training; None and False are what PEFT takes for "as it is".
_NEUTRAL: Mapping[str, Any] = {
    "task_type": None,
    "base_model_name_or_path": None,
    "revision": None,
    "auto_mapping": None,
    "peft_version": None,
    "modules_to_save": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    # DeLoRA's lambdas are stored.
    "lambda_pattern": {},
    # WaveFT works numbers out from all widths; the tensors have them.
    "proportional_parameters": False,
}


def split(tensors: _Tensors, kind: Convertible) -> tuple[dict[str, dict[str, torch.Tensor]], _Tensors, _Tensors]:
    """Sort the tensors of an adapter.

    Args:
        tensors (Mapping[str, torch.Tensor]): by stored name.
        kind (Convertible): its type.

    Returns:
        tuple: those of each module by role, those that all modules share by role, and all others by stored name.

    Raises:
        UnsupportedAdapterError: none belongs to a module, or names are not those that PEFT writes.
    """
    modules: dict[str, dict[str, torch.Tensor]] = {}
    shared, others, strange = {}, {}, []
    for name, tensor in tensors.items():
        parts = name.split(".")
        at = next((at for at in range(len(parts) - 1, -1, -1) if parts[at].startswith(kind.prefix)), None)
        module, role = ".".join(parts[:at]), ".".join(parts[at:] if at is not None else ())
        if at is None:
            others[name] = tensor
        elif module == "base_model":
            shared[role] = tensor
        elif module.startswith(PEFT_PREFIX) and module != PEFT_PREFIX:
            modules.setdefault(module.removeprefix(PEFT_PREFIX), {})[role] = tensor
        else:
            strange.append(name)
    if strange:
        raise UnsupportedAdapterError(
            f"{len(strange)} tensor names do not start with {PEFT_PREFIX}, such as {strange[0][:200]!r}"
        )
    if not all(is_printable(name) for name in modules):
        raise UnsupportedAdapterError("a module's name is empty, too long or not printable")
    if not modules:
        raise UnsupportedAdapterError(f"no tensor is named {kind.prefix}..., as those of its type are")
    return modules, shared, others


def widths(peft_type: str, modules: Mapping[str, _Tensors], shared: _Tensors, base: Widths | None) -> Widths:
    """The widths of the adapted modules.

    Args:
        peft_type (str): a convertible type.
        modules (Mapping): from :func:`split`.
        shared (Mapping): from :func:`split`.
        base (Widths | None): those of the base model, for types whose tensors do not tell.

    Returns:
        Widths: in the base model's order where it was given, else in that of the tensors.

    Raises:
        UnsupportedAdapterError: the tensors have other shapes than those of their type, or the base model lacks a
            module; names the offenders.
    """
    if base is not None:
        missing = [module for module in modules if module not in base]
        if missing:
            raise UnsupportedAdapterError(f"the base model has no linear modules {listing(missing)}")
        found = {module: pair for module, pair in base.items() if module in modules}
    else:
        common = {role: tuple(tensor.shape) for role, tensor in shared.items()}
        rule = _RULES[peft_type]
        found = {module: _apply(rule, module, tensors, common) for module, tensors in modules.items()}
    for module, (d_out, d_in) in found.items():
        if d_out * d_in > MAX_ELEMENTS:
            raise UnsupportedAdapterError(
                f"{module} is {d_out} x {d_in}, expected at most {MAX_ELEMENTS} elements, for all are formed"
            )
    inner = [name for name in found if _parents(name) & found.keys()]
    if inner:
        raise UnsupportedAdapterError(f"modules inside other adapted modules: {listing(inner)}")
    return found


def build(peft_type: str, fields: Fields, tensors: _Tensors, shapes: Widths) -> dict[str, nn.Module]:
    """Let PEFT set up and load the adapter on a skeleton.

    Args:
        peft_type (str): a convertible type.
        fields (Fields): its ``adapter_config.json``.
        tensors (Mapping[str, torch.Tensor]): the adapter's own, by stored name.
        shapes (Widths): from :func:`widths`.

    Returns:
        dict[str, nn.Module]: PEFT's layer of each module, loaded in float32.

    Raises:
        UnsupportedAdapterError: PEFT refuses the config, or the tensors are not those of the config.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    chosen = _settings(peft_type, fields, tensors, list(shapes))
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[peft_type])}
    wanted = {name: tensor.float() for name, tensor in tensors.items()}
    # The factors that PEFT draws and replaces are no reason to move the caller's random numbers.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            config = PeftConfig.from_peft_type(**{name: value for name, value in chosen.items() if name in known})
            model = get_peft_model(_host(shapes), config, ADAPTER).eval()
            expected = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False).keys()
            if expected != wanted.keys():
                wrong_names = sorted(expected ^ wanted.keys())
                raise UnsupportedAdapterError(
                    f"{len(wrong_names)} tensors are missing or too many for its config: {listing(wrong_names)}"
                )
            set_peft_model_state_dict(model, wanted, ADAPTER)
        except UnsupportedAdapterError:
            raise
        # A stranger's config can make PEFT raise whatever Python knows.
        except Exception as error:
            raise UnsupportedAdapterError(f"PEFT cannot load it: {_line(error)}") from error
    return {module: model.base_model.model.get_submodule(module) for module in shapes}


def _settings(peft_type: str, fields: Fields, tensors: _Tensors, modules: Sequence[str]) -> dict[str, Any]:
    """The config for the skeleton: the adapter's, with exact names in place of patterns and nothing about its base."""
    bias = next((fields[name] for name in ("bias", "lora_bias") if fields.get(name) not in (None, False, "none")), None)
    if bias is not None:
        raise UnsupportedAdapterError(f"unsupported: {peft_type} with trained biases (bias={short(bias)})")
    largest = max(max(tensor.shape) for tensor in tensors.values() if tensor.ndim)
    chosen = {**fields, **{name: value for name, value in _NEUTRAL.items() if name in fields}}
    chosen["peft_type"], chosen["target_modules"] = peft_type, list(modules)
    for field, checked in (("rank_pattern", rank), ("alpha_pattern", number)):
        if fields.get(field):
            chosen[field] = _exact(field, fields[field], checked, modules)
    if peft_type != "LOKR":  # whose r may exceed all widths: then it keeps whole matrices, sized by the widths
        sizes = [(name, fields[name]) for name in _SIZES if fields.get(name)]
        sizes += [("rank_pattern", value) for value in chosen.get("rank_pattern", {}).values()]
        for name, value in sizes:
            if rank(name, value) > largest:
                raise wrong(name, value, f"at most {largest}, the largest width of a tensor")
    own = {"FOURIERFT": "n_frequency", "WAVEFT": "n_frequency", "C3A": "block_size"}.get(peft_type)
    if own:
        chosen[f"{own}_pattern"] = {
            name.removeprefix(PEFT_PREFIX).rpartition(".")[0]: tensor.shape[-1] for name, tensor in tensors.items()
        }
    return chosen


def _exact(
    field: str, patterns: object, checked: Callable[[str, object], float], modules: Sequence[str]
) -> dict[str, float]:
    """Pattern values by module: PEFT would match a stranger's regular expressions for as long as they take."""
    if not isinstance(patterns, dict):
        raise wrong(field, patterns, "an object of module patterns to numbers")
    entries = [PatternValue(text, checked(f"{field}[{short(text)}]", value)) for text, value in patterns.items()]
    values = first_values(entries, modules, field)
    # PEFT lets a name match the end of a longer one; anchored, it matches itself alone.
    return {f"^{module}": value for module, value in values.items()}


def _host(shapes: Widths) -> nn.Module:
    """A tree of ``nn.Linear`` by their full names; each weight is one zero, seen as a matrix."""
    top = nn.Module()
    for name, (d_out, d_in) in shapes.items():
        place = top
        *parents, leaf = name.split(".")
        for part in parents:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        linear = nn.Linear(d_in, d_out, bias=False, device="meta")
        linear.weight = nn.Parameter(torch.zeros(()).expand(d_out, d_in), requires_grad=False)
        place.add_module(leaf, linear)
    return top


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def _apply(rule: _Rule, module: str, tensors: _Tensors, shared: Mapping[str, Shape]) -> tuple[int, int]:
    shapes = {role: tuple(tensor.shape) for role, tensor in tensors.items()}
    conv = [role for role in shapes if role.startswith(("hada_t", "lokr_t"))]
    conv += [role for role, shape in shapes.items() if role.startswith("lokr_w2") and len(shape) > 2]
    if conv:
        raise UnsupportedAdapterError(
            f"unsupported: {module} is a convolution ({conv[0]}), PEFT converts linear modules"
        )
    try:
        return rule(shapes, shared)
    except (KeyError, ValueError, IndexError) as error:
        found = ", ".join(f"{role} {list(shape)}" for role, shape in list(shapes.items())[:6])
        raise UnsupportedAdapterError(
            f"{module}: tensors {found} are not those of its type ({_line(error)})"
        ) from error


def _loha(own: Mapping[str, Shape], _shared: Mapping[str, Shape]) -> tuple[int, int]:
    d_out, _ = own["hada_w1_a"]
    _, d_in = own["hada_w1_b"]
    return d_out, d_in


def _lokr(own: Mapping[str, Shape], _shared: Mapping[str, Shape]) -> tuple[int, int]:
    """The Kronecker product of two matrices, each whole or in two factors."""
    first, second = (
        own[role] if role in own else (own[f"{role}_a"][0], own[f"{role}_b"][1]) for role in ("lokr_w1", "lokr_w2")
    )
    return math.prod((first[0], second[0])), math.prod((first[1], second[1]))


def _c3a(own: Mapping[str, Shape], _shared: Mapping[str, Shape]) -> tuple[int, int]:
    rows, columns, block = own["c3a_kernel"]
    return rows * block, columns * block


def _gralora(own: Mapping[str, Shape], _shared: Mapping[str, Shape]) -> tuple[int, int]:
    parts, d_in, _ = own["gralora_A"]
    _, _, d_out = own["gralora_B"]
    return parts * d_out, parts * d_in


def _vblora(own: Mapping[str, Shape], shared: Mapping[str, Shape]) -> tuple[int, int]:
    """Both factors are tiled with vectors of the bank."""
    _, length = shared["vblora_vector_bank"]
    _, tiles_in, _ = own["vblora_logits_A"]
    tiles_out, _, _ = own["vblora_logits_B"]
    return tiles_out * length, tiles_in * length


def _delora(own: Mapping[str, Shape], _shared: Mapping[str, Shape]) -> tuple[int, int]:
    _, d_in = own["delora_A"]
    d_out, _ = own["delora_B"]
    return d_out, d_in


_RULES: Mapping[str, _Rule] = {
    "LOHA": _loha,
    "LOKR": _lokr,
    "C3A": _c3a,
    "DELORA": _delora,
    "GRALORA": _gralora,
    "VBLORA": _vblora,
}


def _line(error: BaseException) -> str:
    """The message of a foreign error on one line, bounded."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
