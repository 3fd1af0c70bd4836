"""What a finished run or a checkpoint records about its training: the constants, and which text it was."""

import dataclasses
import typing
from pathlib import Path

from microbert.config.constants import Config
from microbert.config.flags import convert
from microbert.errors import InputError
from microbert.model.export import CONSTANTS_FORMAT
from microbert.runtime.files import read_json, system_trouble
from microbert.runtime.run_folder import CONSTANTS
from microbert.train.checkpoint import DAMAGE, FORMAT, STATE

# constants of the machine and of how a run ends, which do not describe its text
NOT_OF_THE_TEXT = {"device": "cpu", "report_to": None, "prepare_only": False, "dry_run": False, "overwrite": False}
NOT_OF_THE_TEXT |= {"gpu_memory_gb": None, "num_gpus": None}


@dataclasses.dataclass(frozen=True)
class Record:
    """constants: by name. corpus_key: of a finished run, else None. tokens_key: of a checkpoint, else None."""

    folder: Path
    constants: dict[str, object]
    corpus_key: str | None
    tokens_key: str | None

    def config(self, cache_dir: str, **changed: object) -> Config:
        """Return the constants, with these changes, to open or prepare the text again in cache_dir.

        Raises InputError if the dataset does not exist, or a constant is unknown.
        """
        paths = {"cache_dir": cache_dir, "output_dir": str(self.folder)}
        hints = typing.get_type_hints(Config)
        try:
            values = {name: convert(name, value, hints[name]) for name, value in self.constants.items()}
            return Config(**values | NOT_OF_THE_TEXT | paths | changed)  # type: ignore[arg-type]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{self.folder} was trained by another version of this suite: its constants differ ({error})"
            ) from error


def read_record(folder: Path) -> Record | None:
    """Return what the folder of a finished run or of a checkpoint records; None if it records nothing.

    Raises InputError if the record is damaged.
    """
    for name, version in ((CONSTANTS, CONSTANTS_FORMAT), (STATE, FORMAT)):
        path = folder / name
        try:
            stored = read_json(path)
            if stored["format"] != version or not isinstance(stored["config"], dict):
                raise ValueError("it is of another version")
            corpus_key = stored["corpus"] if name == CONSTANTS else None
            tokens_key = stored["state"]["tokens_key"] if name == STATE else None
            return Record(folder, stored["config"], corpus_key, tokens_key)
        except FileNotFoundError:
            continue
        except DAMAGE as error:
            if system_trouble(error):
                raise
            raise InputError(f"{path} is damaged ({error})") from error
    return None
