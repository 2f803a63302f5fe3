"""The vocabulary: where neurons are, how far each one moved, and which are chosen.

A *neuron* is one vector of length ``vector_length`` inside a projection matrix: a row of a projection
that reads from the residual stream (``up_proj``, ``gate_proj``, ``q/k/v_proj``), a column of one that
writes to it (``down_proj``, ``o_proj``) (paper, section 4). Index *n* of ``up_proj`` and index *n* of
``down_proj`` are different neurons.

Nothing here needs torch: sets and scores are numpy arrays and small files.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from neft.errors import NeuronError
from neft.files import replaced_atomically, write_text
from neft.selection import Budget, Candidates, Preference, Rule, Which, choose, plain_number
from neft.selection import Indices as Indices

PathLike: TypeAlias = str | os.PathLike[str]

NEURONS_FORMAT = "neft-neurons"
SCORES_FORMAT = "neft-scores"
FORMAT_VERSION = 1

# Ties between equal scores break by (layer, projection, index); this is the order of projections.
ROLE_ORDER = ("up", "gate", "gate_up", "down", "q", "k", "v", "qkv", "o")

# By the scoring method of the provenance, what its distances are.
_QUANTITIES = {
    "cosine": "1 - cos",
    "gradient": "foretold 1 - cos",
    "activation": "mean |activation|",
    "norm": "1 / (2 |w|²)",
    "probe": "|cos| with a probe",
}

# Neurons that a unit of a feed-forward network has in the projections of a layer.
_NEURONS_PER_UNIT = {"up": 1, "gate": 1, "gate_up": 2, "down": 1}


class Axis(StrEnum):
    """How a projection's neurons lie in its weight, in the convention ``weight[out, in]``."""

    ROW = "row"
    """Neuron *n* is ``weight[n, :]``: what unit *n* reads from the residual stream."""

    COLUMN = "column"
    """Neuron *n* is ``weight[:, n]``: what unit *n* writes to the residual stream."""


