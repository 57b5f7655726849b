"""Which request comes next: fair between tenants, and with the adapters that fit.

Fair: whoever was served the fewest tokens comes first, and within a tenant whoever came
first. A tenant that was away does not come back with a credit: it starts level with the
least served of those that wait. With policy "first come", the order of arrival counts.

Source  the counters of tokens: Sheng et al., Fairness in Serving LLMs, arXiv:2401.00588
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .batch import Version
from .requests import Listener, Piece, Reason, Request, Token
from .text import Text

POLICIES = ("fair", "first come")
MOST = 10_000  # tenants that are remembered while they are away


@dataclass(eq=False)
class Ticket:
    """One request on its way through the engine.

    number     order of arrival
    arrived    time of arrival, in seconds of the engine's clock
    version    the adapter's content, from the moment its prompt is read
    blocked    since when it waits for its adapter alone; None while it does not
    read       tokens of the prompt that were read
    last       the token that the next decoding step reads
    count      tokens of the answer
    """

    request: Request
    listener: Listener
    number: int
    arrived: float
    text: Text
    cancelled: bool = False
    version: Version | None = None
    blocked: float | None = None
    read: int = 0
    last: int = 0
    count: int = 0
    ended: bool = False

    def cancel(self) -> None:
        """No more pieces are wanted. Harmless twice, or after the end."""
        self.cancelled = True

    def give(self, text: str = "", tokens: tuple[Token, ...] = ()) -> None:
        self._say(Piece(text, tokens, version=self._digest()))

    def end(self, reason: Reason, tokens: tuple[Token, ...] = (), error=None) -> None:
        """Give the last piece."""
        if not self.ended:
            self.ended = True
            rest = self.text.end() if reason in ("length", "stop", "deadline") else ""
            self._say(Piece(rest, tokens, reason, error, self._digest()))

    def _digest(self) -> str | None:
        return None if self.version is None else self.version.digest

    def _say(self, piece: Piece) -> None:
        """A listener that fails ends its own request, and nobody else's."""
        try:
            self.listener(piece)
        except Exception:
            self.cancelled = True

    def overdue(self, now: float) -> bool:
        return now - self.arrived > self.request.deadline


class Waiting:
    """The requests that wait, and who was served how many tokens.

    Args
        policy  one of POLICIES
    """

    def __init__(self, policy: str = "fair"):
        self.policy = policy
        self.tickets: list[Ticket] = []
        self.served: dict[str, int] = {}
        self._level: dict[str, float] = {}  # served, and lifted after an absence

    def __len__(self) -> int:
        return len(self.tickets)

    def add(self, ticket: Ticket, active: Iterable[str]) -> None:
        """One request more.

        Args
            active  tenants whose requests wait or run
        """
        tenant, active = ticket.request.tenant, set(active)
        if len(self._level) > MOST:
            for counts in (self._level, self.served):
                for other in counts.keys() - active:
                    del counts[other]
        if tenant not in active:
            least = min((self._level.get(t, 0) for t in active), default=0)
            self._level[tenant] = max(self._level.get(tenant, 0), least)
        self.tickets.append(ticket)

    def count(self, tenant: str, tokens: int) -> None:
        """These tokens were read or written for a tenant."""
        self.served[tenant] = self.served.get(tenant, 0) + tokens
        self._level[tenant] = self._level.get(tenant, 0) + tokens

    def in_order(self) -> list[Ticket]:
        """Those that wait, the next one first."""
        if self.policy == "first come":
            return sorted(self.tickets, key=lambda t: t.number)
        return sorted(
            self.tickets,
            key=lambda t: (self._level.get(t.request.tenant, 0), t.number),
        )

    def take(self, ticket: Ticket) -> None:
        self.tickets.remove(ticket)

    def longest_blocked(self) -> Ticket | None:
        """The one that waits longest for its adapter alone."""
        blocked = [t for t in self.tickets if t.blocked is not None]
        return min(blocked, key=lambda t: t.blocked, default=None)

    def take_all(self, condition: Callable[[Ticket], bool]) -> list[Ticket]:
        """Remove and return those that meet a condition."""
        gone = [ticket for ticket in self.tickets if condition(ticket)]
        self.tickets = [ticket for ticket in self.tickets if ticket not in gone]
        return gone
