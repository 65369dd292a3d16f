"""``python -m contrastive_ops.demo``: learn to find a function by its description, on the Python of this machine."""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from contrastive_ops import backends, explain
from contrastive_ops.demo import report
from contrastive_ops.demo.encoder import TfIdf, TwoTowers
from contrastive_ops.demo.pairs import Pair, collect_pairs, installed_roots
from contrastive_ops.demo.report import Screen, size
from contrastive_ops.demo.training import (
    Quality,
    Step,
    dense_seconds,
    lexical_similarities,
    quality_of,
    similarities,
    train,
)

MIN_PAIRS = 20
MAX_HELD_OUT = 1000
EXAMPLES = 3
HITS = 3
# N x N float32 matrices that exist at once in the backward of the dense loss, at least: the two log-softmaxes that
# autograd keeps, and the gradients that enter and leave one. Measured as the growth of the peak resident size over
# (cross_entropy(s, i) + cross_entropy(s.T, i)) / 2 and its backward at N = 9,000, D = 128 with torch 2.13 on CPU: 4.0
# with s = (scale * x) @ y.T freed after the forward, 5.0 where s is kept or is scale * (x @ y.T).
DENSE_MATRICES = 4


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    screen = Screen()
    start = time.perf_counter()
    with screen.progress("collecting pairs", options.pairs) as advance:
        pairs = collect_pairs(installed_roots(), options.pairs, advance)
    files = len({pair.place.rsplit(":", 1)[0] for pair in pairs})
    screen.line(f"{len(pairs):,} pairs of function and docstring from {files:,} files in {_since(start)}")
    if len(pairs) < MIN_PAIRS:
        print(f"At least {MIN_PAIRS} pairs are needed; does this Python come without its sources?", file=sys.stderr)
        return 1

    torch.manual_seed(options.seed)
    pairs = [pairs[index] for index in torch.randperm(len(pairs)).tolist()]
    n = len(pairs) - min(MAX_HELD_OUT, len(pairs) // 4)
    learned, held_out = pairs[:n], pairs[n:]
    hashing = time.perf_counter()
    code, text = TfIdf(), TfIdf()
    train_code = code.fit_transform(pair.code for pair in learned)
    train_text = text.fit_transform(pair.text for pair in learned)
    test_code = code.transform(pair.code for pair in held_out)
    test_text = text.transform(pair.text for pair in held_out)
    screen.line(
        f"{len(train_code.features) / n:.0f} features per function, {len(train_text.features) / n:.0f} per docstring, "
        f"hashed in {_since(hashing)}"
    )
    screen.line(
        f"training on {n:,} pairs as one batch, {len(held_out):,} held out; D = {options.dim}, "
        f"backend {explain(torch.empty(1, 1), backend=options.backend).chosen}"
    )

    # the first optimizer of a process imports torch._dynamo, 70 MiB of modules that are no part of training
    torch.optim.Adam([torch.zeros(1)])
    before = report.resident_bytes()
    encoder = TwoTowers(options.dim)
    qualities = [quality_of(similarities(encoder, test_text, test_code))]
    steps: list[Step] = []
    with screen.progress("training", options.steps) as advance:
        for step in train(encoder, train_code, train_text, options.steps, options.backend):
            steps.append(step)
            qualities.append(quality_of(similarities(encoder, test_text, test_code)))
            recall = qualities[-1].recall_at_10
            advance(len(steps), f"loss {step.loss:.3f}  recall@10 {recall:.3f}  {step.seconds:.2f} s/step")
    peak = report.peak_bytes()
    # twice what it needs, so that nobody's machine swaps for a comparison
    available = report.available_bytes()
    allowed = available is not None and available > 2 * _dense_bytes(n)
    dense = dense_seconds(encoder, train_code, train_text) if allowed else None

    lexical = quality_of(lexical_similarities(test_text, test_code))
    _show_quality(screen, len(held_out), qualities[0], lexical, qualities[-1])
    _show_cost(screen, n, steps, dense, before, peak)
    examples = [pair for pair in held_out if re.fullmatch(r"[A-Z][\w ,']{30,80}\.", pair.text)][:EXAMPLES]
    searches: list[tuple[str, Pair | None]] = [(pair.text, pair) for pair in examples]
    searches += [(query, None) for query in options.query]
    queries = text.transform(query for query, _ in searches)
    scores = torch.cat([similarities(encoder, queries, side) for side in (train_code, test_code)], dim=1)
    for (query, answer), row in zip(searches, scores, strict=True):
        _show_hits(screen, query, answer, pairs, row)
    if options.plot is not None:
        report.plot(options.plot, steps, qualities, f"{n:,} pairs in one batch, {len(held_out):,} held out")
        screen.line(f"\ncurves in {options.plot}")
    screen.line(f"\nfinished in {_since(start)}")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m contrastive_ops.demo",
        description="Learn to find a function by its description, on the Python installed here.",
    )
    parser.add_argument("--pairs", type=_at_least(MIN_PAIRS), default=10_000, help="most to collect (%(default)s)")
    parser.add_argument("--steps", type=_at_least(1), default=12, help="steps of training (%(default)s)")
    parser.add_argument("--dim", type=_at_least(1), default=256, help="size D of the embeddings (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the start and the dropout (%(default)s)")
    parser.add_argument("--backend", choices=backends.NAMES, default="auto", help="who runs the loss (%(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw loss and recall over the steps")
    parser.add_argument(
        "--query", action="append", default=[], metavar="TEXT", help="search with your own words; can be repeated"
    )
    options = parser.parse_args(arguments)
    refusal = None if options.plot is None else report.why_no_plot(options.plot)
    try:
        explain(torch.empty(1, options.dim), backend=options.backend)
    except (RuntimeError, ValueError) as error:
        refusal = str(error)
    if refusal is not None:
        parser.exit(2, refusal + "\n")
    return options


