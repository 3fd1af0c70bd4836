"""One commit of a dataset of the Hugging Face Hub: the files of its train split, and its text column."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microbert.config.dataset_names import FILE_KINDS, file_kind
from microbert.data.delimited import usual_separator
from microbert.errors import InputError
from microbert.runtime.files import read_json, write_json

if TYPE_CHECKING:
    from datasets import DatasetBuilder

COLUMN_RECORD = "text_column.json"
# settings of a dataset's card that do not change the rows; sep is compared with the files' names
HARMLESS_SETTINGS = {
    "name",
    "version",
    "data_dir",
    "data_files",
    "description",
    "chunksize",
    "block_size",
    "batch_size",
    "use_threads",
    "memory_map",
    "fragment_scan_options",
    "verbose",
    "warn_bad_lines",
    "sep",
}


@dataclasses.dataclass(frozen=True)
class HubDataset:
    """One commit of a dataset. name: its configuration, None for the default one."""

    repo_id: str
    name: str | None
    revision: str

    @property
    def label(self) -> str:
        """The name for messages, such as "org/name" or "org/name:config"."""
        return self.repo_id if self.name is None else f"{self.repo_id}:{self.name}"

    def load_builder(self) -> "DatasetBuilder":
        """Return the builder of `datasets`, from the network or from its cache.

        Raises InputError if a configuration must be named, ConnectionError if only another commit is in the cache.
        """
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        revision = {} if datasets.config.HF_HUB_OFFLINE else {"revision": self.revision}  # offline it accepts none
        builder = datasets.load_dataset_builder(self.repo_id, self.name, **revision)
        if builder.hash != self.revision:
            raise ConnectionError(f"datasets could not reach it, and its cache holds only commit {builder.hash[:12]}")
        names = list(builder.builder_configs)
        if self.name is None and len(names) > 1 and "default" not in names:
            raise InputError(
                f'dataset = "{self.repo_id}" has several configurations; add one to its name, such as '
                f'"{self.repo_id}:{names[0]}". It has: {", ".join(names)}'
            )
        return builder

    def train_files(self, builder: "DatasetBuilder") -> list[str]:
        """Return the paths of the train split's files in the repository.

        Raises InputError if this suite cannot read all of them as the dataset's card defines.
        """
        files = builder.config.data_files or {}
        if not files.get("train"):
            raise InputError(f"{self.label} has no train split; it has: {', '.join(map(str, files)) or 'no files'}")
        paths = [self.path_in_repository(file) for file in files["train"]]
        kinds = {base.__name__.lower() for base in type(builder).__mro__} & set(FILE_KINDS.values())
        if other := [path for path in paths if file_kind(path) not in kinds]:
            expected = " or ".join(sorted(kinds or set(FILE_KINDS.values())))
            raise self._not_streamable(f"the name of {other[0]} is not that of a {expected} file")
        self.check_settings(builder.config, paths)
        return paths

    def path_in_repository(self, file: str) -> str:
        """Return the path of a file that `datasets` names as hf://datasets/org/name@commit/data/train.parquet."""
        repository, _, path = file.partition(f"@{self.revision}/")
        if repository.lower() != f"hf://datasets/{self.repo_id}".lower() or not path:
            raise self._not_streamable(f"{file} is outside its repository")
        return path

    def check_settings(self, settings: Any, paths: list[str]) -> None:
        """Raise InputError if the dataset's card asks for another way of reading than streaming uses for all files.

        settings: the dataclass of `datasets` for this kind of file.
        """
        defaults = type(settings)()
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            if field.name not in HARMLESS_SETTINGS and value != getattr(defaults, field.name):
                raise self._not_streamable(f"its card sets {field.name} = {value!r}")
        if hasattr(settings, "sep") and {settings.sep} != {usual_separator(path) for path in paths}:
            raise self._not_streamable(f"its card sets sep = {settings.sep!r}")

    def _not_streamable(self, why: str) -> InputError:
        return InputError(f"{self.label}: {why}, which cannot be streamed; run again without --streaming")


class TextColumn:
    """The text column of a corpus: the one you named, else the first choice, which is recorded for later processes.

    folder: the corpus's folder in the cache. label: the dataset's name for messages.
    """

    def __init__(self, wanted: str | None, folder: Path, label: str) -> None:
        self._name, self._record, self._label = wanted, folder / COLUMN_RECORD, label

    def known(self) -> str | None:
        """Return the column, None if no process has chosen one yet."""
        if self._name is None:
            try:
                self._name = str(read_json(self._record)["text_column"])
            except (OSError, ValueError, KeyError):
                return None
        return self._name

    def choose(self, name: str) -> None:
        """Record and print a column that was chosen from the data, at its first use."""
        if self._name is None:
            self._name = name
            self._record.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._record, {"text_column": name})
            print(f'{self._label}: text column "{name}"')
