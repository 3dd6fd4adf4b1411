"""Values of Arrow, TFDS and NumPy as JSON has them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from t5x_lite.data.sources.base import OnBroken, Place, Record, renamed
from t5x_lite.errors import UserError

BATCH_BYTES = 4 * 2**20  # of a table that become Python values at once


def json_value(value: Any) -> Any:
    """Bytes as text, arrays as lists, times in ISO 8601, other things as `str` writes them.

    Raises:
      UnicodeDecodeError: bytes that aren't UTF-8.
    """
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {str(name): json_value(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(one) for one in value]
    if hasattr(value, "tolist"):  # arrays and scalars of NumPy
        return json_value(value.tolist())
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def json_field(value_of: Callable[[], Any], name: str, place: Place) -> Any:
    """`json_value` of what `value_of` gives. Raises UserError, which names the record's field."""
    try:
        return json_value(value_of())
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}, field {name!r} isn't UTF-8 at byte {error.start} "
            f"(0x{error.object[error.start]:02x}); convert it, or leave it out."
        ) from error


def places(file: str, unit: str, first: int, before: int, share: float) -> Callable[[int], Place]:
    """The places of a table's rows, from row `first` on, each of `share` bytes."""
    return lambda row: Place(file, unit, first + row, before + int((row + 1) * share))


def rows(
    table: Any, place: Callable[[int], Place], field: str | None, owner: str, on_broken: OnBroken
) -> Iterator[tuple[Record, Place]]:
    """The rows of an Arrow table or batch as records.

    Args:
      table: small enough to become Python values at once.
      place: of a row, by its number in the table.
      field: as `renamed` takes it.
      owner: the source's class, for messages.
      on_broken: as in `Source.records`.
    """
    try:
        records = table.to_pylist()
    except UnicodeDecodeError:  # of some row, found below
        records = None
    other = [column.name for column in table.schema if not _is_json(column.type)]
    for number in range(table.num_rows):
        here = place(number)
        try:
            record = records[number] if records is not None else _row(table, number, here)
            for name in other:
                record[name] = json_field(lambda: record[name], name, here)  # noqa: B023
            record = renamed(record, field, here, owner)
        except UserError as error:
            on_broken(error)
            continue
        yield record, here


def _row(table: Any, number: int, place: Place) -> Record:
    columns = zip(table.schema.names, table.columns, strict=True)
    return {name: json_field(lambda: column[number].as_py(), name, place)  # noqa: B023
            for name, column in columns}  # fmt: skip


def _is_json(kind: Any) -> bool:
    import pyarrow.types as kinds

    tests = (kinds.is_string, kinds.is_large_string, kinds.is_integer, kinds.is_floating)
    return any(test(kind) for test in (*tests, kinds.is_boolean, kinds.is_null))