def _at_least(minimum: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    return integer


def _since(start: float) -> str:
    return f"{time.perf_counter() - start:.1f} s"


def _show_quality(screen: Screen, held_out: int, before: Quality, lexical: Quality, after: Quality) -> None:
    ranks = torch.arange(1, held_out + 1)
    chance = Quality(1 / held_out, min(1.0, 10 / held_out), (1 / ranks).mean().item())
    rows = {"chance": chance, "before training": before, "tf-idf, nothing learned": lexical, "after training": after}
    screen.table(
        f"Finding each of the {held_out:,} held-out functions among them by its docstring",
        ("", "recall@1", "recall@10", "MRR"),
        [(name, *(f"{value:.3f}" for value in quality)) for name, quality in rows.items()],
    )


def _dense_bytes(n: int) -> int:
    return DENSE_MATRICES * 4 * n * n  # of float32


def _show_cost(
    screen: Screen, n: int, steps: Sequence[Step], dense: float | None, before: int | None, peak: int | None
) -> None:
    seconds = statistics.median(step.seconds for step in steps)
    loss_seconds = statistics.median(step.loss_seconds for step in steps)
    rows = [
        ("time of a step, median", f"{seconds:.2f} s"),
        ("  of which the loss, forward and backward", f"{loss_seconds:.2f} s"),
        ("the dense loss in its place, one step", "no memory for it" if dense is None else f"{dense:.2f} s"),
    ]
    if before is not None and peak is not None:
        rows += [
            ("peak memory of the process", size(peak)),
            ("  of which training: encoder, Adam and loss", size(peak - before)),
        ]
    rows += [
        (f"one similarity matrix, {n:,} x {n:,} in float32", size(_dense_bytes(n) / DENSE_MATRICES)),
        (f"the dense loss alone, {DENSE_MATRICES} such matrices at its peak", size(_dense_bytes(n))),
    ]
    screen.table("Time and memory", ("", ""), rows)


def _show_hits(screen: Screen, query: str, answer: Pair | None, pairs: Sequence[Pair], scores: Tensor) -> None:
    screen.line(f"\n{query}")
    for score, index in zip(*(column.tolist() for column in scores.topk(HITS)), strict=True):
        pair = pairs[index]
        screen.line(f"  {score:.2f}  {pair.name:<32}  {pair.place}" + ("  <- its function" if pair is answer else ""))
    if answer is not None:
        rank = int((scores >= scores[pairs.index(answer)]).sum())
        screen.line(f"  its function, held out in training, is number {rank:,} of {len(pairs):,}")


if __name__ == "__main__":
    sys.exit(main())
