"""Names for components: register, get, discover.

A component is one file in its package: importing the file registers it.  A name with a colon,
``package.module:object``, loads code from outside the tree, so nothing has to be edited to try a new loss.
"""

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, cast

from calsegx.interfaces import UsageError

T = TypeVar("T", bound=Callable[..., Any])
F = TypeVar("F", bound=Callable[..., Any])  # the decorated component's own type, with its options


class Registry(Generic[T]):
    """The components of one kind, e.g. losses; ``package`` is the package (or the module) that registers them."""

    def __init__(self, kind: str, package: str):
        self.kind = kind
        self._package = package
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator: register a callable under ``name``.  Two components of one name are a programming error."""

        def decorate(component: F) -> F:
            if name in self._entries and self._entries[name] is not component:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = cast(T, component)
            return component

        return decorate

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._discover()
        return sorted(self._entries)

    def get(self, name: str) -> T:
        """The component called ``name``, or loaded from ``package.module:object``.

        Raises:
            UsageError: for an unknown name; the message lists the known ones and the nearest.
        """
        if ":" in name:
            return self._load(name)
        self._discover()
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            known = ", ".join(sorted(self._entries))
            raise UsageError(f"There is no {self.kind} named {name!r}; known: {known}, or package.module:object.{hint}")
        return self._entries[name]

    def bind(self, name: str, options: Mapping[str, Any]) -> Callable[..., Any]:
        """``get(name)`` with its keyword-only options set, checked against the component's signature.

        Raises:
            UsageError: when the component has no such option; the message lists those it has.
        """
        component = self.get(name)
        parameters = inspect.signature(component).parameters.values()
        allowed = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        for option in options:
            if option not in allowed:
                have = ", ".join(allowed) or "none"
                raise UsageError(f"The {self.kind} {name!r} has no option {option!r}; it has: {have}.")
        return functools.partial(component, **options) if options else component

    def _discover(self) -> None:
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
            importlib.import_module(f"{self._package}.{module.name}")

    def _load(self, name: str) -> T:
        module_name, _, attribute = name.partition(":")
        try:
            component: Any = getattr(importlib.import_module(module_name), attribute)
        except Exception as error:  # whatever the user's module raises while it is imported
            raise UsageError(
                f"The {self.kind} {name!r} cannot be loaded ({type(error).__name__}: {error}); give "
                "package.module:object on PYTHONPATH."
            ) from error
        if not callable(component):
            raise UsageError(f"The {self.kind} {name!r} is a {type(component).__name__}; expected a function.")
        return cast(T, component)
