"""Which nodes of a cluster evaluate, and which are left out because they cannot.

A node is left out for the rest of a search at once if its disk, a mount or its data set is at
fault, and after several evaluations that failed there and succeeded elsewhere.
"""

import logging
from collections import defaultdict
from collections.abc import Callable

from nasray.errors import EvaluationError, UserError

logger = logging.getLogger(__name__)

# A node is left out after FAULTS failures without a success in between, if another one works;
# without another one, after MAX_FAULTS.
FAULTS, MAX_FAULTS = 3, 20


class Nodes:
    """The record of each node by its id. `usable` returns the addresses of those with room."""

    def __init__(self, usable: Callable[[], dict[str, str]]) -> None:
        self.usable = usable
        self.left_out: dict[str, str] = {}  # why, each with the node's address
        self.mistakes: list[str] = []  # the reasons of those left out, as users are told
        self.all_mistakes = True  # each reason is one that a user can mend
        self.faults: defaultdict[str, int] = defaultdict(int)  # since the latest success
        self.works: set[str] = set()  # have loaded an evaluator, or evaluated

    def works_on(self, node: str, *, evaluated: bool) -> None:
        """Note that an evaluator was loaded on `node`, or that it `evaluated` something."""
        self.works.add(node)
        if evaluated:
            self.faults.pop(node, None)

    def fails_on(self, node: str, reason: str) -> bool:
        """Count a failure for which `node` may be to blame; return whether it is left out now."""
        if not node or node in self.left_out:
            return False
        self.faults[node] += 1
        others_work = bool(self.works - self.left_out.keys() - {node})
        if self.faults[node] < (FAULTS if others_work else MAX_FAULTS):
            return False
        self.leave_out(node, f"{self.faults[node]} failures in a row: {reason}")
        return True

    def leave_out(self, node: str, reason: str, *, mistake: bool = False) -> None:
        """Evaluate nothing on `node` any more; `mistake`: the user can mend the reason."""
        address = self.usable().get(node, node[:12])
        self.left_out[node] = f"node {address}: {reason}"
        self.mistakes.append(reason)
        self.all_mistakes &= mistake
        if self.usable().keys() - self.left_out.keys():
            logger.warning("%s; it is left out, other nodes go on", self.left_out[node])

    def check(self, *, waited: bool) -> None:
        """Raise if all nodes are left out; if an evaluator has `waited` for another one, too.

        Raises:
            UserError: each is left out for a reason that the user can mend.
            EvaluationError: one of them is not.
        """
        if not self.left_out or (self.usable().keys() - self.left_out.keys() and not waited):
            return
        kind = UserError if self.all_mistakes else EvaluationError
        if len(set(self.mistakes)) == 1:
            raise kind(self.mistakes[0])
        raise kind(f"no node can evaluate: {'; '.join(sorted(self.left_out.values()))}")
