"""What the catalog knows of a pool of adapters, handed to the engine so that it is not computed again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hub_router.gaussian import Gaussian
from hub_router.records import Spectrum


@dataclass(frozen=True, eq=False)
class PoolFeatures:
    """Features by the adapters' names in the pool; any may be missing, and others may be there.

    Args:
        spectra (Mapping[str, Mapping[str, Spectrum]]): by adapter, then by module.
        gaussians (Mapping[str, Gaussian]): of the embedded sample inputs, by adapter.
        encoder (str | None): the sentence encoder whose vectors the Gaussians are of.
    """

    spectra: Mapping[str, Mapping[str, Spectrum]] = field(default_factory=dict)
    gaussians: Mapping[str, Gaussian] = field(default_factory=dict)
    encoder: str | None = None
