"""Every exception that hub_router raises on purpose.

A message names what failed and where, what was found, what was expected, and the command or argument that helps.
Code below the command line raises; only ``hub_router.cli`` turns an exception into text and an exit status.
"""

from __future__ import annotations

from collections.abc import Sequence


class HubRouterError(Exception):
    """Base of all errors that a user can act on."""


class SettingsError(HubRouterError):
    """A path, an environment variable or an option has a value that cannot be used."""


class SchemaError(HubRouterError):
    """The database is not at the schema version that this release needs."""


class StoreError(HubRouterError):
    """The catalog database cannot be opened, read or written, or was handed rows that it cannot hold."""


class NameTakenError(HubRouterError):
    """Something is saved under a name that is taken, without the option that replaces it."""


class StaleFeaturesError(HubRouterError):
    """Stored features were computed from adapter weights that have changed since."""


class NotInCatalogError(HubRouterError):
    """An adapter, a composition or a prototype set was asked for by a name that the catalog does not hold."""


class HubError(HubRouterError):
    """The Hub refused, could not be reached, or answered with something unusable."""


class GatedError(HubError):
    """The repository exists, but its files need an accepted licence or a token."""


class MissingError(HubError):
    """The repository, revision or file does not exist, or is private."""


class NoSuchRevisionError(MissingError):
    """The repository exists, but not the branch, tag or commit asked for."""


class UnreachableError(HubError):
    """The Hub did not answer within the retries and timeouts allowed."""


class CorruptFileError(HubError):
    """A downloaded file's hash differs from the one the Hub states."""


class ManifestError(HubRouterError):
    """A collection manifest (TOML) is malformed."""


class SamplesError(HubRouterError):
    """Samples that a user gives cannot be read or kept, or were never given; lists every fault."""


class UnsupportedAdapterError(HubRouterError):
    """A folder holds no adapter that can be used; the message is the one reason.

    Args:
        reason (str): one line, which may leave out all but the first few faults.
        faults (Sequence[str]): every fault, by module, where there are several.
    """

    def __init__(self, reason: str, faults: Sequence[str] = ()) -> None:
        self.faults = tuple(faults)
        super().__init__(reason)


class EncoderUnavailableError(HubRouterError):
    """The sentence encoder is neither cached nor reachable nor installed."""


class MethodError(HubRouterError):
    """A routing method is unknown, or was given a hyperparameter or a pool that it cannot use."""


class IncompatibleAdaptersError(HubRouterError):
    """Adapters do not fit the base model; ``mismatches`` lists every offender.

    Args:
        base (str): name of the base model.
        mismatches (Sequence[str]): one line per offender: adapter, module, got, expected.
    """

    def __init__(self, base: str, mismatches: Sequence[str]) -> None:
        self.base = base
        self.mismatches = tuple(mismatches)
        lines = "\n".join(f"  - {line}" for line in self.mismatches)
        super().__init__(f"{len(self.mismatches)} mismatches between the adapters and base model {base}:\n{lines}")


class ArtifactError(HubRouterError):
    """A saved composition or an exported prototype set is incomplete, was changed, or is none."""


class RoutedStateError(HubRouterError):
    """A model is routed when it must not be, or no longer is when it must be."""


class TrainingError(HubRouterError):
    """Training data, settings or a checkpoint cannot be used; lists every fault."""
