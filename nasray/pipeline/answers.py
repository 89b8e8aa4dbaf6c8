"""What a search answers, and how far its ranking can be trusted: search.json and its words."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from nasray.config import Job, Limit, SearchConfig, limited_cost
from nasray.search.candidate import Candidate, best_first, unpack
from nasray.search.reliability import CLEARLY, MIN_CANDIDATES, MIN_IMAGES, Reliability
from nasray.search.scores import FITNESS, LOG_LIKELIHOOD

GOOD = 0.8  # a reliability that is called good, as usual in testing
FEW = 10  # candidates, of fewer of which a reliability is itself uncertain
MOST_LISTED = 200  # chances in search.json


@dataclass(frozen=True)
class Ranking:
    """The candidates of a search that are within one answer's limits, the best first."""

    config: SearchConfig
    limit: Limit | None  # the one that is answered; None: all together
    candidates: Sequence[Candidate]  # evaluated on all images
    labels: np.ndarray  # classes of the hold-out images, (n,)
    num_left_out: int = 0  # candidates of the search whose evaluation was stopped early

    @property
    def cost(self) -> str:
        """The name of the cost by which the cheapest is chosen."""
        return limited_cost(self.config.limits)

    @cached_property
    def reliability(self) -> Reliability | None:
        """None where there is too little to tell."""
        found = [_scores(each, self.config.fitness) for each in self.candidates]
        if any(len(each) != len(self.labels) for each in found):  # an old history may lack them
            return None
        balanced = self.config.fitness == "balanced"
        return Reliability.of(np.array(found), self.labels, balanced=balanced)

    @cached_property
    def num_equal(self) -> int:
        """How many candidates are not clearly worse than the best, itself among them."""
        found = self.reliability
        return 1 if found is None else int(np.count_nonzero(found.chances < CLEARLY))

    @cached_property
    def answer(self) -> Candidate:
        """The best, or by `search.prefer` the cheapest that is not clearly worse."""
        found = self.reliability
        if found is None or self.config.prefer == "best":
            return self.candidates[0]
        pairs = zip(self.candidates, found.chances, strict=True)
        equal = [candidate for candidate, chance in pairs if chance < CLEARLY]
        return min(equal, key=lambda each: each.costs[self.cost])  # of equal costs, the better

    @property
    def _others(self) -> dict[str, int]:
        """The rows that the best is compared with."""
        names = {len(self.candidates) // 2: "median", 9: "tenth", 1: "second"}  # one for each row
        return {names[row]: row for row in sorted(names) if row < len(self.candidates)}

    def to_json(self) -> dict[str, Any] | None:
        """What search.json says of it; docs/run.md explains the keys."""
        found, candidates = self.reliability, self.candidates
        if found is None:
            return None
        return {
            "limit": self.limit and self.limit.model_dump(),
            "num_candidates": len(candidates),
            "num_images": found.num_images,
            "num_left_out": self.num_left_out,
            "split_half": found.split_half,
            "images_for_good": found.images_for(GOOD),
            "standard_error": float(found.errors[0]),
            "comparisons": [
                {
                    "with": name,
                    "genes": list(candidates[row].arch),
                    "lead": float(found.leads[row]),
                    "lead_error": float(found.lead_errors[row]),
                    "expected_lead": float(found.expected_leads[row]),
                    "chance": float(found.chances[row]),
                }
                for name, row in self._others.items()
            ],
            "chance_random": float(found.chances[1:].mean()),
            "chances": found.chances[:MOST_LISTED].tolist(),
            "best": {"genes": list(candidates[0].arch), "fitness": candidates[0].fitness},
            "num_equal": self.num_equal,
        }

    def sentences(self) -> str:
        """How far the ranking can be trusted, and why the answer is the answer: two sentences."""
        found, number = self.reliability, len(self.candidates)
        if found is None:
            return f"{self._why_unknown()}. The answer is the best of them."
        if not found.lead_errors.any() and np.allclose(found.leads, 0):
            return (
                f"The {number} candidates agree on every one of the {found.num_images} hold-out "
                "images, which say nothing of their order: either all are right everywhere, or the "
                f"supernet gives all of them the same classes. {self._choice(found)}"
            )
        rows = self._others
        chances = [f"the {name} with {found.chances[row]:.0%}" for name, row in rows.items()]
        chances.append(f"a random one with {found.chances[1:].mean():.0%}")
        left_out = f", {self.num_left_out} stopped early left out" if self.num_left_out else ""
        return (
            f"The ranking of {number} candidates by {found.num_images} hold-out "
            f"images has a reliability of {found.split_half:.2f} of 1{self._more()}{left_out}: the "
            f"best is really better than {', '.join(chances)}. {self._choice(found)}"
        )

    def _why_unknown(self) -> str:
        number, images = len(self.candidates), len(self.labels)
        some = f"{number} candidate{'s' if number > 1 else ''} on {images} images"
        untold = "to tell how far their ranking can be trusted"
        if number < MIN_CANDIDATES or images < MIN_IMAGES:
            return f"{some} are too few {untold}"
        return f"{some} have no record of each image, which it takes {untold}"

    def _more(self) -> str:
        found, number = self.reliability, len(self.candidates)
        said = []
        if found is not None and found.split_half < GOOD:
            needed = found.images_for(GOOD)
            said.append(f"about {needed:,} images would give {GOOD}" if needed else "it is noise")
        if number < FEW:
            said.append(f"of {number} candidates only, so itself uncertain")
        return f" ({'; '.join(said)})" if said else ""

    def _choice(self, found: Reliability) -> str:
        best, answer = self.candidates[0], self.answer
        equal = f"{self.num_equal} of them, itself included, are not clearly worse than the best"
        if answer is best and self.config.prefer == "best":
            return f'{equal}, which is the answer by search.prefer = "best".'
        if answer is best:
            return f"{equal}, which is the cheapest of these and the answer."
        row, said = self.candidates.index(answer), FITNESS[self.config.fitness]
        return (
            f"{equal}; the answer is the cheapest of these, {answer.costs[self.cost]:.4g} "
            f"{self.cost} instead of {best.costs[self.cost]:.4g}, "
            f"{said.difference(found.leads[row])} below the best as measured, "
            f"{said.difference(found.expected_leads[row])} expected "
            '(search.prefer = "best" takes the best).'
        )


def _scores(candidate: Candidate, fitness: str) -> np.ndarray:
    """What counts of each image, (images,); none of an old history."""
    if fitness == LOG_LIKELIHOOD:
        return np.frombuffer(candidate.log_likelihoods, np.float16)
    return unpack(candidate.correct, candidate.images if candidate.correct else 0)


def rankings(
    job: Job, candidates: Sequence[Candidate], labels: np.ndarray, *, num_left_out: int = 0
) -> list[Ranking]:
    """One ranking for each limit that is answered by itself, in their order, or one in all.

    `candidates` are evaluated on all images. A limit within which there are none is left out.
    """
    config, ranked = job.search, best_first(candidates)
    own: list[Limit | None] = [None]
    if config.one_by_one and config.limits:
        own = [limit for limit in config.limits if limit.cost == limited_cost(config.limits)]
    found = []
    for limit in own:
        kept = limits_of(job, limit)
        within = [c for c in ranked if all(each.holds(c.costs[each.cost]) for each in kept)]
        if within:
            found.append(Ranking(config, limit, within, labels, num_left_out))
    return found


def limits_of(job: Job, own: Limit | None) -> list[Limit]:
    """The limits that an answer keeps: all, or of those answered one by one only its `own`."""
    limits = job.search.limits
    return [each for each in limits if own in (None, each) or each.cost != own.cost]


def answers(job: Job, ranked: Sequence[Ranking]) -> list[tuple[Limit | None, Candidate]]:
    """The answer of each ranking; of one in all, also as many next best ones as are retrained."""
    found = [(each.limit, each.answer) for each in ranked]
    if len(found) == 1 and found[0][0] is None:
        number = max(way.num_winners for way in job.retrain.ways)
        rest = [each for each in ranked[0].candidates if each is not ranked[0].answer]
        found += [(None, each) for each in rest[: max(0, number - 1)]]
    return found
