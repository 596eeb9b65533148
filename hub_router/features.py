"""What the catalog knows of a pool of adapters, handed to the engine so that it is not computed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hub_router.gaussian import Gaussian
from hub_router.records import Spectrum

# Trained vectors by adapter, then by module, float32 ``(D,)``, of most methods ``(D_in,)``.
Vectors = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True, eq=False)
class ModuleFeatures:
    """Features of one module, by the adapters' names in the pool.

    Args:
        spectra (Mapping[str, Spectrum]): by adapter.
        prototypes (Mapping[str, Mapping[str, np.ndarray]]): trained vectors ``(D,)`` by set, then by adapter.
        width (int): length of what a method reads in the place of the module's input; 0 where it reads the input.
    """

    spectra: Mapping[str, Spectrum] = field(default_factory=dict)
    prototypes: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    width: int = 0


@dataclass(frozen=True, eq=False)
class PoolFeatures:
    """Features by the adapters' names in the pool; any may be missing, and others may be there.

    Args:
        spectra (Mapping[str, Mapping[str, Spectrum]]): by adapter, then by module.
        gaussians (Mapping[str, Gaussian]): of the embedded sample inputs, by adapter.
        encoder (str | None): the sentence encoder whose vectors the Gaussians are of.
        prototypes (Mapping[str, Vectors]): trained vectors by the name of their set.
        widths (Mapping[str, int]): by module, length of what a method reads in the place of its input.
    """

    spectra: Mapping[str, Mapping[str, Spectrum]] = field(default_factory=dict)
    gaussians: Mapping[str, Gaussian] = field(default_factory=dict)
    encoder: str | None = None
    prototypes: Mapping[str, Vectors] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)

    def of_module(self, module: str, adapters: Sequence[str]) -> ModuleFeatures:
        """What is known of one module.

        Args:
            module (str): its path.
            adapters (Sequence[str]): names of the pool.

        Returns:
            ModuleFeatures: of these adapters.
        """

        def here(known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
            return {each: known[each][module] for each in adapters if module in known.get(each, {})}

        prototypes = {name: here(vectors) for name, vectors in self.prototypes.items()}
        return ModuleFeatures(here(self.spectra), prototypes, self.widths.get(module, 0))
