"""The corpus of the quickstart."""

import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from t5x_lite.data.sources.base import END, OnBroken, Part, Piece, Place, Record, Source
from t5x_lite.data.sources.paths import file_size, file_stamp
from t5x_lite.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chitchat(Source):
    """7,168 English dialogues of the PyPI package chitchat-dataset (MIT).

    A record's text is a dialogue, one line per message.
    """

    def parts(self) -> list[Part]:
        """As in `Source`: one."""
        file = self._file()
        return [Part((Piece(file, 0, END),), file_size(file))]

    def records(self, part: Part, on_broken: OnBroken) -> Iterator[tuple[Record, Place]]:
        """As in `Source`."""
        dialogues = self._dialogues()
        for number, text in enumerate(dialogues):
            read = part.size * (number + 1) // len(dialogues)
            yield {"text": text}, Place(part.pieces[0].path, "dialogue", number, read)

    def stamp(self) -> dict[str, str]:
        """As in `Source`."""
        return {"dataset.json": file_stamp(self._file())}

    def _dialogues(self) -> list[str]:
        file = self._file()
        try:
            dialogues = json.loads(Path(file).read_bytes()).values()
            return [
                "\n".join(message["text"] for turn in dialogue["messages"] for message in turn)
                for dialogue in dialogues
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} isn't chitchat-dataset's: reinstall the package.") from error

    def _file(self) -> str:
        # found, not imported: the package's own code has nothing to do here
        spec = importlib.util.find_spec("chitchat_dataset")
        folders = list(spec.submodule_search_locations or ()) if spec else []
        for folder in folders:
            if (Path(folder) / "dataset.json").is_file():
                return str(Path(folder) / "dataset.json")
        raise UserError("the chitchat corpus isn't installed: pip install 't5x_lite[demo]'.")
