"""Classes by id: built-in ones, those registered in this process, and those of other packages.

A package adds one with an entry point in the group, named as the id. Entry points load only when
their id is asked for; a file can name one but never install it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoints, entry_points
from typing import Any, Generic, TypeVar

from moebound.errors import BackendUnavailable, MoeboundError

T = TypeVar("T")


class Plugins(Generic[T]):
    """The classes of one kind ("codec"), all of them of `base`, each with an `id`.

    group: of the entry points. built_in: id -> "module:Class", imported when it is asked for.
    error: what is raised for an unknown id, and for two classes of one id.
    """

    def __init__(
        self,
        kind: str,
        base: type[T],
        *,
        group: str,
        built_in: Mapping[str, str],
        error: type[MoeboundError],
    ) -> None:
        self.kind, self.base, self.group, self.error = kind, base, group, error
        self._built_in = dict(built_in)
        self.classes: dict[str, type[T]] = {}

    def ids(self) -> list[str]:
        """All that can be asked for, sorted."""
        found = {entry.name for entry in self._entry_points()}
        return sorted(self._built_in.keys() | self.classes.keys() | found)

    def knows(self, plugin_id: str) -> bool:
        """Whether it can be asked for. What other packages have is looked up only where it has to
        be: that reads the metadata of all of them."""
        if plugin_id in self._built_in or plugin_id in self.classes:
            return True
        return any(entry.name == plugin_id for entry in self._entry_points())

    def get(self, plugin_id: str) -> type[T]:
        """The class behind an id. Raises `error` for an unknown one, BackendUnavailable if it
        cannot be loaded."""
        if plugin_id not in self.classes:
            self.register(self._load(plugin_id), as_id=plugin_id)
        return self.classes[plugin_id]

    def register(self, cls: type[T], *, as_id: str | None = None) -> None:
        """Make a class known in this process. The same one twice is fine, another is not."""
        found: str = getattr(cls, "id")  # noqa: B009  # T has one, which its bound cannot say
        if as_id is not None and found != as_id:
            raise self.error(
                f"{self.kind} {as_id!r}: its class {cls.__qualname__} says id {found!r}"
            )
        known = self.classes.get(found)
        if known is not None and known is not cls:
            raise self.error(
                f"{self.kind} {found!r} is taken by {known.__module__}.{known.__qualname__}"
            )
        if known is None and as_id is None and found in self._built_in:
            raise self.error(f"{self.kind} {found!r} is built in")
        self.classes[found] = cls

    def _entry_points(self) -> EntryPoints:
        return entry_points(group=self.group)

    def _load(self, plugin_id: str) -> type[T]:
        if plugin_id in self._built_in:
            module, _, name = self._built_in[plugin_id].partition(":")
            return getattr(import_module(module), name)  # type: ignore[no-any-return]
        for entry in self._entry_points():
            if entry.name == plugin_id:
                try:
                    cls: Any = entry.load()
                except Exception as error:
                    raise BackendUnavailable(
                        f"{self.kind} {plugin_id!r} ({entry.value}): {error}"
                    ) from error
                if not (isinstance(cls, type) and issubclass(cls, self.base)):
                    raise self.error(
                        f"{self.kind} {plugin_id!r}: {entry.value} is not a {self.base.__name__}"
                    )
                return cls
        raise self.error(f"{self.kind} {plugin_id!r}: unknown. Known here: {', '.join(self.ids())}")
