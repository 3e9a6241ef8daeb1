"""What a method is: a view of a group of experts goes in, bytes for each matrix come out, and back.

A method sees arrays and keys, never a checkpoint or a module. One method is one file, one class and
one id. It says

    encode   a GroupView -> an Encoding: a payload for each matrix, and whatever parts they share
    decode   a matrix's payload, and the parts that it uses -> the weights

and nothing else: framing and checksums (`blob.py`), decoding again, measuring and every check are
done around it (`artifact.py`). docs/add-a-method.md is a complete example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, Literal, Self

import numpy as np

from moebound.checkpoint import Role
from moebound.codec import Certificate, Encoded, Envelope
from moebound.errors import MethodError
from moebound.extras import check
from moebound.files.formats.statistics import Side
from moebound.methods.blob import MatrixBlob
from moebound.methods.geometry import Geometry
from moebound.methods.router_edit import RouterEdit
from moebound.types import NUMPY_DTYPES, Array, DType, ErrorBound, ExpertKey

Scope = Literal["expert", "layer"]
"""Which experts a method sees at a time: one, or all of a layer (or of a plan's group in it)."""


@dataclass(frozen=True, eq=False)
class ExpertView:
    """One expert. matrices: by role, [rows, cols], C-contiguous, BF16, F16 or F32, as the
    checkpoint has them ("gate_up" where it keeps both in one). bounds: of each, None where none
    was given; one of scope "expert" is relative to all of them together. transposed: roles that the
    checkpoint has as [in, out]; the others are [out, in]. interleaved: whether gate and up, where
    they are in one matrix, take turns; else all of gate comes first. outputs: which of the outputs
    of the checkpoint's matrix are seen, by role; all where nothing is said."""

    key: ExpertKey
    matrices: Mapping[Role, Array]
    bounds: Mapping[Role, ErrorBound] | None = None
    transposed: frozenset[Role] = frozenset()
    interleaved: bool = False
    outputs: Mapping[Role, slice] = field(default_factory=dict)


@dataclass(frozen=True)
class Routing:
    """How a layer's router chooses. n_experts: of the layer. top_k: experts a token. groups: into
    which the router divides them, one behind the other; chosen_groups: from how many of these it
    takes a token's experts."""

    n_experts: int
    top_k: int = 1
    groups: int = 1
    chosen_groups: int = 1


@dataclass(frozen=True, eq=False)
class Seen:
    """What one expert saw of a text, as it was summed up. moments: H of either side."""

    tokens: int
    moments: Mapping[Side, Array]


@dataclass(frozen=True, eq=False)
class GroupView:
    """The experts that a method sees at once, all of one layer.

    statistics: by the names that the method asks for, each by expert. seen: what outputs are
    certified by; of no expert where they are not to be. routing: of the layer; None where nobody
    said, and these are all of its experts. moved: statistics that its coder asks for, of the model
    as the method leaves it; none where nobody gathered any.
    """

    experts: tuple[ExpertView, ...]
    statistics: Mapping[str, Mapping[ExpertKey, Array]] = field(default_factory=dict)
    seen: Mapping[ExpertKey, Seen] = field(default_factory=dict)
    routing: Routing | None = None
    moved: Mapping[str, Mapping[ExpertKey, Array]] = field(default_factory=dict)

    def coded_by(self, names: Collection[str]) -> dict[str, Mapping[ExpertKey, Array]]:
        """The statistics that what is kept is coded by."""
        return {name: (self.moved or self.statistics)[name] for name in names}

    @property
    def layer(self) -> int:
        return self.experts[0].key.layer


@dataclass(frozen=True)
class Payload:
    """One matrix, encoded. uses: numbers of the shared parts that decoding it needs.

    promise: the bound that every weight keeps after the cast, None where nothing is promised;
    abs_bound: the same in weight units. Both are checked. patched: weights stored verbatim.
    """

    data: bytes
    uses: tuple[int, ...] = ()
    promise: ErrorBound | None = None
    abs_bound: float | None = None
    patched: int = 0


@dataclass(frozen=True)
class SharedPayload:
    """A part that several matrices need, encoded. held_bytes: memory that it takes while it is
    open (`Method.open_shared`); what an expert cache reckons with."""

    data: bytes
    held_bytes: int


@dataclass(frozen=True, eq=False)
class MatrixArtifact:
    """One matrix. data: a blob or an envelope. decoded: the weights it decodes to, [rows, cols] in
    the dtype that the model will use. certificate: what was promised and measured. uses: numbers of
    the shared parts it needs."""

    data: bytes
    decoded: Array
    certificate: Certificate
    uses: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Encoding:
    """What a method makes of a group.

    matrices: of every expert, every role. An `Encoded` (an envelope of a codec) is taken as it is,
    with its certificate; so is a `MatrixArtifact`, which the method's `coder` made. shared:
    `n_parts` of them. router: what becomes of the routing; an expert that is an alias decodes to
    its target's weights, whatever its own payload is. geometry: what each expert's second moments
    said, of methods that round by them.
    """

    matrices: Mapping[ExpertKey, Mapping[Role, Payload | Encoded | MatrixArtifact]]
    shared: Sequence[SharedPayload] = ()
    router: RouterEdit | None = None
    geometry: Mapping[ExpertKey, Mapping[Side, Geometry]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ColumnBounds:
    """Of a matrix that has one for each input channel. steps: [N] float32, between the points that
    it is rounded to. half_steps: κ/2; no weight of channel j is off by more than ε_j, so many of
    its steps. transposed: whether the matrix is [in, out]. factors: [O] float32, at most 1, by
    which both are narrower in each row of [out, in]; None for none."""

    steps: Array
    half_steps: float
    transposed: bool
    factors: Array | None = None

    @property
    def epsilon(self) -> Array:
        """[N] float64, before any factor."""
        return self.steps.astype(np.float64) * self.half_steps

    def of_weights(self) -> Array:
        """Each weight's own, float64: [1, N] or [N, 1], or the matrix's shape where there are
        factors. A weight's step is the float32 product that decoding multiplies by: the product
        itself may be less by its rounding."""
        if self.factors is None:
            own = self.epsilon[None]
        else:
            own = (self.steps * self.factors[:, None]).astype(np.float64) * self.half_steps
        return own.T if self.transposed else own

    @property
    def ends(self) -> tuple[float, float]:
        """The narrowest and the widest of the weights' own."""
        factors = np.ones(1, np.float32) if self.factors is None else self.factors
        least, most = self.steps.min() * factors.min(), self.steps.max() * factors.max()
        return float(least) * self.half_steps, float(most) * self.half_steps


@dataclass(frozen=True)
class MatrixSpec:
    """What both ends know about one matrix: its shape, and the dtype the model will use."""

    shape: tuple[int, ...]
    dtype: DType

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Of the weights."""
        return self.size * NUMPY_DTYPES[self.dtype].itemsize


class Method(ABC):
    """One way to make experts smaller.

    id: names the payloads' format, for ever. [a-z0-9_]+
    version: of the payloads; the decoder takes this and every earlier one.
    scope: what `encode` sees at a time. lossless: whether every weight comes back bit for bit,
        which is then checked. What is no `Encoded`, not lossless, and promises nothing
        (`Payload.promise`) has the guarantee "none".
    takes_bound, needs_bound: whether a bound may, or must, be given.
    statistics: names of those that `encode` needs.
    edits_router: whether an Encoding may have a router edit.
    merges: whether what its coder gets are other weights than the experts', so that nothing that
        the coder promises holds for them.
    keeps: whether it leaves something of a model out, and a coder for the rest may stand behind
        a + in its setting.
    """

    id: ClassVar[str]
    version: ClassVar[int] = 1
    scope: ClassVar[Scope] = "expert"
    lossless: ClassVar[bool] = False
    takes_bound: ClassVar[bool] = False
    statistics: ClassVar[frozenset[str]] = frozenset()
    edits_router: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    keeps: ClassVar[bool] = False

    @classmethod
    def from_options(cls, options: str) -> Self:
        """The method set up from what follows its id and a colon, as in ``rtn:int4:g64``.

        Options steer the encoder only: payloads decode without them. Raises MethodError.
        """
        if options:
            raise MethodError(f"method {cls.id!r} takes no options, found {options!r}")
        return cls()

    @property
    def setting(self) -> str:
        """What `get_method` makes this method of: its id, and its options behind a colon."""
        return self.id

    @property
    def coder(self) -> Method | None:
        """The method that codes what this one keeps; None for one that does it itself."""
        return None

    @property
    def bounded(self) -> bool:
        """Whether a bound may be given to it, or to its coder."""
        return self.takes_bound if self.coder is None else self.coder.bounded

    def wanted_statistics(self, *, shared: bool = False) -> frozenset[str]:
        """Those that it and its coder need; of shared experts, which a coder alone sees, the
        coder's."""
        if self.coder is None:
            return self.statistics
        return self.coder.wanted_statistics() | (frozenset() if shared else self.statistics)

    @property
    def needs_bound(self) -> bool:
        return self.coder is not None and self.coder.needs_bound

    @property
    def needs(self) -> tuple[str, ...]:
        """Modules of `extras.PACKAGES` that encoding cannot do without."""
        return () if self.coder is None else self.coder.needs

    def check_installed(self) -> None:
        """Make sure that the library behind it is there, before long work that will need it.

        Raises BackendUnavailable with the command that installs it.
        """
        check(f"method {self.setting}", *self.needs)

    @property
    def versions(self) -> tuple[int, ...]:
        """Of everything whose bytes `encode` writes."""
        return (self.version, *(() if self.coder is None else self.coder.versions))

    def n_shared(self, roles: Sequence[Role]) -> int:
        """How many shared parts a group has, of experts with these matrices. Known beforehand, so
        that a store can leave room for their names."""
        return 0

    def n_parts(self, roles: Sequence[Role], n_experts: int) -> int:
        """As `n_shared`, which it asks, for a method whose parts are more in a larger group."""
        return self.n_shared(roles)

    @abstractmethod
    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        """Payloads for every matrix of the group. The same for the same group, on any number of
        threads. Raises MethodError for what it cannot take."""

    @classmethod
    @abstractmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        """The weights, of spec.shape, in any float dtype (they are cast to spec.dtype).

        shared: the parts that the payload uses, in its order, as `open_shared` gave them. Raises
        CorruptionError on bytes that `encode` cannot have made.
        """

    @classmethod
    def open_shared(cls, payload: memoryview) -> Any:
        """A shared part, ready to decode with. Called once for many matrices."""
        return payload

    @classmethod
    def verbatim(cls, payload: memoryview, spec: MatrixSpec) -> int:
        """How many weights of a payload are stored as they were (`Payload.patched`). Raises as
        `decode`."""
        return 0

    def column_bounds(self, found: MatrixBlob | Envelope) -> ColumnBounds | None:
        """The bounds by input channel of what `encode` made; None without such. Asked of methods
        with statistics. Raises as `decode`."""
        return None

    @classmethod
    def most_weights(cls, n_bytes: int) -> int:
        """How many weights a payload of n_bytes can stand for at most, whoever made it.

        Checked before memory for a forged shape is asked for. The default says 2^20 a byte.
        """
        return (n_bytes + 1) << 20

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.setting!r})"
