"""PEFT's ``target_modules``: which modules it chooses, and how to name modules and no others.

PEFT puts an adapter on every module of the base model that the configuration chooses, and then
looks for its tensors. A chosen module without tensors gets a new adapter; tensors of a module
that is not chosen are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexlora.errors import AdapterError
from flexlora.peft_format.names import is_part
from flexlora.peft_format.paths import renamed
from flexlora.peft_format.patterns import whole_matches
from flexlora.storage.untrusted import short

_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


@dataclass(frozen=True)
class Targets:
    """The settings by which PEFT chooses modules, from ``adapter_config.json``.

    ``modules`` and ``exclude`` are names, each of which stands for the modules whose path it is
    or ends, or one regular expression for whole paths. ``layers``, if not empty, restricts names
    that are not whole paths to layers of these numbers. ``saved`` are the modules that are trained
    as a whole, in which none is chosen. ``tied`` says that a head or embedding is adapted together
    with the one whose weights it shares. ``place`` is where the settings stand, for errors.
    """

    modules: tuple[str, ...] | str | None
    exclude: tuple[str, ...] | str
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]
    tied: bool
    place: str

    @classmethod
    def of(cls, config: Mapping[str, Any], place: str) -> Targets:
        """The settings in a raw configuration.

        Raises:
            AdapterError: one is of the wrong type.
        """
        modules = _names(config, "target_modules", place)
        layers = config.get("layers_to_transform")
        numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
        if not all(type(number) is int for number in numbers):
            raise AdapterError(
                f"{place}: layers_to_transform is {short(layers)}; give whole numbers."
            )
        pattern = _names(config, "layers_pattern", place) or ()
        saved = _names(config, "modules_to_save", place) or ()
        return cls(
            modules=modules,
            exclude=_names(config, "exclude_modules", place) or (),
            layers=tuple(numbers),
            layers_pattern=(pattern,) if isinstance(pattern, str) else pattern,
            saved=(saved,) if isinstance(saved, str) else saved,
            tied=bool(config.get("ensure_weight_tying")),
            place=place,
        )

    @property
    def plain(self) -> bool:
        """Whether names alone choose the modules, with nothing that restricts them."""
        restricted = self.exclude or self.layers or self.tied
        return isinstance(self.modules, tuple) and not restricted

    @property
    def every_linear_layer(self) -> bool:
        """Whether all linear layers of the base model but its head are chosen."""
        return isinstance(self.modules, str) and self.modules.lower() == "all-linear"

    def chosen(self, modules: Collection[str]) -> set[str] | None:
        """Those of ``modules`` that PEFT would choose; None if that cannot be said.

        It cannot for ``all-linear`` and tied weights, which depend on the base model, and for
        regular expressions that are not evaluated, being too costly or of unsupported constructs.
        """
        if self.modules is None or self.every_linear_layer or self.tied:
            return None
        try:
            excluded = self._matching(self.exclude, modules)
            chosen = self._matching(self.modules, modules) - excluded
            chosen = {module for module in chosen if not is_part(module, self.saved)}
        except AdapterError:
            return None
        if not self.layers or isinstance(self.modules, str):
            return chosen
        return {each for each in chosen if each in self.modules or self._layer(each) in self.layers}

    def absent(self, modules: Collection[str]) -> list[str]:
        """The names in ``target_modules`` that choose none of ``modules``."""
        if not isinstance(self.modules, tuple):
            return []
        ends = {end for module in with_renamed(modules) for end in ends_of(module)}
        return sorted(name for name in set(self.modules) if name not in ends)

    def absent_layers(self, modules: Collection[str]) -> list[int]:
        """The numbers in ``layers_to_transform`` of which no module is."""
        present = {self._layer(module) for module in modules}
        return sorted(number for number in set(self.layers) if number not in present)

    def _matching(self, names: tuple[str, ...] | str, modules: Collection[str]) -> set[str]:
        if isinstance(names, str):
            return whole_matches(names, list(modules), self.place)
        wanted = set(names)
        return {module for module in modules if not wanted.isdisjoint(ends_of(module))}

    def _layer(self, module: str) -> int | None:
        if not self.layers_pattern:
            match = _LAYER.match(module)
            return int(match[1]) if match else None
        for pattern in self.layers_pattern:
            match = re.match(rf"(?:^|.*?\.){re.escape(pattern)}\.(\d+)\.", module)
            if match:
                return int(match[1])
        return None


def ends_of(module: str) -> list[str]:
    """The names that stand for a module: its whole path, and what follows each of its dots."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def targets(modules: Iterable[str], every: Iterable[str]) -> list[str]:
    """``target_modules`` for ``modules`` of a base model whose modules are ``every``.

    Last names (``q_proj``) if they choose these modules and no others, else whole paths.
    """
    adapted = set(modules)
    names = {module.rpartition(".")[2] for module in adapted}
    chosen = {module for module in every if module.rpartition(".")[2] in names}
    return sorted(names if chosen == adapted else adapted)


def common_targets(inputs: Sequence[tuple[Targets, Collection[str]]]) -> list[str]:
    """``target_modules`` for the union of several adapters' modules, without the base model.

    ``inputs`` are the settings and the modules of each adapter. Where every adapter names its
    modules by a plain list, and has tensors for all modules that its list chooses among those
    known, the lists have chosen exactly these modules in training, and the names that chose
    some are kept. In all other cases the base model may have more modules that the names would
    choose (further layers, a vision tower, shared experts), and the result is whole paths: those
    of the tensors and, where transformers has renamed modules since, the present ones, as PEFT
    converts the names of tensors but not these.
    """
    union = {module for _, modules in inputs for module in modules}
    names: set[str] = set()
    for settings, modules in inputs:
        if not settings.plain or settings.chosen(union) != set(modules):
            return sorted(with_renamed(union))
        names |= set(settings.modules or ()) - set(settings.absent(modules))
    return sorted(names if _same_in_every_layer(union) else with_renamed(union))


def with_renamed(modules: Iterable[str]) -> set[str]:
    """The modules, and the present paths of those that transformers has renamed."""
    return {path for each in modules for path in (each, renamed(each)) if path}


def _same_in_every_layer(modules: Collection[str]) -> bool:
    """Whether in each stack the layers numbered 0 to n all have the same modules.

    A vision tower is another stack than the language model, and may have more layers.
    """
    stacks: dict[str, dict[str, set[int]]] = {}
    for module in modules:
        layer = re.search(r"(?<=\.)(\d+)\.", f".{module}")
        if layer:
            stack, name = f".{module}"[: layer.start()], f".{module}"[layer.end() :]
            stacks.setdefault(stack, {}).setdefault(name, set()).add(int(layer[1]))
    return all(
        numbers == set(range(len(numbers))) == next(iter(names.values()))
        for names in stacks.values()
        for numbers in names.values()
    )


def _names(config: Mapping[str, Any], key: str, place: str) -> tuple[str, ...] | str | None:
    """A setting that is a list of names or one regular expression."""
    value = config.get(key)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise AdapterError(f"{place}: {key} is {short(value)}; give a list of modules' names.")
    return tuple(value)
