"""Makes EWoRA known to PEFT."""

from __future__ import annotations

import peft
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from hub_router.errors import MethodError
from hub_router.ewora.config import TYPE_NAME, EworaConfig
from hub_router.ewora.model import PREFIX, EworaModel


def register() -> None:
    """Register the type with PEFT, so that its functions make, save and load EWoRA adapters; again does nothing.

    Raises:
        MethodError: something else is registered under this name.
    """
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(TYPE_NAME)
    if known is EworaModel:
        return
    if known is not None or TYPE_NAME in peft.PeftType.__members__:
        owner = f"{known.__module__}.{known.__qualname__}" if known else "no model"
        raise MethodError(
            f"PEFT {peft.__version__} has a type {TYPE_NAME} already ({owner}), expected none; use that one without "
            "importing hub_router.ewora"
        )
    _add_type(TYPE_NAME)
    register_peft_method(name=TYPE_NAME.lower(), config_cls=EworaConfig, model_cls=EworaModel, prefix=PREFIX)


def _add_type(name: str) -> None:
    """Give ``peft.PeftType`` a member.

    ``register_peft_method`` takes only names of this enum, and PEFT looks its types up by member and by string alike.
    An enum with members cannot be subclassed, and a second enum would not replace the one that PEFT's modules hold, so
    the member is added where :mod:`enum` itself keeps members: as an attribute, by name, by value, and in their order.
    From then on it is like any other: iteration, ``PeftType("EWORA")``, ``PeftType.EWORA``, pickle and copy know it.
    """
    member = str.__new__(peft.PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = peft.PeftType
    member._sort_order_ = len(peft.PeftType._member_names_)
    # The attribute first: once a name is among the members, the enum forbids assigning it.
    setattr(peft.PeftType, name, member)
    peft.PeftType._member_map_[name] = member
    peft.PeftType._value2member_map_[name] = member
    peft.PeftType._member_names_.append(name)
