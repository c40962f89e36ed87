"""What a method may learn of a cohort: named means, and who computes them.

A method says which means it needs; an averager computes them from the uploads. So robust
weights, clipping with noise or secure aggregation are averagers, and need no change in a method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Literal

from flexlora.errors import ConfigError
from flexlora.lowrank import Factors, LowRankSum
from flexlora.method.interface import Method, RoundContext, Upload
from flexlora.method.truncation import Weighted

if TYPE_CHECKING:
    from flexlora.method.client_changes import Changes

Weights = Literal["examples", "uniform", "norms"]
"""How clients are weighted: by their examples, equally, or by the norm of their update."""


class Mean(StrEnum):
    """The means over a cohort, ``p_k`` being client k's weight; all weights add up to 1."""

    PRODUCTS = "mean of products"
    """``sum_k p_k B_k A_k``."""
    PRODUCTS_BY_COMPONENT = "mean of products by component"
    """``sum_k sum_j p_kj B_k[:, j] A_k[j]``, p_kj the weight among the clients that have j."""
    FACTORS = "mean of factors"
    """``sum_k p_k B_k`` and ``sum_k p_k A_k``; all of one rank."""
    PADDED_FACTORS = "mean of zero-padded factors"
    """The same, at unequal ranks: a component that a client lacks counts as zero."""
    FACTORS_BY_COMPONENT = "mean of factors by component"
    """Each column of ``B`` and row of ``A`` averaged over the clients that have it."""
    NUMBERED_COMPONENTS = "mean of numbered components"
    """The same of the components that uploads number in ``component_ids``."""
    NUMBERED_CHANGES = "mean of numbered changes"
    """The mean over all clients; a component that an upload does not number counts as zero."""
    AUX_FACTORS = "mean of the adapters beside an upload"
    """``FACTORS`` of ``Upload.aux``."""
    UPLOADS = "single uploads"
    """No mean: the method reads every upload itself."""


class Cohort(ABC):
    """The means over one round's uploads. All are in float64, computed when they are asked for.

    A ``last`` is the server's value before the round: it stays where no client has a component.
    """

    @property
    @abstractmethod
    def weights(self) -> Mapping[str, float]:
        """The weight of every client whose upload counts, in cohort order.

        Before they are divided by their sum.
        """

    @abstractmethod
    def ranks(self, module: str) -> dict[str, int]:
        """The rank of this module in the upload of every client that trains it."""

    @abstractmethod
    def products(self, module: str, rank: int | None = None) -> LowRankSum:
        """The mean of products, as a sum of low rank.

        An averager that recovers the mean from sketches recovers its leading ``rank``
        components; others ignore ``rank``.
        """

    def product_terms(self, module: str, rank: int | None = None) -> Iterable[Weighted]:
        """The terms of ``products``, to be gone through once.

        Where uploads are on the disk, each term is read when it is its turn, so that the memory
        does not grow with the cohort.
        """
        return self.products(module, rank).terms

    @abstractmethod
    def products_by_component(self, module: str) -> LowRankSum:
        """The mean of products, each component's over the clients that have it."""

    @abstractmethod
    def factors(self, module: str) -> Factors:
        """The mean of ``B`` and of ``A``. Its product is not the mean of the products."""

    @abstractmethod
    def padded_factors(self, module: str, last: Factors) -> Factors:
        """The mean of ``B`` and of ``A``, padded with zeros to one rank."""

    @abstractmethod
    def factors_by_component(self, module: str, last: Factors) -> Factors:
        """The mean of each component's two vectors over the clients that have it."""

    @abstractmethod
    def numbered_components(self, module: str, last: Factors) -> Factors:
        """The mean of each numbered component's two vectors over the clients that have it."""

    @abstractmethod
    def numbered_changes(self, module: str, last: Factors, sketched: bool = False) -> Factors:
        """``last`` plus the mean change of each numbered component's two vectors.

        With ``sketched`` a change of rank r counts r / ``last.rank`` in ``B``, where clients
        trained ``B`` times the inverse of that.
        """

    @abstractmethod
    def aux_factors(self, name: str, module: str) -> Factors:
        """``factors`` of the adapters of this name that travel beside the uploads."""

    @property
    @abstractmethod
    def uploads(self) -> Sequence[Upload]:
        """The uploads themselves, in cohort order."""

    @abstractmethod
    def only(self, modules: Collection[str]) -> Cohort | None:
        """The clients that train one of these modules, and these modules of their uploads.

        None where there is no such client.
        """

    def limited(self, most_share: float) -> Cohort:
        """The same means with no client above this share of the weights; see ``most_of``.

        Raises:
            ConfigError: these means have no weights that can be lowered.
        """
        if most_share < 1:
            raise ConfigError(
                f"A {type(self).__name__} cannot limit the share of a client, and "
                f"federation.most_share is {most_share:g}; set it to 1, or use another averager."
            )
        return self

    @property
    def clients(self) -> list[str]:
        """The clients whose uploads count, in cohort order."""
        return list(self.weights)

    @property
    def scores(self) -> Mapping[str, float]:
        """What an averager that compares clients judged each of them by, for the journal."""
        return {}


class Averager(ABC):
    """How the means over a cohort are computed: the plug-in.

    A kind is a frozen dataclass whose fields are its options. Weights by client do not bound
    what one client does to a component that no other client has: its weight cancels there.
    """

    title: ClassVar[str]
    offers: ClassVar[frozenset[Mean]]
    """Which of them its cohorts compute."""
    accepts: ClassVar[frozenset[Weights]] = frozenset({"examples", "uniform", "norms"})
    """Which weights of a method it starts from."""
    least: ClassVar[int] = 1
    """The uploads without which it does not do what it is for."""

    @property
    def required(self) -> frozenset[str]:
        """Clients that every round invites and waits for."""
        return frozenset()

    @abstractmethod
    def cohort(
        self,
        uploads: Sequence[Upload],
        weights: Weights,
        context: RoundContext,
        changes: Changes | None = None,
    ) -> Cohort:
        """The means over these uploads: validated, in cohort order, at least one.

        ``changes`` are what they changed relative to what was handed out. An averager that reads
        no ``changes`` need not take them. Raises ProtocolError where the uploads do not allow it.
        """


def require_means(averager: Averager, method: Method) -> None:
    """Refuse an averager that does not offer what the method needs.

    Raises:
        ConfigError: naming both and the means that are missing.
    """
    missing = sorted(method.needs - averager.offers)
    if missing:
        raise ConfigError(
            f"The averager {averager.title!r} does not compute the {', the '.join(missing)}, which "
            f"{method.title!r} needs; use averager 'plain', or another method."
        )
    if method.weights not in averager.accepts:
        raise ConfigError(
            f"{method.title!r} weights clients by the {method.weights} of what they send, which "
            f"they choose themselves, and the averager {averager.title!r} would be led by them; "
            "set method.weights to 'examples' or 'uniform' where the method has the option, or "
            "use averager 'plain', or another method."
        )


def require_uploads(averager: Averager, quorum: int) -> None:
    """Refuse rounds that may have fewer uploads than the averager needs.

    Raises:
        ConfigError: naming the number to set.
    """
    if quorum < averager.least:
        raise ConfigError(
            f"The averager {averager.title!r} compares at least {averager.least} uploads, but a "
            f"round may go on with {quorum}; set federation.quorum to {averager.least} or more."
        )
