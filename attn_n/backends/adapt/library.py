"""Optional libraries, which may be missing, too old, or broken."""

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

# One library is imported at a time. While xFormers is imported, flash_attn may be hidden from all threads, and a thread
# that looked for it meanwhile would cache that it is not installed. A thread that waits here holds no lock that an
# import of these libraries asks for; the lock is reentrant.
IMPORTING = threading.RLock()


@dataclass(frozen=True)
class Library:
    """An optional library.

    Attributes:
        name: its name in the reasons.
        module: the module that is imported.
        install: instructions to install it.
        packages: distribution names to look up the version under.
        oldest: the oldest version that can be used.
        load: imports the module, where that takes more than an import.
    """

    name: str
    module: str
    install: str
    packages: tuple[str, ...]
    oldest: str | None = None
    load: Callable[[str], Any] = importlib.import_module

    def version(self) -> str | None:
        """Return the installed version, or None."""
        for package in self.packages:
            try:
                return importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None

    def _broken(self, found: str | None, what: str) -> str:
        reason = f"{self.name} {found or ''} is installed but {what}".replace("  ", " ")
        if found is not None:  # warn, since the automatic choice skips it, which costs speed
            warnings.warn(f"attn_n: {reason}", RuntimeWarning, stacklevel=3)
        return reason

    @functools.cache  # noqa: B019  (there are four of them, as long as the process)
    def why_not(self) -> str | None:
        """Return the reason why the library cannot be used here; None if it can."""
        found = self.version()
        try:
            with IMPORTING:
                self.load(self.module)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{self.module}.".startswith(f"{error.name}."):
                return f"needs {self.name} ({self.install}), which is not installed"
            return self._broken(found, f"needs {error.name}, which is not")
        except Exception as error:  # a broken install can raise anything; its message is the explanation
            said = " ".join(f"{type(error).__name__}: {error}".split())
            return self._broken(found, f"cannot be imported: {said}")
        if self.oldest is not None and found is not None and TorchVersion(found) < self.oldest:
            return f"needs {self.name} {self.oldest} or later, found {found}"
        return None
