"""Libraries that may be missing, too old, or broken."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.torch_version import TorchVersion

# One library is imported at a time: xFormers hides another from all threads while it is imported, and who looked for
# that one meanwhile would keep for ever that it is not installed. A thread that waits here holds no lock that an import
# of these libraries asks for; the same thread may come again.
IMPORTING = threading.RLock()


@dataclass(frozen=True)
class Library:
    """An optional library.

    Attributes:
        name: what its reasons call it.
        module: what is imported of it.
        install: how to get it.
        packages: the packages that bring the module, as their versions are looked up.
        oldest: the first version that serves.
        load: imports the module, where that takes more than an import.
    """

    name: str
    module: str
    install: str
    packages: tuple[str, ...]
    oldest: str | None = None
    load: Callable[[str], Any] = importlib.import_module

    def version(self) -> str | None:
        """The version that is installed."""
        for package in self.packages:
            try:
                return importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None

    @functools.cache  # noqa: B019  (there are four of them, as long as the process)
    def why_not(self) -> str | None:
        """Why the library cannot be used here; None if it can."""
        found = self.version()
        try:
            with IMPORTING:
                self.load(self.module)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{self.module}.".startswith(f"{error.name}."):
                return f"needs {self.name} ({self.install}), which is not installed"
            return f"{self.name} {found or ''} is installed but needs {error.name}, which is not".replace("  ", " ")
        except Exception as error:  # a broken install can raise anything; its own words are the explanation
            said = " ".join(f"{type(error).__name__}: {error}".split())
            reason = f"{self.name} {found or ''} is installed but cannot be imported: {said}".replace("  ", " ")
            if found is not None:  # the automatic choice passes over it, which costs speed
                warnings.warn(f"attn_n: {reason}", RuntimeWarning, stacklevel=2)
            return reason
        if self.oldest is not None and found is not None and TorchVersion(found) < self.oldest:
            return f"needs {self.name} {self.oldest} or later, found {found}"
        return None