@dataclass(frozen=True)
class Projection:
    """One projection matrix and how neurons lie in it."""

    name: str
    """Module name as in ``model.named_modules()``, e.g. ``model.layers.0.mlp.up_proj``."""
    layer: int | None
    """Index of the transformer layer, from 0; ``None`` outside the stack of layers."""
    role: str
    """``up``, ``gate``, ``gate_up``, ``down``, ``q``, ``k``, ``v``, ``qkv``, ``o``, or the module's own
    last name where the architecture table has none."""
    axis: Axis
    num_neurons: int
    vector_length: int
    transposed: bool = False
    """The weight is stored as ``[in, out]`` (transformers' ``Conv1D``) instead of ``[out, in]``."""
    expert: int | None = None
    """Of a mixture whose experts' matrices are stacked in one parameter: which of them, from 0. The
    name is then the parameter's, as in ``model.named_parameters()``, and this number, e.g.
    ``model.layers.0.mlp.experts.down_proj.5``; no module has it."""
    interleaved: bool = False
    """Of ``gate_up``: gates and ups alternate, instead of all gates before all ups."""

    @property
    def parameter(self) -> str:
        """Name of the parameter that holds the weight, as in ``model.named_parameters()``."""
        return f"{self.name}.weight" if self.expert is None else self.name.rpartition(".")[0]

    @property
    def module(self) -> str:
        """Name of the module that has this parameter."""
        return self.parameter.rpartition(".")[0]

    def weight_in(self, parameter: Any) -> Any:
        """The weight, of ``weight_shape``, in the tensor that is ``parameter``: itself, or a view."""
        return parameter if self.expert is None else parameter[self.expert]

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a parameter of ``shape`` has the weight in it."""
        if self.expert is None:
            return tuple(shape) == self.weight_shape
        return tuple(shape[1:]) == self.weight_shape and self.expert < shape[0]

    @property
    def neuron_dim(self) -> int:
        """Dimension of the *stored* weight that counts neurons (0 or 1)."""
        return int((self.axis is Axis.COLUMN) != self.transposed)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the stored weight."""
        if self.neuron_dim == 0:
            return self.num_neurons, self.vector_length
        return self.vector_length, self.num_neurons

    @property
    def order(self) -> tuple[bool, int, int, str, str, int]:
        """Sort key: by layer, then projection, then expert; modules outside the stack come last."""
        rank = ROLE_ORDER.index(self.role) if self.role in ROLE_ORDER else len(ROLE_ORDER)
        layer = self.layer is None, self.layer or 0
        return *layer, rank, self.role, self.parameter, self.expert or 0

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; defaults are left out."""
        fields: dict[str, Any] = {
            "name": self.name,
            "layer": self.layer,
            "role": self.role,
            "axis": str(self.axis),
            "num_neurons": self.num_neurons,
            "vector_length": self.vector_length,
        }
        if self.transposed:
            fields["transposed"] = True
        if self.expert is not None:
            fields["expert"] = self.expert
        if self.interleaved:
            fields["interleaved"] = True
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Projection:
        """The inverse of ``to_dict``; raises ``KeyError``, ``TypeError`` or ``ValueError``."""
        layer, expert = fields["layer"], fields.get("expert")
        projection = cls(
            name=str(fields["name"]),
            layer=None if layer is None else operator.index(layer),
            role=str(fields["role"]),
            axis=Axis(fields["axis"]),
            num_neurons=operator.index(fields["num_neurons"]),
            vector_length=operator.index(fields["vector_length"]),
            transposed=bool(fields.get("transposed", False)),
            expert=None if expert is None else operator.index(expert),
            interleaved=bool(fields.get("interleaved", False)),
        )
        if projection.num_neurons < 1 or projection.vector_length < 1:
            raise ValueError(
                f"{projection.name} has {projection.num_neurons} neurons of length "
                f"{projection.vector_length}"
            )
        if expert is not None and not projection.name.endswith(f".{expert}"):
            raise ValueError(
                f"{projection.name} is said to be of expert {expert}, which its name lacks"
            )
        return projection


def _by_name(projections: Iterable[Projection]) -> dict[str, Projection]:
    """Projections by module name, in canonical order; the same name twice must mean the same matrix."""
    table: dict[str, Projection] = {}
    for projection in sorted(projections, key=lambda p: p.order):
        known = table.setdefault(projection.name, projection)
        if known != projection:
            raise NeuronError(
                f"{projection.name}: two different descriptions of one projection ({known} and "
                f"{projection}). These neurons were made for different models."
            )
    return table


def _checked_indices(projection: Projection, indices: npt.ArrayLike) -> Indices:
    try:
        array = np.asarray(indices)
    except ValueError as error:
        raise NeuronError(f"{projection.name}: neuron indices are no list: {error}.") from error
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise NeuronError(
            f"{projection.name}: neuron indices must be a one-dimensional list of whole numbers, "
            f"got {array.dtype} of shape {array.shape}."
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= projection.num_neurons:
        raise NeuronError(
            f"{projection.name}: neuron index {low if low < 0 else high} is outside "
            f"0..{projection.num_neurons - 1}; this projection has {projection.num_neurons} neurons."
        )
    return np.unique(array.astype(np.int64))


class NeuronSet:
    """Chosen neurons of one model: module name -> sorted unique indices.

    A set also knows the projections it was chosen from (``projections``, which may include some with
    no chosen neuron) and where it comes from (``provenance``, plain JSON values). Two sets are equal
    when they hold the same neurons of the same projections, whatever their provenance.

    Args:
        projections: the candidates, in any order.
        indices: module name -> indices, each in ``0..num_neurons - 1``; repeats are dropped.
        provenance: base model, scoring method, budget, versions: plain JSON values.

    Raises:
        NeuronError: an index out of range, or a module that is not among ``projections``.
    """

    def __init__(
        self,
        projections: Iterable[Projection],
        indices: Mapping[str, npt.ArrayLike],
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.projections: dict[str, Projection] = _by_name(projections)
        unknown = sorted(set(indices) - set(self.projections))
        if unknown:
            raise NeuronError(
                f"{unknown[0]}: not among the {len(self.projections)} projections of this model "
                f"(e.g. {next(iter(self.projections), 'none')}). Use names as in model.named_modules()."
            )
        self._indices = {
            name: chosen
            for name, projection in self.projections.items()
            if name in indices and (chosen := _checked_indices(projection, indices[name])).size
        }
        self.provenance: dict[str, Any] = dict(provenance or {})

    def __len__(self) -> int:
        """Number of neurons."""
        return sum(chosen.size for chosen in self._indices.values())

    def __getitem__(self, name: str) -> Indices:
        """Indices chosen in module ``name``, sorted; empty if there are none."""
        return self._indices.get(name, np.empty(0, dtype=np.int64))

    def __contains__(self, name: object) -> bool:
        """Whether any neuron of module ``name`` is chosen."""
        return name in self._indices

    def modules(self) -> list[str]:
        """Names of the modules that have a chosen neuron, by layer."""
        return list(self._indices)

    @cached_property
    def by_module(self) -> Mapping[str, Sequence[Projection]]:
        """The projections that have a chosen neuron, by the module that has their parameter."""
        table: dict[str, list[Projection]] = {}
        for name in self._indices:
            projection = self.projections[name]
            table.setdefault(projection.module, []).append(projection)
        return table

    def items(self) -> Iterator[tuple[str, Indices]]:
        """(module name, sorted indices) of every module that has a chosen neuron, by layer."""
        yield from self._indices.items()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NeuronSet):
            return NotImplemented
        return self._indices.keys() == other._indices.keys() and all(
            self.projections[name] == other.projections[name]
            and np.array_equal(chosen, other._indices[name])
            for name, chosen in self._indices.items()
        )

    # Sets hold arrays and provenance that a caller may edit.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"NeuronSet({len(self):,} neurons in {len(self._indices)} projections, "
            f"{self.num_parameters:,} parameters)"
        )

    @property
    def num_parameters(self) -> int:
        """Number of scalars in the chosen vectors."""
        return sum(
            chosen.size * self.projections[name].vector_length
            for name, chosen in self._indices.items()
        )

    @property
    def num_candidates(self) -> int:
        """Number of neurons that could have been chosen."""
        return sum(projection.num_neurons for projection in self.projections.values())

    def percent_of(self, total_parameters: int) -> float:
        """Chosen scalars in percent of ``total_parameters`` (the paper's NeFT_x%)."""
        if total_parameters <= 0:
            raise NeuronError(f"total_parameters must be positive, got {total_parameters}.")
        return 100.0 * self.num_parameters / total_parameters

    def counts_by_layer(self) -> dict[int | None, int]:
        """Number of chosen neurons of every layer that has candidates."""
        counts: dict[int | None, int] = {}
        for name, projection in self.projections.items():
            counts[projection.layer] = counts.get(projection.layer, 0) + self[name].size
        return counts

    def counts_by_role(self) -> dict[str, int]:
        """Number of chosen neurons of every role that has candidates."""
        counts: dict[str, int] = {}
        for name, projection in self.projections.items():
            counts[projection.role] = counts.get(projection.role, 0) + self[name].size
        return counts

    def _combined(
        self, other: NeuronSet, operation: str, symbol: str, names: Iterable[str]
    ) -> NeuronSet:
        combine = getattr(np, operation)
        return NeuronSet(
            [*self.projections.values(), *other.projections.values()],
            {name: combine(self[name], other[name]) for name in names},
            {"operation": symbol, "left": self.provenance, "right": other.provenance},
        )

    def __or__(self, other: NeuronSet) -> NeuronSet:
        """Neurons of either set."""
        names = self._indices.keys() | other._indices.keys()
        return self._combined(other, "union1d", "|", names)

    def __and__(self, other: NeuronSet) -> NeuronSet:
        """Neurons of both sets."""
        names = self._indices.keys() & other._indices.keys()
        return self._combined(other, "intersect1d", "&", names)

    def __sub__(self, other: NeuronSet) -> NeuronSet:
        """Neurons of this set that are not in the other."""
        return self._combined(other, "setdiff1d", "-", self._indices.keys())

    def overlap(self, other: NeuronSet) -> float:
        """Share of this set that the other holds too, ``|A & B| / |A|`` in 0..1 (paper, Table 5)."""
        if not len(self):
            raise NeuronError("The overlap of an empty neuron set with another is not defined.")
        return len(self & other) / len(self)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values: a readable header, and one bitmap a projection, base64."""
        return {
            "format": NEURONS_FORMAT,
            "version": FORMAT_VERSION,
            "num_neurons": len(self),
            "num_parameters": self.num_parameters,
            "provenance": self.provenance,
            "projections": [
                projection.to_dict()
                | {
                    "chosen": int(self[name].size),
                    "bitmap": _to_bitmap(self[name], projection.num_neurons),
                }
                for name, projection in self.projections.items()
            ],
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], where: str = "neuron set") -> NeuronSet:
        """The inverse of ``to_dict``; ``where`` names the source in errors."""
        if fields.get("format") != NEURONS_FORMAT:
            raise NeuronError(
                f"{where}: not a neuron set (format is {fields.get('format')!r}, "
                f"expected {NEURONS_FORMAT!r})."
            )
        if fields.get("version") != FORMAT_VERSION:
            raise NeuronError(
                f"{where}: version {fields.get('version')!r} of the neuron set format is unknown to "
                f"this release, which reads version {FORMAT_VERSION}. Upgrade neft."
            )
        with _faults_named(where, "neuron set"):
            projections: list[Projection] = []
            indices: dict[str, Indices] = {}
            for entry in fields["projections"]:
                projection = Projection.from_dict(entry)
                if projection.name in indices:
                    raise NeuronError(f"{projection.name}: listed twice.")
                projections.append(projection)
                indices[projection.name] = _from_bitmap(entry["bitmap"], projection)
                if indices[projection.name].size != entry["chosen"]:
                    raise NeuronError(
                        f"{projection.name}: the bitmap holds {indices[projection.name].size} neurons, "
                        f"the header says {entry['chosen']}."
                    )
            return cls(projections, indices, fields["provenance"])

    def save(self, path: PathLike) -> None:
        """Write one JSON file, atomically: the header indented, each projection on one line."""
        fields = self.to_dict()
        projections = fields.pop("projections")
        header = json.dumps(fields, indent=2, ensure_ascii=False).removesuffix("\n}")
        lines = ",\n".join("    " + json.dumps(entry, ensure_ascii=False) for entry in projections)
        write_text(path, f'{header},\n  "projections": [\n{lines}\n  ]\n}}\n')

    @classmethod
    def load(cls, path: PathLike) -> NeuronSet:
        """Read a file that ``save`` wrote; raises ``NeuronError`` that names the file and the fault."""
        return cls.from_dict(_read_json_object(path), where=str(path))

    @classmethod
    def from_authors_json(
        cls, source: PathLike | Mapping[str, Iterable[int]], projections: Iterable[Projection]
    ) -> NeuronSet:
        """Import the selection format of the paper's research code.

        Args:
            source: a file or mapping ``{"<layer>_in": [indices], "<layer>_out": [indices], ...}``;
                *in* are rows of the up projection, *out* are columns of the down projection.
            projections: the model's projections (see ``find_projections``).
        """
        where = "selection" if isinstance(source, Mapping) else str(source)
        selection = source if isinstance(source, Mapping) else _read_json_object(source)
        projections = sorted(projections, key=lambda projection: projection.order)
        names = {
            key: projection.name for projection in projections if (key := _authors_key(projection))
        }
        unknown = sorted(set(selection) - set(names))
        if unknown:
            keys = list(names)
            known = f"{keys[0]} to {keys[-1]}" if keys else "none"
            raise NeuronError(
                f"{where}: {unknown[0]!r} names no up or down projection of this model ({known})."
            )
        with _faults_named(where, "selection"):
            indices = {names[key]: list(chosen) for key, chosen in selection.items()}
            return cls(projections, indices, {"method": "imported", "source": where})

    def to_authors_json(self) -> dict[str, list[int]]:
        """Export as ``{"<layer>_in": [...], "<layer>_out": [...]}``; up and down projections only."""
        exported: dict[str, list[int]] = {}
        for name, projection in self.projections.items():
            if key := _authors_key(projection):
                exported[key] = self[name].tolist()
            elif name in self:
                raise NeuronError(
                    f"{name}: the authors' format holds up and down projections only, "
                    f"this one is {_described(projection)}."
                )
        return exported


_AUTHORS_SIDES = {"up": "in", "down": "out"}


def _authors_key(projection: Projection) -> str | None:
    """The research code's name of a projection, if it has one."""
    if (
        projection.layer is None
        or projection.expert is not None
        or projection.role not in _AUTHORS_SIDES
    ):
        return None
    return f"{projection.layer}_{_AUTHORS_SIDES[projection.role]}"


def _described(projection: Projection) -> str:
    of_expert = "" if projection.expert is None else f" of expert {projection.expert}"
    return f"{projection.role!r}{of_expert}"


@contextmanager
def _faults_named(where: str, kind: str) -> Iterator[None]:
    """Turn what is wrong with the content of ``where`` into a ``NeuronError`` that names it."""
    try:
        yield
    except NeuronError as error:
        raise NeuronError(f"{where}: {error}") from error
    except KeyError as error:
        raise NeuronError(f"{where}: malformed {kind}: the field {error} is missing.") from error
    except (TypeError, ValueError) as error:
        raise NeuronError(f"{where}: malformed {kind}: {error}.") from error


def _to_bitmap(indices: Indices, num_neurons: int) -> str:
    mask = np.zeros(num_neurons, dtype=bool)
    mask[indices] = True
    return base64.b64encode(np.packbits(mask).tobytes()).decode("ascii")


def _from_bitmap(bitmap: str, projection: Projection) -> Indices:
    try:
        packed = np.frombuffer(base64.b64decode(bitmap, validate=True), dtype=np.uint8)
    except binascii.Error as error:
        raise NeuronError(f"{projection.name}: the bitmap is not base64: {error}.") from error
    if packed.size != math.ceil(projection.num_neurons / 8):
        raise NeuronError(
            f"{projection.name}: the bitmap has {packed.size} bytes, "
            f"{projection.num_neurons} neurons need {math.ceil(projection.num_neurons / 8)}."
        )
    mask = np.unpackbits(packed)
    if mask[projection.num_neurons :].any():
        raise NeuronError(f"{projection.name}: the bitmap marks neurons beyond the last.")
    return np.flatnonzero(mask).astype(np.int64)


def _read_json_object(path: PathLike) -> dict[str, Any]:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise NeuronError(f"{path}: cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise NeuronError(f"{path}: not a JSON file: {error}.") from error
    if not isinstance(value, dict):
        raise NeuronError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


class NeuronScores:
    """How far every neuron of the scored projections moved, or what stands for that.

    The score of the paper is the cosine similarity S(i, n) of a neuron before and after (Algorithm 1).
    Scores crowd 1, so what is held is the *distance* ``1 - cos`` in float64, computed without
    cancellation: a **low score is a large distance**. Other methods of scoring rank by other quantities
    (see ``quantity``), likewise the larger the sooner.

    Args:
        projections: what was scored.
        distances: module name -> float64 ``[num_neurons]``, finite; of cosines in 0..2.
        total_parameters: parameters of the whole model; percents refer to it.
        provenance: models, method, versions: plain JSON values.
    """

    def __init__(
        self,
        projections: Iterable[Projection],
        distances: Mapping[str, npt.ArrayLike],
        total_parameters: int,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.projections: dict[str, Projection] = _by_name(projections)
        if not self.projections:
            raise NeuronError("There are no projections, so there is nothing to choose from.")
        if unknown := sorted(set(distances) - set(self.projections)):
            raise NeuronError(f"{unknown[0]}: has scores, but is not among the projections.")
        if total_parameters < 1:
            raise NeuronError(f"total_parameters must be positive, got {total_parameters}.")
        self.distances: dict[str, npt.NDArray[np.float64]] = {}
        for name, projection in self.projections.items():
            if name not in distances:
                raise NeuronError(f"{name}: has no scores.")
            # safetensors writes the memory of an array, whatever its strides.
            values = np.ascontiguousarray(distances[name], dtype=np.float64)
            if values.shape != (projection.num_neurons,):
                raise NeuronError(
                    f"{name}: scores of shape {values.shape}, expected ({projection.num_neurons},)."
                )
            if not np.isfinite(values).all():
                worst = int(np.flatnonzero(~np.isfinite(values))[0])
                raise NeuronError(f"{name}: the score of neuron {worst} is {values[worst]}.")
            self.distances[name] = values
        self.total_parameters = total_parameters
        self.provenance: dict[str, Any] = dict(provenance or {})

    def __len__(self) -> int:
        """Number of scored neurons."""
        return sum(projection.num_neurons for projection in self.projections.values())

    def __repr__(self) -> str:
        return f"NeuronScores({len(self):,} neurons in {len(self.projections)} projections)"

    def cosine(self, name: str) -> npt.NDArray[np.float64]:
        """S(i, n) of module ``name``, float64 ``[num_neurons]``; see ``distances`` for full precision.

        Raises:
            NeuronError: the scores are of another method.
        """
        if (method := self.provenance.get("method", "cosine")) != "cosine":
            raise NeuronError(
                f"{name}: was scored by {method}, so its distances are {self.quantity}, and there is no "
                "cosine. Use distances."
            )
        return 1.0 - self.distances[name]

    @property
    def quantity(self) -> str:
        """What the distances are."""
        return _QUANTITIES.get(self.provenance.get("method", ""), "distance")

    @property
    def max_percent(self) -> float:
        """The largest budget that the scored projections can hold, in percent of all parameters."""
        held = sum(p.num_neurons * p.vector_length for p in self.projections.values())
        return 100.0 * held / self.total_parameters

    def lowest(self, count: int) -> NeuronSet:
        """The ``count`` neurons with the lowest cosine: the sensitive neurons."""
        return self.select(count=count, which="lowest")

    def highest(self, count: int) -> NeuronSet:
        """The ``count`` neurons with the highest cosine (the paper's *Reversed*)."""
        return self.select(count=count, which="highest")

    def select(
        self,
        *,
        percent: float | None = None,
        count: int | None = None,
        megabytes: float | None = None,
        which: Which = "lowest",
        seed: int = 0,
        rule: Rule = "paper",
        floor: float = 50.0,
        above_rounding: bool = False,
    ) -> NeuronSet:
        """Choose as many neurons as a budget buys; give one of ``percent``, ``count``, ``megabytes``.

        Args:
            percent: budget in percent of all parameters of the model, above 0 and up to
                ``max_percent``.
            count: exact number of neurons, 0 to all.
            megabytes: size of the vectors in an adapter's file: float32, 1 MB = 10^6 bytes.
            which: ``lowest`` or ``highest`` cosine, or ``random`` (the control).
            seed: for ``random`` only, in 0..2**32 - 1.
            rule: ``paper``: one ranking over all layers and projections. ``even``: the budget is dealt
                evenly to the layers; what one cannot hold goes to the others. ``floor``: each layer gets
                a part of its even share, and the one ranking decides about the rest. ``units``: the
                neurons of a feed-forward unit, in those of its up, gate and down projections that were
                scored, are chosen together, by their mean distance.
            floor: for the rule ``floor`` only: that part in percent, above 0 and up to 100, rounded down
                to whole neurons.
            above_rounding: leave out neurons that moved no more than rounding to 16 bits moves them,
                where the scores' provenance says how much that is, and units with such a neuron.

        Returns:
            Exactly the budget; ties break by (layer, projection, index), for units by (layer, unit).

        Raises:
            NeuronError: a budget that is none, that the scored projections cannot hold, or that whole
                units cannot make; with the rule ``units``, neurons that belong to none.
        """
        budget = Budget.given(percent, count, megabytes, self.total_parameters)
        seed, floor = plain_number("seed", seed), plain_number("floor", floor)
        preference = Preference(which, seed, rule, floor)
        positions = choose(self._candidates(rule, above_rounding), budget, preference)
        given = budget.value if budget.name == "percent" else None
        selection = {"which": which, "percent": given, "count": positions.size}
        if budget.name == "megabytes":
            selection["megabytes"] = budget.value
        if above_rounding:
            selection["above_rounding"] = True
        selection |= preference.to_dict()
        return self._chosen(positions, self.provenance | {"selection": selection})

    def _candidates(self, rule: Rule, above_rounding: bool) -> Candidates:
        projections = self.projections.values()
        numbers = {layer: n for n, layer in enumerate(dict.fromkeys(p.layer for p in projections))}
        sizes = [p.num_neurons for p in projections]
        rounding = self.provenance.get("rounding") if above_rounding else None
        return Candidates(
            distances=np.concatenate([*self.distances.values()]),
            lengths=np.repeat([p.vector_length for p in projections], sizes),
            layers=np.repeat([numbers[p.layer] for p in projections], sizes),
            groups=_unit_numbers(projections) if rule == "units" else np.arange(len(self)),
            rounding_floor=None if rounding is None else rounding["floor"],
        )

    def _chosen(self, positions: Indices, provenance: Mapping[str, Any]) -> NeuronSet:
        indices: dict[str, Indices] = {}
        start = 0
        for name, projection in self.projections.items():
            end = start + projection.num_neurons
            inside = positions[np.searchsorted(positions, start) : np.searchsorted(positions, end)]
            indices[name] = inside - start
            start = end
        return NeuronSet(self.projections.values(), indices, provenance)

    def save(self, path: PathLike) -> None:
        """Write one safetensors file (a float64 tensor a module, and metadata), atomically."""
        from safetensors.numpy import save_file

        header = {
            "version": FORMAT_VERSION,
            "total_parameters": self.total_parameters,
            "projections": [projection.to_dict() for projection in self.projections.values()],
            "provenance": self.provenance,
        }
        # safetensors writes several metadata entries in random order; with one, equal scores make
        # equal files.
        metadata = {SCORES_FORMAT: json.dumps(header, ensure_ascii=False)}
        with replaced_atomically(path) as part:
            save_file(self.distances, part, metadata)

    @classmethod
    def load(cls, path: PathLike) -> NeuronScores:
        """Read a file that ``save`` wrote; raises ``NeuronError`` that names the file and the fault."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise NeuronError(f"{path}: no such file.")
        with _faults_named(str(path), "scores file"):
            try:
                with safe_open(path, framework="numpy") as file:
                    header = _scores_header(file.metadata() or {})
                    projections = [Projection.from_dict(entry) for entry in header["projections"]]
                    distances = {p.name: file.get_tensor(p.name) for p in projections}
            except (SafetensorError, OSError) as error:
                raise NeuronError(f"not a readable scores file: {error}.") from error
            return cls(projections, distances, header["total_parameters"], header["provenance"])


def _unit_numbers(projections: Iterable[Projection]) -> Indices:
    """Which unit of the model each neuron belongs to; projections in canonical order."""
    numbers: list[Indices] = []
    units: dict[tuple[int | None, int | None], range] = {}
    seen: set[tuple[int | None, int | None, str]] = set()
    num_before = 0
    for projection in projections:
        role = projection.role
        if role not in _NEURONS_PER_UNIT:
            raise NeuronError(
                f"{projection.name}: its neurons belong to no feed-forward unit, so the rule 'units' "
                "cannot choose among them. Score up, gate and down projections alone, or take another "
                "rule."
            )
        per_unit = _NEURONS_PER_UNIT[role]
        num_units, rest = divmod(projection.num_neurons, per_unit)
        # Each expert is a feed-forward network of its own.
        network = projection.layer, projection.expert
        if network not in units:
            units[network] = range(num_before, num_before + num_units)
            num_before += num_units
        if rest or num_units != len(units[network]) or (*network, role) in seen:
            raise NeuronError(
                f"{projection.name}: its {projection.num_neurons} neurons do not pair with the "
                f"{len(units[network])} units of the layer's other projections, so the rule 'units' "
                "cannot choose among them. Take another rule."
            )
        seen.add((*network, role))
        # A fused projection has the rows of all units' gates, then those of all ups, or each unit's two
        # together.
        repeat = np.repeat if projection.interleaved else np.tile
        numbers.append(repeat(np.array(units[network]), per_unit))
    return np.concatenate(numbers)


def _scores_header(metadata: Mapping[str, str]) -> dict[str, Any]:
    if SCORES_FORMAT not in metadata:
        raise NeuronError(f"not a scores file (its metadata has no {SCORES_FORMAT!r}).")
    header: dict[str, Any] = json.loads(metadata[SCORES_FORMAT])
    if header["version"] != FORMAT_VERSION:
        raise NeuronError(
            f"version {header['version']!r} of the scores format is unknown to this release, which "
            f"reads version {FORMAT_VERSION}. Upgrade neft."
        )
    return header
