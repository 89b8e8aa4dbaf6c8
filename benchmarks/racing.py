"""What racing saves on a recorded search, and how often it keeps the parents that it should.

    python benchmarks/racing.py RUN_DIR [--json FILE] [--confidence 0.99] [--orders 200]
        [--images N]

RUN_DIR holds a search that evaluated everything in full (racing = false), with which images
each candidate has right. The races are run again on those records, in random orders of the
images: parents are the `num_parents` best so far, and the last of them is the bar for the
next generation, as in the genetic search. Agreement: the share of generations, over all
orders, after which the raced search has exactly the parents of the full one. --images draws
that many with replacement: what a larger hold-out of the same kind would save.
"""

import argparse

import numpy as np
from table import Row, show

from nasray import storage
from nasray.racing import Race, slice_ends, unpack
from nasray.search.history import History


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir")
    parser.add_argument("--json")
    parser.add_argument("--confidence", type=float, default=0.99)
    parser.add_argument("--orders", type=int, default=200)
    parser.add_argument("--images", type=int, help="so many, drawn from the recorded ones")
    options = parser.parse_args()
    num_parents = storage.read_json(f"{options.run_dir}/job.json")["job"]["search"]["num_parents"]
    generations = [
        [
            (candidate.arch, unpack(candidate.correct, candidate.images))
            for candidate in generation
            if not candidate.failed
        ]
        for generation in History(f"{options.run_dir}/history")
    ]
    rng = np.random.default_rng(0)
    images = full = raced = agreed = compared = first = 0
    for _ in range(options.orders):
        recorded = len(generations[0][0][1])
        if options.images:
            order = rng.integers(recorded, size=options.images)
        else:
            order = rng.permutation(recorded)
        parents = []
        for generation in generations:
            bits = {arch: correct[order] for arch, correct in generation}
            bar = parents[-1][2] if len(parents) == num_parents else None
            race = None if bar is None else Race(bar, options.confidence)
            found = list(parents)
            for arch, correct in bits.items():
                seen = len(correct) if race is None else judged(race, correct)
                if race is None:
                    first += len(correct)
                else:
                    raced += seen
                    full += len(correct)
                if seen == len(correct):
                    found.append((-correct.mean(), arch, correct))
            everything = parents + [(-c.mean(), a, c) for a, c in bits.items()]
            parents = best(everything, num_parents)
            if race is not None:
                agreed += names(best(found, num_parents)) == names(parents)
                compared += 1
        images = len(order)
    show(
        [
            Row("hold-out images of each candidate", images, "images"),
            Row("candidates raced, of all", full / (full + first), "share"),
            Row("images in full / judged, of candidates raced", full / raced, "ratio", ">= 3"),
            Row(
                "generations with exactly the parents of full evaluation",
                agreed / compared,
                "share",
                ">= 0.99",
            ),
        ],
        options.json,
    )


def judged(race, correct):
    for end in slice_ends(len(correct)):
        if race.is_lost(correct[:end]):
            return end
    return len(correct)


def best(candidates, number):
    return sorted(candidates, key=lambda each: each[:2])[:number]


def names(candidates):
    return {arch for _, arch, _ in candidates}


if __name__ == "__main__":
    main()
