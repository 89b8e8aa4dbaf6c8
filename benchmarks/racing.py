"""What early stopping saves on a recorded search, and how often it keeps the right parents.

    python benchmarks/racing.py RUN_DIR [--json FILE] [--confidence 0.99] [--draws 20]

RUN_DIR holds a search that evaluated everything in full (racing = false), with which images
each candidate has right. Early stopping is run again on those records: parents are the
`num_parents` best so far, and the last of them is the incumbent of the next generation, as in
the genetic search. Agreement: the share of generations after which the search with early
stopping has exactly the parents of the full one, and the share of all parents that it has, too.
It runs on all images, and for a steadier agreement on `draws` random four fifths of them. What
is promised: of those stopped, at most 1 - `confidence` would have reached the incumbent.
"""

import argparse

import numpy as np
from table import Row, show

from nasray.config import parse_job
from nasray.search.candidate import unpack
from nasray.search.history import History
from nasray.search.racing import MAX_FULL, MAX_STOPPED, MIN_FULL, CorrectnessModel, StoppingRule
from nasray.spaces import make_space
from nasray.spaces.population import as_population, embedded
from nasray.storage import files as storage

SHARE = 0.8  # of the images in a draw


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir")
    parser.add_argument("--json")
    parser.add_argument("--confidence", type=float, default=0.99)
    parser.add_argument("--draws", type=int, default=20)
    options = parser.parse_args()
    record = storage.read_json(f"{options.run_dir}/job.json")
    job = parse_job(record["job"], options.run_dir)
    genes = make_space(job.space, 2).genes  # the same for any number of classes
    generations = [
        [
            (candidate.arch, unpack(candidate.correct, candidate.images))
            for candidate in generation
            if not candidate.failed
        ]
        for generation in History(f"{options.run_dir}/history")
    ]
    images = len(generations[0][0][1])
    rng = np.random.default_rng(0)
    rows = []
    for title, draws in (
        ("all images", [np.arange(images)]),
        (
            f"{SHARE:.0%} of them, {options.draws} draws",
            [rng.permutation(images)[: round(SHARE * images)] for _ in range(options.draws)],
        ),
    ):
        full, raced, winners, number, dropped, wrongly, agreed, kept, compared = np.sum(
            [
                raced_again(generations, draw, genes, job.search.num_parents, options.confidence)
                for draw in draws
            ],
            axis=0,
        )
        rows += [
            Row(f"{title}: images of a candidate", len(draws[0]), "images"),
            Row(f"{title}: candidates raced", number / len(draws), "candidates"),
            Row(f"{title}: of those, parents then", winners / number, "share"),
            Row(f"{title}: of those dropped, would have won", wrongly / max(1, dropped), "share"),
            Row(f"{title}: images in full / judged, of those raced", full / raced, "ratio", ">= 3"),
            Row(
                f"{title}: generations with exactly its parents",
                agreed / compared,
                "share",
                ">= 0.99",
            ),
            Row(f"{title}: parents that it has, too", kept / compared, "share", ">= 0.99"),
        ]
    show(rows, options.json)


def raced_again(generations, draw, genes, num_parents, confidence):
    """Images in full and evaluated, winners, candidates, those stopped, of them those that would
    reach the incumbent, generations that agree, the sum of their shares of parents that agree,
    generations.
    """
    full = raced = winners = number = dropped = wrongly = agreed = kept = compared = 0
    parents, full_records, partial = [], [], []
    for generation in generations:
        bits = {arch: correct[draw] for arch, correct in generation}
        vectors = dict(zip(bits, embedded(as_population(list(bits)), genes), strict=True))
        model, target = None, 0
        if len(parents) == num_parents and len(full_records) >= MIN_FULL:
            archs, records = zip(*full_records[-MAX_FULL:], *partial[-MAX_STOPPED:], strict=True)
            known = embedded(as_population(archs), genes)
            model = CorrectnessModel.fit(known, np.array(records), len(genes))
            target = int(parents[-1][2].sum())
        found = list(parents)
        for arch, correct in bits.items():
            seen = len(draw)
            if model is not None:
                rule = StoppingRule(model, vectors[arch], target, confidence)
                evaluated = rule.apply(lambda rows, correct=correct: correct[rows])
                seen = len(evaluated)
                full, raced, number = full + len(draw), raced + seen, number + 1
            if seen == len(draw):
                found.append((-correct.mean(), arch, correct))
                full_records.append((arch, correct.astype(np.float32)))
            else:
                dropped, wrongly = dropped + 1, wrongly + (correct.sum() >= target)
                right, known = rule.among_all(evaluated)
                partial.append((arch, np.where(known, right, np.nan).astype(np.float32)))
        everything = parents + [(-c.mean(), arch, c) for arch, c in bits.items()]
        parents = best(everything, num_parents)
        if model is not None:
            winners += len(names(parents) & set(bits))
            same = names(best(found, num_parents)) & names(parents)
            agreed += len(same) == num_parents
            kept += len(same) / num_parents
            compared += 1
    return full, raced, winners, number, dropped, wrongly, agreed, kept, compared


def best(candidates, number):
    return sorted(candidates, key=lambda each: each[:2])[:number]


def names(candidates):
    return {arch for _, arch, _ in candidates}


if __name__ == "__main__":
    main()
