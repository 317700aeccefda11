"""A row as a value: one checkpoint of a zoo, made once where a row enters and taken by everything after."""

from collections.abc import Callable, Iterator, Mapping
from threading import Lock
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from vitzoo_hf.format import schema
from vitzoo_hf.format.encoding import vector_of
from vitzoo_hf.format.schema import ZooError

RowLike = Mapping[str, object] | pa.Table | pa.RecordBatch | pd.DataFrame | pd.Series
"""What users bring: a row of `Zoo.rows()` or of `load_dataset(…)` in any format, or a table or frame of one row."""

Factor = str | float | int | bool | None


class Row(Mapping[str, Any]):
    """One checkpoint of a zoo: a read-only mapping of its columns, with typed attributes for those of the format.

    `row["weights"]` is what is stored, and `row.weights` the decoded vector. The weights of a row of a zoo are read
    and compared with their hash when they are first asked for, so the zoo must stay in its place until then.
    `dict(row)` and `row | {"column": value}` are mappings that may be changed. Their weights are the memory of the
    row: copy them before writing. Where it is rebuilt, a row whose weights were handed out is compared with its hash
    again.

    Args:
        columns: column -> value; `weights` may be missing.
        read: gives the weights, float32 `[D]`, when they are first asked for; takes the place of `weights`.
        verified: the weights are known to be finite and those of `weights_sha256`, or `read` makes sure of it.

    Example:
        >>> row = Row.of({"model_id": "a@3", "epoch": 3, "factor_lr": 0.1, "weights": [0.5, 1.0]})
        >>> row.epoch, row.factors, row.weights
        (3, {'lr': 0.1}, array([0.5, 1. ], dtype=float32))
    """

    __slots__ = ("_columns", "_lock", "_read", "_vector", "_verified")

    def __init__(
        self, columns: Mapping[str, object], read: Callable[[], np.ndarray] | None = None, *, verified: bool = False
    ) -> None:
        self._columns: dict[str, Any] = dict(columns)
        if read is not None:
            self._columns["weights"] = None
        self._read = read
        self._lock = Lock()  # threads that ask at once must get one array
        self._vector: np.ndarray | None = None
        self._verified = verified

    @classmethod
    def of(cls, row: RowLike) -> "Row":
        """The row that a user brings; a `Row` is handed on as it is.

        Raises:
            ZooError: for what is no row, or a table that has not exactly one row.
        """
        # handed on, so that verification and the decoded vector are kept
        if isinstance(row, Row):
            return row
        if isinstance(row, pa.RecordBatch):
            row = pa.Table.from_batches([row])
        if isinstance(row, pd.Series):
            row = row.to_frame().T
        if isinstance(row, Mapping):
            return cls(row)
        if not isinstance(row, pa.Table | pd.DataFrame):
            raise ZooError(
                f"a row is of type {type(row).__name__}; expected one of `Zoo.rows()` or `load_dataset(…)`, or a"
                " mapping of its columns"
            )
        if len(row) != 1:
            raise ZooError(f"a table of {len(row)} rows was given; expected one row, such as `rows[0]`")
        if isinstance(row, pd.DataFrame):
            return cls({str(name): _plain(row[name].iloc[0]) for name in row.columns})
        # weights stay an Arrow column: as_py would make a list of Python floats
        return cls({name: row[name] if name == "weights" else row[name][0].as_py() for name in row.column_names})

    def __getitem__(self, column: str) -> Any:
        if column == "weights":
            stored = self.stored_weights
            self._verified = False  # whoever has the memory may write into it
            return stored
        return self._columns[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __contains__(self, column: object) -> bool:
        return column in self._columns  # Mapping would ask for the value, and so read the weights

    def __or__(self, changes: Mapping[str, object]) -> dict[str, object]:
        return dict(self) | dict(changes)

    def __ror__(self, columns: Mapping[str, object]) -> dict[str, object]:
        return dict(columns) | dict(self)

    def __repr__(self) -> str:
        return f"Row({self.name!r}, {len(self)} columns)"

    def __copy__(self) -> "Row":
        return self  # two rows over one vector would not know that a model of the other changed it

    def __reduce__(self) -> tuple[object, ...]:
        return Row, (dict(self),)  # not verified: the memory may have been written to before it was copied

    @property
    def name(self) -> str:
        """The id of the row in messages: `model_id`, or `the row` where it has none."""
        return str(self.get("model_id") or "the row")

    @property
    def model_id(self) -> str:
        """`RUN@EPOCH`, unique in a zoo."""
        return str(self.required("model_id"))

    @property
    def run_id(self) -> str:
        """The run that the checkpoint is of."""
        return str(self.required("run_id"))

    @property
    def parent_id(self) -> str | None:
        """The checkpoint that initialised the run."""
        return self._columns.get("parent_id")

    @property
    def stage(self) -> str | None:
        """`pretrain` or `finetune`, also where `load_dataset` gives the class number."""
        return self._class_name("stage", schema.STAGES)

    @property
    def epoch(self) -> int:
        """Epochs trained."""
        return int(self.required("epoch"))

    @property
    def is_final(self) -> bool:
        """Whether this is the last checkpoint of its run."""
        return bool(self.required("is_final"))

    @property
    def dataset(self) -> str | None:
        """The image set that the run was trained on."""
        return self._columns.get("dataset")

    @property
    def head(self) -> str:
        """`linear` or `mlp`, also where `load_dataset` gives the class number."""
        head = self._class_name("head", schema.HEADS)
        return str(self.required("head")) if head is None else head

    @property
    def head_hidden(self) -> int | None:
        """Width of the MLP head's hidden layer; None for a linear head."""
        width = self._columns.get("head_hidden")
        return None if width is None or width != width else int(width)  # pandas gives NaN for null

    @property
    def num_parameters(self) -> int | None:
        """D, the length of the weights, as the row says; None where it says nothing."""
        size = self._columns.get("num_parameters")
        return None if size is None else int(size)

    @property
    def layout(self) -> str | None:
        """Fingerprint of the layout of the weights."""
        return self._columns.get("layout")

    @property
    def weights_sha256(self) -> str | None:
        """SHA-256 of the float32 weights; None for a row whose weights were changed."""
        return self._columns.get("weights_sha256")

    @property
    def factors(self) -> dict[str, Factor]:
        """Generating factor, without the `factor_` prefix -> value."""
        return {name[7:]: value for name, value in self._columns.items() if name.startswith("factor_")}

    @property
    def verified(self) -> bool:
        """Whether the weights are known to be finite and those of `weights_sha256`."""
        return self._verified

    @property
    def weights(self) -> np.ndarray:
        """The weights, float32 `[D]`, without a copy where they are float32 in memory.

        Raises:
            ZooError: if there are none, not as many as the row says, or not those of its hash when they are read.
        """
        vector = self.vector
        self._verified = False  # whoever has the memory may write into it
        return vector

    @property
    def stored_weights(self) -> object:
        """What `row["weights"]` gives, for code that does not write into it: the row stays verified.

        Raises:
            KeyError: if there are none.
            ZooError: if they are not those of the row's hash when they are read.
        """
        if self._read is not None:
            with self._lock:
                if self._read is not None:
                    self._columns["weights"] = self._vector = self._read()
                    self._read = None  # only now: a row that could not be read raises again, and names itself again
        return self._columns["weights"]

    @property
    def vector(self) -> np.ndarray:
        """What `weights` gives, for code that does not write into it: the row stays verified.

        Raises:
            ZooError: see `weights`.
        """
        self._check_column("weights")
        weights = self.stored_weights
        # decoded once: bytes of bfloat16 would be widened at each access
        if self._vector is None:
            self._vector = vector_of(
                weights,
                name=self.name,
                num_parameters=self.num_parameters,
                dtype=self._columns.get("dtype") or "float32",
                sha256=self.weights_sha256,
            )
        return self._vector

    def lend(self) -> None:
        """Note that a model shares the memory of the weights and may change them: they are verified again."""
        # the flag alone: hashing waits until somebody rebuilds from it
        self._verified = False

    def required(self, column: str) -> Any:
        """The value of a column that the caller cannot do without.

        Raises:
            ZooError: if the row has no such column.
        """
        self._check_column(column)
        return self[column]

    def _check_column(self, column: str) -> None:
        if column not in self:
            raise ZooError(f"the row has no column {column!r}: take whole rows, `load_dataset(id, 'weights')`")

    def _class_name(self, column: str, names: tuple[str, ...]) -> str | None:
        value = self._columns.get(column)
        if value is None or isinstance(value, str):
            return value
        if not 0 <= value < len(names):
            meaning = " and ".join(f"{number} ({name})" for number, name in enumerate(names))
            raise ZooError(f"unknown {column} {value}: its class labels are {meaning}")
        return names[int(value)]


def _plain(value: object) -> object:
    """A cell of a data frame as Python has it, with None for its missing values."""
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return None
    return value.item() if isinstance(value, np.generic) else value
