"""Single pairs out of the N x M plane of volumes: the smallest ones, and hard negatives drawn by chance."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive_ops import checks
from contrastive_ops.dtypes import promoted, statistics_dtype
from contrastive_ops.losses import terms, volume
from contrastive_ops.ops import gramian_volume, volume_logsumexp

# ALBEF and GRAM add it to every probability, so that a far negative is drawn now and then
FLOOR = 1e-4


@torch.no_grad()
def gram_retrieve(anchor: Tensor, tuples: Tensor, k: int, *, normalize: bool = True) -> tuple[Tensor, Tensor]:
    r"""Retrieve for each anchor the k tuples that it spans the smallest volumes with.

    .. math::
        \mathrm{volumes}_i = \text{the } k \text{ smallest of } V(a_i, m_{j1}, \dots, m_{jP}), \; j = 1 \dots M

    Parameters
    ----------
    anchor : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
    tuples : Tensor of shape (M, P, D), dtype of `anchor`
        The P other modalities of M candidates; P may be any number.
    k : int
        From 1 to M.
    normalize : bool
        Volumes of unit vectors; False takes the vectors as they are.

    Returns
    -------
    volumes : Tensor of shape (N, k), ascending, float32 (float64 for float64)
    indices : int64 Tensor of shape (N, k), into `tuples`

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Notes
    -----
    Memory is O(N k) and tiles of fixed size. The candidates are found by tile products, in which a volume below about
    1e-3 of the product of the norms is noise; those k are measured again by `gramian_volume` and sorted by that. No
    gradient. Zero vectors have volume 0 with everything and come first: leave them out of `tuples`.

    Examples
    --------
    >>> anchor = torch.tensor([[1.0, 0.0, 0.0]])
    >>> tuples = torch.tensor([[[0.0, 1.0, 0.0]], [[1.0, 1.0, 0.0]], [[-1.0, 0.0, 0.0]]])
    >>> gram_retrieve(anchor, tuples, 2)
    (tensor([[0.0000, 0.7071]]), tensor([[2, 1]]))
    """
    checks.features("anchor", anchor)
    checks.features("tuples", tuples, expected="(M, P, D)")
    anchor, tuples = promoted(anchor, tuples)
    checks.same_kind("tuples", tuples, "anchor", anchor)
    terms.check_options(normalize=normalize)
    (n, d), (m, p, _) = anchor.shape, tuples.shape
    checks.neighbours("k", k, m, of="tuples")
    rows = anchor.to(statistics_dtype(anchor))
    best = rows.new_full((n, k), torch.inf)
    index = torch.zeros((n, k), dtype=torch.int64, device=anchor.device)
    # of the columns, directions of P x D numbers are kept for all rows; of the rows, a tile of M' numbers at a time
    width = volume.rows_per_chunk(m, max(p * d, 1024))
    height = volume.rows_per_chunk(n, width + k)
    for left in range(0, m, width):
        cols = volume.columns(tuples[left : left + width], normalize)
        for top in range(0, n, height):
            part = slice(top, top + height)
            found = volume.tile(rows[part], cols)
            column = torch.arange(left, left + found.shape[1], device=anchor.device).expand_as(found)
            best[part], place = torch.cat([best[part], found], 1).topk(k, largest=False)
            index[part] = torch.cat([index[part], column], 1).gather(1, place)
    size = volume.rows_per_chunk(n, k * (1 + p) * d)
    for top in range(0, n, size):
        part = slice(top, top + size)
        candidates = tuples[index[part]]
        matched = torch.cat([anchor[part, None, None].expand(-1, k, -1, -1), candidates], 2)
        exact = gramian_volume(matched)
        if normalize:
            exact = exact * volume.inverse_norms(matched)
        best[part], place = exact.sort(stable=True)
        index[part] = index[part].gather(1, place)
    return best, index


@torch.no_grad()
def sample_gram_negatives(
    anchor: Tensor,
    *others: Tensor,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Draw one hard negative tuple for each anchor, and one hard negative anchor for each tuple.

    .. math::
        P(j \mid i) \propto \mathrm{softmax}_j(-V_{ij} / \tau) + 10^{-4}, \qquad j \ne i

    The softmax is over all N tuples, the own one included; for tuples it is over the anchors.

    Parameters
    ----------
    anchor : Tensor of shape (N, D), float32 / bfloat16 / float16 / float64
    others : 1 to 4 Tensors of shape (N, D), dtype of `anchor`
        Row i of all modalities is sample i.
    temperature : float or Tensor of one element
        Positive: checked of floats and of CPU tensors.
    normalize : bool
        Volumes of unit vectors; False takes the vectors as they are.
    generator : torch.Generator, optional
        On the device of `anchor`; the draw is a function of its state.
    backend : str
        See `volume_logsumexp`.

    Returns
    -------
    tuples : int64 Tensor of shape (N,)
        Of each anchor the index of a tuple, never its own.
    anchors : int64 Tensor of shape (N,)
        Of each tuple the index of an anchor, never its own.

    Raises
    ------
    TypeError, ValueError
        Naming the argument; for N = 1, where there is nothing to draw.

    Notes
    -----
    Extra memory is O(N D) and tiles of fixed size. The draw is exact: in a second sweep each pair gets an exponential
    variate E, and the largest weight / E of a row or column wins. No gradient.

    References
    ----------
    Li et al.: Align before Fuse, arXiv:2107.07651. Cicchetti, Grassucci, Sigillo, Comminiello: Gramian Multimodal
    Representation Learning and Alignment, arXiv:2412.11959.

    Examples
    --------
    >>> sample_gram_negatives(torch.eye(2), torch.eye(2))
    (tensor([1, 0]), tensor([1, 0]))
    """
    anchor, others = volume.checked(anchor, others)
    checks.temperature("temperature", temperature, anchor.device)
    terms.check_options(normalize=normalize)
    n, device = anchor.shape[0], anchor.device
    checks.enough_to_draw("anchor", n)
    logit_scale = terms.inverse(temperature, anchor)
    matched, anchor, tuples = volume.matched(anchor, others, normalize, backend)
    every = torch.arange(n, device=device)
    negatives = volume_logsumexp(anchor, tuples, row_scale=logit_scale, exclude=every, cols=True, backend=backend)
    positive = -logit_scale * gramian_volume(matched)
    row_lse, col_lse = (torch.logaddexp(lse, positive) for lse in (negatives.row_lse, negatives.col_lse))

    rows = logit_scale * anchor.to(positive.dtype)
    tuple_of, anchor_of = torch.zeros_like(every), torch.zeros_like(every)
    tuple_score, anchor_score = torch.zeros_like(positive), torch.zeros_like(positive)
    width = volume.rows_per_chunk(n, max(tuples[0].numel(), 1024))
    height = volume.rows_per_chunk(n, width)
    for left in range(0, n, width):
        of_cols = slice(left, left + width)
        cols = volume.columns(tuples[of_cols], False)
        for top in range(0, n, height):
            of_rows = slice(top, top + height)
            logits = -volume.tile(rows[of_rows], cols)
            own = every[of_rows, None] == every[of_cols]
            _compete(logits - row_lse[of_rows, None], own, 1, left, tuple_score, tuple_of, of_rows, generator)
            _compete(logits - col_lse[of_cols], own, 0, top, anchor_score, anchor_of, of_cols, generator)
    return tuple_of, anchor_of


def _compete(
    log_probability: Tensor,
    own: Tensor,
    dim: int,
    offset: int,
    score: Tensor,
    winner: Tensor,
    part: slice,
    generator: torch.Generator | None,
) -> None:
    """The best of a tile along `dim` against the winners so far, in place; an own pair scores 0 and never wins."""
    variates = torch.empty_like(log_probability).exponential_(generator=generator)
    weight = (log_probability.exp() + FLOOR).masked_fill(own, 0.0)
    best, place = (weight / variates.clamp(min=torch.finfo(weight.dtype).tiny)).max(dim)
    wins = best > score[part]
    winner[part] = torch.where(wins, place + offset, winner[part])
    score[part] = torch.where(wins, best, score[part])
