"""What is done to records before they are stored: fields renamed, filled into templates, filtered.

A preprocessor is a frozen dataclass, called with a record; it gives any number of records. What
draws noise isn't done here but by the objective, anew in every epoch.
"""

import dataclasses
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from t5x_lite.data.sources import Place, Record
from t5x_lite.errors import UserError


@runtime_checkable
class Preprocessor(Protocol):
    """One record in, none, one or several out. Same record, same result."""

    def __call__(self, record: Record) -> Iterator[Record]:
        """Raises UserError where the record won't do; the caller adds which one it is."""
        ...


def apply(steps: Sequence[Preprocessor], record: Record, place: Place) -> list[Record]:
    """What all steps make of a record. Raises UserError, with the record's place."""
    records = [record]
    try:
        for step in steps:
            records = [made for one in records for made in step(one)]
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    return records


def needed(record: Mapping[str, Any], name: str) -> Any:
    """A field's value. Raises UserError where there is none."""
    if record.get(name) is None:
        raise UserError(f"no field {name!r} (it has {', '.join(sorted(record)[:8])}).")
    return record[name]


@dataclasses.dataclass(frozen=True)
class Rename:
    """Fields under the names that the objective wants: `{"question": "inputs"}`."""

    fields: Mapping[str, str]

    def __call__(self, record: Record) -> Iterator[Record]:
        """As in `Preprocessor`."""
        others = {name: value for name, value in record.items() if name not in self.fields}
        yield others | {new: needed(record, old) for old, new in self.fields.items()}


@dataclasses.dataclass(frozen=True)
class Template:
    """Fields filled into text: `Template(inputs="translate English to German: {en}", …)`.

    Attributes:
      inputs, targets, text: Python format strings over the record's fields, None to leave alone.
        `{{` writes a brace. A field of a field is `{answers[text]}`.
    """

    inputs: str | None = None
    targets: str | None = None
    text: str | None = None

    def __post_init__(self):
        if not self._templates:
            raise UserError("Template has no inputs, targets or text to fill in.")
        for name, template in self._templates.items():
            try:
                list(string.Formatter().parse(template))
            except ValueError as error:
                raise UserError(f"Template.{name} {template!r}: {error}; write {{{{.") from error

    @property
    def _templates(self) -> dict[str, str]:
        templates = dataclasses.asdict(self)
        return {name: value for name, value in templates.items() if value is not None}

    def __call__(self, record: Record) -> Iterator[Record]:
        """As in `Preprocessor`."""
        made = dict(record)
        for name, template in self._templates.items():
            try:
                made[name] = _Fields().vformat(template, (), record)
            except (KeyError, IndexError, TypeError) as error:
                has = ", ".join(sorted(record)[:8])
                raise UserError(f"Template.{name} wants {error}, the record has {has}.") from error
        yield made


class _Fields(string.Formatter):
    """Format strings over JSON values alone: attributes of Python objects stay out of reach."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        if "." in re.sub(r"\[[^\]]*\]", "", field_name):
            raise KeyError(field_name)
        return super().get_field(field_name, args, kwargs)


@dataclasses.dataclass(frozen=True)
class Keep:
    """Only records whose `field` matches a regular expression somewhere."""

    field: str
    pattern: str

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"Keep.pattern {self.pattern!r} isn't a pattern: {error}.") from error

    def __call__(self, record: Record) -> Iterator[Record]:
        """As in `Preprocessor`."""
        if re.search(self.pattern, str(needed(record, self.field))):
            yield record


@dataclasses.dataclass(frozen=True)
class Split:
    """A line of two fields: `Split("IN: (.*) OUT: (.*)")` makes inputs and targets of `text`.

    Attributes:
      pattern: a regular expression that must match the whole field; each group is a field.
      fields: the groups' names.
      field: what to split.
    """

    pattern: str
    fields: Sequence[str] = ("inputs", "targets")
    field: str = "text"

    def __post_init__(self):
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise UserError(f"Split.pattern {self.pattern!r} isn't a pattern: {error}.") from error
        if groups != len(self.fields):
            raise UserError(
                f"Split.pattern {self.pattern!r} has {groups} groups for {len(self.fields)} "
                f"fields ({', '.join(self.fields)}); give as many."
            )

    def __call__(self, record: Record) -> Iterator[Record]:
        """As in `Preprocessor`."""
        text = str(needed(record, self.field))
        match = re.fullmatch(self.pattern, text.strip(), re.DOTALL)
        if match is None:
            raise UserError(f"{text[:60]!r} doesn't match Split.pattern {self.pattern!r}.")
        yield record | dict(zip(self.fields, match.groups(), strict=True))


@dataclasses.dataclass(frozen=True)
class Each:
    """One record for each element of a list in `field`, with the record's other fields.

    An element that is an object adds its fields; another becomes `name`.
    """

    field: str
    name: str = "text"

    def __call__(self, record: Record) -> Iterator[Record]:
        """As in `Preprocessor`."""
        elements = needed(record, self.field)
        if not isinstance(elements, list | tuple):
            raise UserError(f"field {self.field!r} is no list but {type(elements).__name__}.")
        others = {name: value for name, value in record.items() if name != self.field}
        for element in elements:
            yield others | (element if isinstance(element, Mapping) else {self.name: element})
