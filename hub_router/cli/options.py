"""Options that several commands share, and what a command is handed for them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hub_router.cli.output import Output

if TYPE_CHECKING:
    from hub_router.hub import Hub

Function = TypeVar("Function", bound=Callable[..., Any])


def _usable_device(_ctx: click.Context, _parameter: click.Parameter, device: str | None) -> str | None:
    """The device, once torch has made an empty tensor on it."""
    if device is None:
        return None
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA says so by an assertion
        raise click.BadParameter(f"{device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


home_option = click.option(
    "--home",
    type=click.Path(),
    metavar="DIR",
    help="Folder of the catalog (env HUB_ROUTER_HOME; default ~/.hub_router).",
)
database_url_option = click.option(
    "--database-url",
    metavar="URL",
    help="SQLAlchemy URL of the catalog (env HUB_ROUTER_DATABASE_URL; default SQLite in the home).",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Write one JSON document to stdout.")
limit_option = click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most N.")
encoder_option = click.option(
    "--encoder",
    metavar="NAME",
    help="Sentence encoder: a sentence-transformers model, or 'offline' for the one from the extra 'offline'. "
    "Default: the one the catalog was indexed with, else hkunlp/instructor-base.",
)
device_option = click.option(
    "--device",
    metavar="DEVICE",
    callback=_usable_device,
    help="Torch device, e.g. cuda:1. Default: cuda where there is one, else cpu.",
)


@dataclass(frozen=True)
class Place:
    """Where the catalog lies, as far as the options say.

    Args:
        home (str | None): value of ``--home``.
        database_url (str | None): value of ``--database-url``.
    """

    home: str | None = None
    database_url: str | None = None


@dataclass(frozen=True)
class Call:
    """What a command is handed for the options that every command has.

    Args:
        place (Place): where the catalog lies.
        out (Output): where results go.
    """

    place: Place
    out: Output

    @contextmanager
    def hub(self) -> Iterator[Hub]:
        """The catalog, opened for this command; long work shows its progress on stderr."""
        if not sys.stderr.isatty():
            # huggingface_hub, transformers and datasets read these once, when they are imported.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        from hub_router.cli.progress import TerminalProgress
        from hub_router.hub import Hub

        with Hub(self.place.home, self.place.database_url, progress=TerminalProgress()) as hub:
            yield hub


def common_options(function: Function) -> Function:
    """Add ``--home``, ``--database-url`` and ``--json``; the function gets a :class:`Call` as its first argument.

    Args:
        function (Callable): the command's function, taking the call and its own options.

    Returns:
        Callable: the function for ``click.command``.
    """

    @home_option
    @database_url_option
    @json_option
    @click.pass_context
    @wraps(function)
    def run(ctx: click.Context, *, home: str | None, database_url: str | None, as_json: bool, **own: Any) -> Any:
        outer = ctx.find_object(Place) or Place()
        place = Place(home or outer.home, database_url or outer.database_url)
        return function(Call(place, Output(as_json)), **own)

    return run  # type: ignore[return-value]


def filter_options(function: Function) -> Function:
    """Add the options that narrow down adapters: base model, licence, rank, target, tag.

    Args:
        function (Callable): the command's function, taking them as keyword arguments.

    Returns:
        Callable: the function for ``click.command``.
    """
    for decorate in (
        click.option("--tag", metavar="TAG", help="Only adapters with this tag."),
        click.option("--target", metavar="NAME", help="Only adapters of this target, e.g. q_proj."),
        click.option(
            "--rank", type=click.IntRange(min=1), metavar="R", help="Only adapters in which this rank occurs."
        ),
        click.option("--licence", metavar="ID", help="Only this licence, e.g. mit; 'unknown' is a value."),
        click.option("--base-model", metavar="MODEL", help="Only adapters of this base model."),
    ):
        function = decorate(function)
    return function
