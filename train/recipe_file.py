"""Recipes as YAML: reads a file, replaces values by their dotted names, and explains mistakes.

`slm train` and `slm finetune` share it; each has a model of its own recipe.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from slm.core.config import first_mistake
from slm.core.errors import SlmError

AnyRecipe = TypeVar("AnyRecipe", bound=BaseModel)


@dataclass(frozen=True)
class RecipeForm(Generic[AnyRecipe]):
    """The form of a command's recipes.

    Attributes:
        model: The recipe. A section with the class attribute `further_names` has values of these names besides its fields.
        command: The command whose --dry-run shows every value.
        example: An override, for messages.
    """

    model: type[AnyRecipe]
    command: str
    example: str

    @property
    def names(self) -> list[str]:
        """The dotted names of all values."""
        return _names(self.model)

    def read(self, text: str, source: str) -> dict[str, Any]:
        """Returns the fields of a recipe, which are not checked yet.

        Args:
            text: The recipe as YAML.
            source: A name for it in messages.

        Raises:
            SlmError: When the text is not a YAML mapping.
        """
        try:
            fields = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date that does not exist
            raise SlmError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(fields, dict):
            raise SlmError(f"{source} is not a mapping of sections")
        return fields

    def override(self, fields: dict[str, Any], override: str) -> None:
        """Applies an override `a.b=c`, with c in YAML.

        Raises:
            SlmError: When there is no such value, or c is not YAML; the hint has the closest names.
        """
        path, equals, text = override.partition("=")
        if not equals:
            raise SlmError(f"--set {override}: there is no '='", f"write it like --set {self.example}")
        if path not in self.names:
            raise SlmError(f"--set {override}: the recipe has no value {path!r}", self._meant(path))
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, ValueError):
            raise SlmError(
                f"--set {override}: the value is not YAML", "quote it, as in --set 'name=\"a: b\"'"
            ) from None
        put(fields, path, value)

    def checked(self, fields: Mapping[str, Any], source: str) -> AnyRecipe:
        """Returns the recipe with these fields.

        Raises:
            SlmError: When a value is wrong; the message names it, and lists the valid names if it is unknown.
        """
        try:
            return self.model.model_validate(fields)
        except ValidationError as error:
            raise SlmError(f"{source}: {first_mistake(error)}", self._hint(error)) from None

    def to_yaml(self, recipe: AnyRecipe) -> str:
        """Returns a recipe as YAML that `read` accepts."""
        return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def _hint(self, error: ValidationError) -> str | None:
        """Returns the closest names and the valid names if the mistake is an unknown name."""
        first = error.errors(include_url=False)[0]
        if first["type"] != "extra_forbidden":
            return None
        *sections, key = map(str, first["loc"])
        prefix = "".join(f"{section}." for section in sections)
        valid = [name for name in self.names if name.startswith(prefix)]
        return _near(f"{prefix}{key}", self.names, key) + one_of(valid)

    def _meant(self, path: str) -> str:
        """Returns a hint for an unknown name: the closest names, those of its section, or the sections."""
        valid = self.names
        section, _, key = path.rpartition(".")
        section = section.partition(".")[0] or path
        inside = [name for name in valid if name.startswith(f"{section}.")]
        near = _near(path, valid)
        if inside or near:
            return f"{near}{one_of(inside)}" if inside else near.rstrip()
        near = _near(path, valid, key)
        if near:
            return near.rstrip()
        names = dict.fromkeys(name.partition(".")[0] for name in valid if "." in name)
        return f"the sections are {', '.join(names)}; {self.command} --dry-run shows every value"


def put(fields: dict[str, Any], path: str, value: object) -> None:
    """Sets the value of a dotted name in nested dictionaries."""
    *sections, key = path.split(".")
    for section in sections:
        if fields.get(section) is None:  # absent, or empty in the file
            fields[section] = {}
        if not isinstance(fields[section], dict):
            return  # the recipe is rejected because of it
        fields = fields[section]
    fields[key] = value


def value_at(fields: Mapping[str, Any], path: str) -> object:
    """Returns the value of a dotted name in nested dictionaries; None if there is none."""
    found: object = fields
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def one_of(names: Iterable[str]) -> str:
    """Returns a phrase that lists valid names."""
    return f"there is {', '.join(names)}"


def _near(path: str, valid: Sequence[str], key: str | None = None) -> str:
    """Returns a question with the names close to a path, or that end in a key, followed by a space; "" if there are none."""
    near = get_close_matches(path, valid, n=2, cutoff=0.75)
    if not near and key is not None:
        near = [name for name in valid if name.rpartition(".")[2] == key]
    return f"did you mean {' or '.join(near)}? " if near else ""


def _names(section: type[BaseModel]) -> list[str]:
    names = [*getattr(section, "further_names", ())]
    for key, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += [f"{key}.{name}" for name in _names(inner)]
        else:
            names.append(key)
    return names
