"""One test per refused input: its type and its whole sentence. Nothing wrong gets as far as a kernel."""

from __future__ import annotations

import inspect
import re
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import contrastive_ops as co
from contrastive_ops import backends, build, checks

X, Y = torch.zeros(4, 3), torch.zeros(5, 3)
IDS = torch.arange(4)
VIEWS = torch.zeros(2, 4, 3)
with warnings.catch_warnings():  # that nested tensors are a prototype
    warnings.simplefilter("ignore")
    NESTED = torch.nested.nested_tensor([X, X])
    JAGGED = torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged)
op = co.similarity_logsumexp


class DTensor(torch.Tensor):
    """Stands for torch.distributed.tensor.DTensor, which needs a process group."""


def distributed() -> torch.Tensor:
    return torch.zeros(4, 3).as_subclass(DTensor)


# id: call, type, sentence
REFUSALS = {
    # features
    "features-list": (
        lambda: op([[1.0]]), TypeError,
        "x must be a torch.Tensor, got list; call torch.as_tensor(x)."),
    "features-dtensor": (
        lambda: op(distributed()), TypeError,
        "x must be a plain tensor, got a DTensor; call x.full_tensor(), "
        "x.to_local() is the part of this rank alone."),
    "features-1d": (
        lambda: op(X[0]), ValueError,
        "x must have shape (N, D), got (3,); {axes (N, D)}."),
    "features-0d": (
        lambda: op(X[0, 0]), ValueError,
        "x must have shape (N, D), got (); {axes (N, D)}."),
    "features-3d": (
        lambda: co.info_nce(X, X[None]), ValueError,
        "key must have shape (M, D), got (1, 4, 3); {axes (M, D)}."),
    "features-sparse": (
        lambda: op(X.to_sparse()), TypeError,
        "x must be a dense (strided) tensor, got layout torch.sparse_coo; call x.to_dense()."),
    "features-integer": (
        lambda: op(X.long()), TypeError,
        "x must be one of float32, bfloat16, float16, float64, got int64; call x.float()."),
    "features-complex": (
        lambda: co.nt_xent(X, X.cfloat()), TypeError,
        "z2 must be one of float32, bfloat16, float16, float64, got complex64; "
        "call torch.view_as_real(z2).flatten(-2)."),
    "features-no_feature": (
        lambda: op(X[:, :0]), ValueError,
        "x must have at least one feature (D >= 1), got shape (4, 0)."),
    "features-y": (
        lambda: op(X, Y[0]), ValueError,
        "y must have shape (N, D), got (3,); {axes (N, D)}."),
    # two features that meet
    "pair-device": (
        lambda: op(X, Y.to("meta")), ValueError,
        "y must be on the device of x, cpu, got meta; call y.to(x.device)."),
    "pair-dtype": (
        lambda: co.info_nce(X, Y.double()), TypeError,
        "key must have the dtype of query, float32, got float64; call key.to(query.dtype)."),
    "pair-feature_size": (
        lambda: co.clip_loss(X, X[:, :2], 1.0), ValueError,
        "text_features must have the feature size of image_features, D = 3, got 2; project both to one size."),
    "pair-rows-clip": (
        lambda: co.clip_loss(X, Y, 1.0), ValueError,
        "text_features must have the shape of image_features, (4, 3), got (5, 3); "
        "row i of text_features is the positive of row i of image_features."),
    "pair-rows-views": (
        lambda: co.dcl(X, Y), ValueError,
        "z2 must have the shape of z1, (4, 3), got (5, 3); row i of z2 is the positive of row i of z1."),
    "pair-fewer_keys": (
        lambda: co.info_nce(Y, X), ValueError,
        "key must have at least as many rows as query, N = 5, got M = 4; "
        "row i of key is the positive of query i, or pass target=."),
    # integers
    "integers-list": (
        lambda: co.supcon(X, [0, 1, 2, 3]), TypeError,
        "labels must be a torch.Tensor, got list; call torch.as_tensor(labels)."),
    "integers-float": (
        lambda: co.supcon(X, IDS.float()), TypeError,
        "labels must be an integer tensor, got float32; labels.long() keeps values that are whole."),
    "integers-bool": (
        lambda: op(X, exclude=IDS > 0), TypeError,
        "exclude must be an integer tensor, got bool; give integers."),
    "integers-column": (
        lambda: co.supcon(X, IDS[:, None]), ValueError,
        "labels must have shape (4,) or (4, C) with C >= 2, got (4, 1); call labels.flatten()."),
    "integers-size": (
        lambda: co.clip_loss(X, X, 1.0, ids=IDS[:3]), ValueError,
        "ids must have shape (4,), got (3,); give one value per row of image_features."),
    "integers-size-cols": (
        lambda: op(X, Y, row_ids=IDS, col_ids=IDS), ValueError,
        "col_ids must have shape (5,), got (4,); give one value per row of y."),
    "integers-size-keys": (
        lambda: co.info_nce(X, Y, query_ids=IDS, key_ids=IDS), ValueError,
        "key_ids must have shape (5,), got (4,); give one value per row of key."),
    "integers-0d": (
        lambda: op(X, exclude=torch.tensor(0)), ValueError,
        "exclude must have shape (4,), got (); give one value per row of x."),
    "integers-device": (
        lambda: op(X, row_ids=IDS.to("meta"), ids="restrict"), ValueError,
        "row_ids must be on cpu, got meta; call row_ids.to(x.device)."),
    "integers-views": (
        lambda: co.supcon(torch.zeros(2, 2, 3), IDS), ValueError,
        "labels must have shape (2,), got (4,); give one value per row of features."),
    "target-size": (
        lambda: co.info_nce(X, Y, target=IDS[:2]), ValueError,
        "target must have shape (4,), got (2,); give one value per row of query."),
    "target-float": (
        lambda: co.info_nce(X, Y, target=IDS.float()), TypeError,
        "target must be an integer tensor, got float32; target.long() keeps values that are whole."),
    "target-too_large": (
        lambda: co.info_nce(X, Y, target=IDS + 2), ValueError,
        "target must be in [0, M) = [0, 5), got values from 2 to 5."),
    "target-negative": (
        lambda: co.info_nce(X, Y, target=IDS - 1), ValueError,
        "target must be in [0, M) = [0, 5), got values from -1 to 2."),
    # weights
    "weights-list": (
        lambda: co.info_nce(X, Y, sample_weight=[1.0] * 4), TypeError,
        "sample_weight must be a torch.Tensor, got list; call torch.as_tensor(sample_weight)."),
    "weights-integer": (
        lambda: co.clip_loss(X, X, 1.0, sample_weight=IDS), TypeError,
        "sample_weight must be a floating-point tensor, got int64; call sample_weight.float()."),
    "weights-shape": (
        lambda: co.clip_loss(X, X, 1.0, sample_weight=torch.ones(1, 4)), ValueError,
        "sample_weight must have shape (4,), got (1, 4); call sample_weight.flatten()."),
    "weights-device": (
        lambda: co.info_nce(X, Y, sample_weight=torch.ones(4, device="meta")), ValueError,
        "sample_weight must be on cpu, got meta; call sample_weight.to(query.device)."),
    # scales and biases
    "scale-string": (
        lambda: op(X, row_scale="2"), TypeError,
        "row_scale must be a float or a tensor, got str; pass a number."),
    "scale-bool": (
        lambda: op(X, row_bias=True), TypeError,
        "row_bias must be a float or a tensor, got bool; pass a number."),
    "scale-nan": (
        lambda: op(X, Y, col_scale=float("nan")), ValueError,
        "col_scale must be finite, got nan."),
    "scale-infinite": (
        lambda: op(X, Y, col_bias=-float("inf")), ValueError,
        "col_bias must be finite, got -inf."),
    "scale-integer": (
        lambda: op(X, row_scale=IDS), TypeError,
        "row_scale must be a floating-point tensor, got int64; call row_scale.float()."),
    "scale-shape": (
        lambda: op(X, row_scale=torch.ones(4, 1)), ValueError,
        "row_scale must have shape (4,), got (4, 1); call row_scale.flatten()."),
    "scale-size": (
        lambda: op(X, Y, col_scale=torch.ones(4)), ValueError,
        "col_scale must have shape (5,), got (4,); give one value per row of y."),
    "scale-device-vector": (
        lambda: op(X, Y, col_bias=torch.ones(5, device="meta")), ValueError,
        "col_bias must be on cpu, got meta; call col_bias.to(y.device)."),
    "scale-device-one": (
        lambda: op(X, row_scale=torch.ones((), device="meta")), ValueError,
        'row_scale must be on cpu, got meta; call row_scale.to("cpu").'),
    # temperatures
    "temperature-zero": (
        lambda: co.nt_xent(X, X, temperature=0.0), ValueError,
        "temperature must be positive, got 0.0; pass a value such as 0.07."),
    "temperature-negative": (
        lambda: co.clip_loss(X, X, -1), ValueError,
        "logit_scale must be positive, got -1; pass it exponentiated, such as 1 / 0.07."),
    "temperature-nan": (
        lambda: co.supcon(X, IDS, temperature=float("nan")), ValueError,
        "temperature must be finite, got nan."),
    "temperature-none": (
        lambda: co.info_nce(X, Y, temperature=None), TypeError,
        "temperature must be a float or a tensor, got NoneType; pass a number."),
    "temperature-integer": (
        lambda: co.dclw(X, X, temperature=torch.tensor(1)), TypeError,
        "temperature must be a floating-point tensor, got int64; call temperature.float()."),
    "temperature-vector": (
        lambda: co.dcl(X, X, temperature=torch.ones(4)), ValueError,
        "temperature must be a float or a tensor of one element, got shape (4,); give one value for all rows."),
    "logit_scale-vector": (
        lambda: co.clip_loss(X, X, torch.ones(4)), ValueError,
        "logit_scale must be a float or a tensor of one element, got shape (4,); give one value for all rows."),
    "temperature-size": (
        lambda: co.info_nce(X, Y, temperature=torch.ones(5)), ValueError,
        "temperature must have shape (4,), got (5,); give one value per row of query."),
    "temperature-device": (
        lambda: co.supcon(X, IDS, temperature=torch.ones(1, device="meta")), ValueError,
        'temperature must be on cpu, got meta; call temperature.to("cpu").'),
    "sigma": (
        lambda: co.dclw(X, X, sigma=0), ValueError,
        "sigma must be a positive float, got 0; pass a value such as 0.5."),
    "sigma-tensor": (
        lambda: co.dclw(X, X, sigma=torch.tensor(0.5)), ValueError,
        "sigma must be a positive float, got tensor(0.5000); pass a value such as 0.5."),
    "sigma-infinite": (
        lambda: co.dclw(X, X, sigma=float("inf")), ValueError,
        "sigma must be a positive float, got inf; pass a value such as 0.5."),
    # options
    "label_smoothing-one": (
        lambda: co.info_nce(X, Y, label_smoothing=1.0), ValueError,
        "label_smoothing must be a float in [0, 1), got 1.0; 0.0 switches it off."),
    "label_smoothing-negative": (
        lambda: co.clip_loss(X, X, 1.0, label_smoothing=-0.1), ValueError,
        "label_smoothing must be a float in [0, 1), got -0.1; 0.0 switches it off."),
    "label_smoothing-bool": (
        lambda: co.clip_loss(X, X, 1.0, label_smoothing=False), ValueError,
        "label_smoothing must be a float in [0, 1), got False; 0.0 switches it off."),
    "reduction": (
        lambda: co.clip_loss(X, X, 1.0, reduction="avg"), ValueError,
        "reduction must be one of 'mean', 'sum', 'none', got 'avg'."),
    "normalize": (
        lambda: co.nt_xent(X, X, normalize="yes"), ValueError,
        "normalize must be one of True, False, got 'yes'."),
    "variant": (
        lambda: co.supcon(X, IDS, variant="both"), ValueError,
        "variant must be one of 'out', 'in', got 'both'."),
    "empty": (
        lambda: co.supcon(X, IDS, empty="keep"), ValueError,
        "empty must be one of 'zero', 'drop', got 'keep'."),
    "ids": (
        lambda: op(X, row_ids=IDS, ids="only"), ValueError,
        "ids must be one of 'exclude', 'restrict', got 'only'."),
    "ids-restrict-none": (
        lambda: op(X, Y, ids="restrict"), ValueError,
        'row_ids must be given with ids="restrict", got None; pass ids="exclude" for no groups.'),
    "ids-one_side-rows": (
        lambda: op(X, Y, row_ids=IDS), ValueError,
        "col_ids must be given together with row_ids, got only row_ids; pass both or neither."),
    "ids-one_side-cols": (
        lambda: op(X, Y, col_ids=torch.arange(5)), ValueError,
        "row_ids must be given together with col_ids, got only col_ids; pass both or neither."),
    "ids-one_side-queries": (
        lambda: co.info_nce(X, Y, query_ids=IDS), ValueError,
        "key_ids must be given together with query_ids, got only query_ids; pass both or neither."),
    "directions-none": (
        lambda: op(X, Y, rows=False), ValueError,
        "rows or cols must be True, got rows=False, cols=False; there would be nothing to do."),
    "self-col_scale": (
        lambda: op(X, col_scale=1.0), ValueError,
        "col_scale must be None in self-similarity (y=None), where the row option applies to both sides, "
        "got a value; pass y=x for logits that are not symmetric."),
    "self-col_bias": (
        lambda: op(X, col_bias=1.0), ValueError,
        "col_bias must be None in self-similarity (y=None), where the row option applies to both sides, "
        "got a value; pass y=x for logits that are not symmetric."),
    "self-col_ids": (
        lambda: op(X, row_ids=IDS, col_ids=IDS), ValueError,
        "col_ids must be None in self-similarity (y=None), where the row option applies to both sides, "
        "got a value; pass y=x for logits that are not symmetric."),
    "self-cols": (
        lambda: op(X, cols=True), ValueError,
        "rows=True, cols=False is expected in self-similarity (y=None), got rows=True, cols=True; "
        "the columns have the same result, or pass y=x."),
    "self-no_rows": (
        lambda: op(X, rows=False, cols=True), ValueError,
        "rows=True, cols=False is expected in self-similarity (y=None), got rows=False, cols=True; "
        "the columns have the same result, or pass y=x."),
    # supcon's features
    "supcon-1d": (
        lambda: co.supcon(X[0], IDS), ValueError,
        "features must have shape (N, D), got (3,); {axes (N, D)}."),
    "supcon-4d": (
        lambda: co.supcon(X[None, None], IDS), ValueError,
        "features must have shape (N, V, D), got (1, 1, 4, 3); {axes (N, V, D)}."),
    "supcon-list": (
        lambda: co.supcon([[1.0]], IDS), TypeError,
        "features must be a torch.Tensor, got list; call torch.as_tensor(features)."),
    # volume_logsumexp
    "volume-anchor": (
        lambda: co.volume_logsumexp(X[0], X[:, None]), ValueError,
        "anchor must have shape (N, D), got (3,); {axes (N, D)}."),
    "volume-tuples": (
        lambda: co.volume_logsumexp(X, X), ValueError,
        "tuples must have shape (M, P, D), got (4, 3); {axes (M, P, D)}."),
    "volume-dtype": (
        lambda: co.volume_logsumexp(X, X[:, None].double()), TypeError,
        "tuples must have the dtype of anchor, float32, got float64; call tuples.to(anchor.dtype)."),
    "volume-five": (
        lambda: co.volume_logsumexp(X, X[:, None].expand(4, 5, 3)), ValueError,
        "tuples must have 1 to 4 vectors each (P of (M, P, D)), got shape (4, 5, 3); "
        "another loss leaves modalities out, or averages some."),
    "volume-none": (
        lambda: co.volume_logsumexp(X, X[:, None, :][:, :0]), ValueError,
        "tuples must have 1 to 4 vectors each (P of (M, P, D)), got shape (4, 0, 3); "
        "another loss leaves modalities out, or averages some."),
    "volume-no_direction": (
        lambda: co.volume_logsumexp(X, X[:, None], rows=False), ValueError,
        "rows or cols must be True, got rows=False, cols=False; there would be nothing to do."),
    "volume-scale": (
        lambda: co.volume_logsumexp(X, Y[:, None], col_scale=torch.ones(4)), ValueError,
        "col_scale must have shape (5,), got (4,); give one value per row of tuples."),
    "volume-exclude": (
        lambda: co.volume_logsumexp(X, Y[:, None], exclude=torch.ones(4)), TypeError,
        "exclude must be an integer tensor, got float32; exclude.long() keeps values that are whole."),
    # area_logsumexp
    "area-side": (
        lambda: co.area_logsumexp(X, Y, X), ValueError,
        "y must have an entry for each row of x, N = 5, got shape (4, 3); its first axis is that of the rows."),
    "area-dtype": (
        lambda: co.area_logsumexp(X, Y, Y.double()), TypeError,
        "y must have the dtype of anchor, float32, got float64; call y.to(anchor.dtype)."),
    "area-squared": (
        lambda: co.area_logsumexp(X, Y, Y, squared="no"), ValueError,
        "squared must be one of True, False, got 'no'."),
    "area-no_direction": (
        lambda: co.area_logsumexp(X, Y, Y, rows=False), ValueError,
        "rows or cols must be True, got rows=False, cols=False; there would be nothing to do."),
    "area-scale": (
        lambda: co.area_logsumexp(X, Y, Y, col_scale=torch.ones(4)), ValueError,
        "col_scale must have shape (5,), got (4,); give one value per row of x."),
    "area-backend": (
        lambda: co.triangle_loss(X, X, X, backend="cpu"), RuntimeError,
        'backend="cpu" can\'t run area_logsumexp: cpu has no area_logsumexp. Pass backend="auto".'),
    # views
    "views-list": (
        lambda: co.mv_infonce([X, X]), TypeError,
        "views must be a torch.Tensor, got list; call torch.stack(views)."),
    "views-2d": (
        lambda: co.mv_dhel(X), ValueError,
        "views must have shape (V, N, D), got (4, 3); {axes (V, N, D)}."),
    "views-one": (
        lambda: co.pvc(X[None]), ValueError,
        "views must have at least two views (V >= 2), got shape (1, 4, 3); its axes are views, instances, features."),
    "views-temperature": (
        lambda: co.mv_infonce(VIEWS, temperature=torch.ones(2)), ValueError,
        "temperature must be a float or a tensor of one element, got shape (2,); give one value for all rows."),
    "views-dhel": (
        lambda: co.dhel(X, Y), ValueError,
        "z2 must have the shape of z1, (4, 3), got (5, 3); row i of z2 is the positive of row i of z1."),
    "include_same_view": (
        lambda: co.mv_infonce(VIEWS, include_same_view="no"), ValueError,
        "include_same_view must be one of True, False, got 'no'."),
    "aggregate": (
        lambda: co.pvc(VIEWS, aggregate="mean"), ValueError,
        "aggregate must be one of 'geometric', 'arithmetic', got 'mean'."),
    "negatives-shape": (
        lambda: co.info_nce(X, X, negatives=X), ValueError,
        "negatives must have shape (N, H, D), got (4, 3); its axes are queries, the negatives of each, features; "
        "negatives of all queries are more rows of key."),
    "negatives-rows": (
        lambda: co.info_nce(X, X, negatives=X[:3, None]), ValueError,
        "negatives must have an entry for each row of query, N = 4, got shape (3, 1, 3); its first axis is that of the "
        "rows."),
    "views-ids": (
        lambda: co.mv_infonce(VIEWS, ids=torch.arange(2)), ValueError,
        "ids must have shape (4,), got (2,); give one value per row of views[0]."),
    "views-weights": (
        lambda: co.pvc(VIEWS, sample_weight=torch.ones(2, 4)), ValueError,
        "sample_weight must have shape (4,), got (2, 4); give one value per row of views[0]."),
    "pairwise-ids": (
        lambda: co.pairwise_views(VIEWS, "info_nce", ids=torch.arange(8)), ValueError,
        "ids must have shape (4,), got (8,); give one value per row of views[0]."),
    "two_views-ids": (
        lambda: co.nt_xent(X, X, ids=torch.arange(8)), ValueError,
        "ids must have shape (4,), got (8,); give one value per row of z1."),
    "two_views-ids-float": (
        lambda: co.dcl(X, X, ids=torch.ones(4)), TypeError,
        "ids must be an integer tensor, got float32; ids.long() keeps values that are whole."),
    "two_views-weights": (
        lambda: co.dhel(X, X, sample_weight=torch.ones(8)), ValueError,
        "sample_weight must have shape (4,), got (8,); give one value per row of z1."),
    # supcon against keys
    "supcon-keys_alone": (
        lambda: co.supcon(X, IDS, keys=Y), ValueError,
        "key_labels must be given together with keys, got only keys; pass both or neither."),
    "supcon-key_labels_alone": (
        lambda: co.supcon(X, IDS, key_labels=IDS), ValueError,
        "keys must be given together with key_labels, got only key_labels; pass both or neither."),
    "supcon-keys_3d": (
        lambda: co.supcon(X, IDS, keys=VIEWS, key_labels=IDS), ValueError,
        "keys must have shape (M, D), got (2, 4, 3); every row is a key with a label of its own; "
        "flatten its first axes, and repeat key_labels."),
    "supcon-keys_size": (
        lambda: co.supcon(X, IDS, keys=Y[:, :2], key_labels=torch.arange(5)), ValueError,
        "keys must have the feature size of features, D = 3, got 2; project both to one size."),
    "supcon-keys_dtype": (
        lambda: co.supcon(X, IDS, keys=Y.double(), key_labels=torch.arange(5)), TypeError,
        "keys must have the dtype of features, float32, got float64; call keys.to(features.dtype)."),
    "supcon-key_labels": (
        lambda: co.supcon(X, IDS, keys=Y, key_labels=IDS), ValueError,
        "key_labels must have shape (5,), got (4,); give one value per row of keys."),
    "supcon-weights": (
        lambda: co.supcon(VIEWS, IDS[:2], sample_weight=torch.ones(2, 4)), ValueError,
        "sample_weight must have shape (2,), got (2, 4); give one value per row of features."),
    "pairwise-loss": (
        lambda: co.pairwise_views(VIEWS, "dhel"), ValueError,
        "loss must be one of 'nt_xent', 'info_nce', 'dcl', got 'dhel'."),
    "pairwise-stats": (
        lambda: co.pairwise_views(VIEWS, "dcl", return_stats=True), ValueError,
        "return_stats must be False, got True: every pair of views has its own statistics; "
        "call dcl(views[0], views[1], return_stats=True)."),
    # distances
    "uniformity-t": (
        lambda: co.uniformity(X, t=0.0), ValueError,
        "t must be a positive float, got 0.0; pass a value such as 0.5."),
    "uniformity-rows": (
        lambda: co.uniformity(X, Y), ValueError,
        "y must have the shape of x, (4, 3), got (5, 3); row i of y is the positive of row i of x."),
    "joint_entropy-3d": (
        lambda: co.joint_entropy(VIEWS), ValueError,
        "x must have shape (N, D), got (2, 4, 3); {axes (N, D)}."),
    "alignment-alpha": (
        lambda: co.alignment(X, X, alpha=torch.tensor(2.0)), ValueError,
        "alpha must be a positive float, got tensor(2.); pass a value such as 0.5."),
    "alignment-dtype": (
        lambda: co.alignment(X, X.double()), TypeError,
        "y must have the dtype of x, float32, got float64; call y.to(x.dtype)."),
    # volumes
    "vectors-1d": (
        lambda: co.gramian_volume(X[0]), ValueError,
        "vectors must have shape (..., K, D) with K >= 1 and D >= 1, got (3,); "
        "stack the K vectors of a set along dimension -2."),
    "vectors-none": (
        lambda: co.gramian_volume(X[:0]), ValueError,
        "vectors must have shape (..., K, D) with K >= 1 and D >= 1, got (0, 3); "
        "stack the K vectors of a set along dimension -2."),
    "vectors-list": (
        lambda: co.gramian_volume([[1.0]]), TypeError,
        "vectors must be a torch.Tensor, got list; call torch.as_tensor(vectors)."),
    "vectors-integer": (
        lambda: co.gramian_volume(X.long()), TypeError,
        "vectors must be one of float32, bfloat16, float16, float64, got int64; call vectors.float()."),
    "others-none": (
        lambda: co.gram_loss(X), ValueError,
        "others must be 1 to 4 tensors beside the anchor, got 0; pass each modality as an argument."),
    "others-five": (
        lambda: co.sample_gram_negatives(X, X, X, X, X, X), ValueError,
        "others must be 1 to 4 tensors beside the anchor, got 5; pass each modality as an argument."),
    "others-list": (
        lambda: co.gram_loss(X, [X, X]), TypeError,
        "others must be 1 to 4 tensors beside the anchor, got a list; put * before it."),
    "others-rows": (
        lambda: co.gram_loss(X, X, Y), ValueError,
        "others[1] must have the shape of anchor, (4, 3), got (5, 3); "
        "row i of others[1] is the positive of row i of anchor."),
    "others-dtype": (
        lambda: co.gram_loss(X, X.double()), TypeError,
        "others[0] must have the dtype of anchor, float32, got float64; call others[0].to(anchor.dtype)."),
    "others-triangle": (
        lambda: co.triangle_loss(X, X, X[:, :2]), ValueError,
        "y must have the feature size of anchor, D = 3, got 2; project both to one size."),
    "detach_others": (
        lambda: co.gram_loss(X, X, detach_others="no"), ValueError,
        "detach_others must be one of True, False, got 'no'."),
    "squared": (
        lambda: co.triangle_loss(X, X, X, squared=2), ValueError,
        "squared must be one of True, False, got 2."),
    "temperature-gram": (
        lambda: co.gram_loss(X, X, temperature=torch.ones(4)), ValueError,
        "temperature must be a float or a tensor of one element, got shape (4,); give one value for all rows."),
    "weights-triangle": (
        lambda: co.triangle_loss(X, X, X, sample_weight=torch.ones(3)), ValueError,
        "sample_weight must have shape (4,), got (3,); give one value per row of anchor."),
    "retrieve-tuples": (
        lambda: co.gram_retrieve(X, X, 1), ValueError,
        "tuples must have shape (M, P, D), got (4, 3); {axes (M, P, D)}."),
    "retrieve-k": (
        lambda: co.gram_retrieve(X, X[:, None], 5), ValueError,
        "k must be an integer in [1, 4], the number of tuples, got 5."),
    "retrieve-k-zero": (
        lambda: co.gram_retrieve(X, X[:, None], 0), ValueError,
        "k must be an integer in [1, 4], the number of tuples, got 0."),
    "draw-one": (
        lambda: co.sample_gram_negatives(X[:1], X[:1]), ValueError,
        "anchor must have at least 2 rows, got 1; with one tuple there is no negative to draw."),
    # what has no row of features to read
    "features-nested": (
        lambda: co.nt_xent(NESTED, NESTED), TypeError,
        "z1 must be a plain tensor, got a nested one; its rows are torch.cat(z1.unbind()), "
        "of which row i goes with row i of the other arguments."),
    "features-jagged": (
        lambda: co.mv_dhel(JAGGED), TypeError,
        "views must be a plain tensor, got a nested one; its rows are torch.cat(views.unbind()), "
        "of which row i goes with row i of the other arguments."),
    "vectors-nested": (
        lambda: co.gramian_volume(NESTED), TypeError,
        "vectors must be a plain tensor, got a nested one; its rows are torch.cat(vectors.unbind()), "
        "of which row i goes with row i of the other arguments."),
    "temperature-nested": (
        lambda: co.nt_xent(X, X, temperature=NESTED), TypeError,
        "temperature must be a plain tensor, got a nested one; its rows are torch.cat(temperature.unbind()), "
        "of which row i goes with row i of the other arguments."),
    "features-none": (
        lambda: co.nt_xent(X, None), TypeError,
        "z2 must be a torch.Tensor, got NoneType; pass a tensor, there is no default."),
    "features-tensors": (
        lambda: co.supcon([X, X], IDS), TypeError,
        "features must be a torch.Tensor, got list; make one of its tensors, with torch.cat or torch.stack."),
    "keys-of-each": (
        lambda: co.info_nce(X, torch.zeros(4, 3, 3)), ValueError,
        "key must have shape (M, D), got (4, 3, 3); every row is a key of all queries: flatten the first two axes of "
        "keys (N, K, D), and pass target=, the row of each query's positive, which is torch.arange(N) * K where it is "
        "the first of K."),
    "labels-none": (
        lambda: co.supcon(X, None), TypeError,
        "labels must be a torch.Tensor, got NoneType; pass a tensor, there is no default."),
    "labels-sparse": (
        lambda: co.supcon(X, IDS.to_sparse()), TypeError,
        "labels must be a dense (strided) tensor, got layout torch.sparse_coo; call labels.to_dense()."),
    "temperature-dtensor": (
        lambda: co.info_nce(X, X, temperature=distributed()), TypeError,
        "temperature must be a plain tensor, got a DTensor; call temperature.full_tensor(), "
        "temperature.to_local() is the part of this rank alone."),
    "logit_scale-dtensor": (
        lambda: co.clip_loss(X, X, distributed()), TypeError,
        "logit_scale must be a plain tensor, got a DTensor; call logit_scale.full_tensor(), "
        "logit_scale.to_local() is the part of this rank alone."),
    "scale-dtensor": (
        lambda: op(X, row_scale=distributed()), TypeError,
        "row_scale must be a plain tensor, got a DTensor; call row_scale.full_tensor(), "
        "row_scale.to_local() is the part of this rank alone."),
    "temperature-sparse": (
        lambda: co.nt_xent(X, X, temperature=torch.ones(1).to_sparse()), TypeError,
        "temperature must be a dense (strided) tensor, got layout torch.sparse_coo; call temperature.to_dense()."),
    "temperature-logit_scale": (
        lambda: co.nt_xent(X, X, temperature=co.nn.LogitScale()), TypeError,
        "temperature must be a float or a tensor, got LogitScale; "
        "call it for its value, of a LogitScale 1 / temperature()."),
    "logit_scale-module": (
        lambda: co.clip_loss(X, X, co.nn.LogitScale()), TypeError,
        "logit_scale must be a float or a tensor, got LogitScale; call logit_scale() for its value."),
    "temperature-tensor-zero": (
        lambda: co.nt_xent(X, X, temperature=torch.tensor(0.0)), ValueError,
        "temperature must be positive, got 0.0; clamp it, or learn its logarithm."),
    "temperature-parameter-negative": (
        lambda: co.supcon(X, IDS, temperature=torch.nn.Parameter(torch.tensor([-0.5]))), ValueError,
        "temperature must be positive, got -0.5; clamp it, or learn its logarithm."),
    "temperature-rows-negative": (
        lambda: co.info_nce(X, X, temperature=torch.tensor([1.0, 2.0, -0.5, 1.0])), ValueError,
        "temperature must be positive, got -0.5; clamp it, or learn its logarithm."),
    "logit_scale-logarithm": (
        lambda: co.clip_loss(X, X, torch.tensor(-2.5)), ValueError,
        "logit_scale must be positive, got -2.5; pass it exponentiated, such as 1 / 0.07."),
    # what open_clip passes
    "output_dict": (
        lambda: co.clip_loss(X, X, 1.0, output_dict=True), ValueError,
        'output_dict must be False, got True; the loss is a tensor, put it into {"contrastive_loss": loss}.'),
    "logit_bias-matrix": (
        lambda: co.clip_loss(X, X, 1.0, logit_bias=torch.zeros(4, 4)), ValueError,
        "logit_bias must be a float or a tensor of one element, got shape (4, 4); give one value for all rows."),
    "logit_bias-device": (
        lambda: co.clip_loss(X, X, 1.0, logit_bias=torch.zeros(1, device="meta")), ValueError,
        'logit_bias must be on cpu, got meta; call logit_bias.to("cpu").'),
    "output_dict-siglip": (
        lambda: co.siglip_loss(X, X, 1.0, 0.0, output_dict=True), ValueError,
        'output_dict must be False, got True; the loss is a tensor, put it into {"contrastive_loss": loss}.'),
    # siglip_loss
    "siglip-bias-none": (
        lambda: co.siglip_loss(X, X, 1.0, None), TypeError,
        "logit_bias must be a float or a tensor, got NoneType; pass a number."),
    "siglip-bias-infinite": (
        lambda: co.siglip_loss(X, X, 1.0, -float("inf")), ValueError,
        "logit_bias must be finite, got -inf."),
    "siglip-scale": (
        lambda: co.siglip_loss(X, X, -2.0, 0.0), ValueError,
        "logit_scale must be positive, got -2.0; pass it exponentiated, such as 1 / 0.07."),
    "siglip-rows": (
        lambda: co.siglip_loss(X, Y, 1.0, 0.0), ValueError,
        "text_features must have the shape of image_features, (4, 3), got (5, 3); "
        "row i of text_features is the positive of row i of image_features."),
    "siglip-weight": (
        lambda: co.siglip_loss(X, X, 1.0, 0.0, weight="per_text"), ValueError,
        "weight must be one of 'per_pair', 'per_anchor', got 'per_text'."),
    "siglip-ids": (
        lambda: co.siglip_loss(X, X, 1.0, 0.0, ids=IDS.float()), TypeError,
        "ids must be an integer tensor, got float32; ids.long() keeps values that are whole."),
    # nt_xent_labelled
    "labelled-labels": (
        lambda: co.nt_xent_labelled(X, IDS[:3]), ValueError,
        "labels must have shape (4,), got (3,); give one value per row of features."),
    "labelled-sets": (
        lambda: co.nt_xent_labelled(X, torch.ones(4, 2)), TypeError,
        "labels must be an integer tensor, got float32; labels.long() keeps values that are whole."),
    "labelled-over": (
        lambda: co.nt_xent_labelled(X, IDS, over="rows"), ValueError,
        "over must be one of 'pairs', 'anchors', got 'rows'."),
    "labelled-weights": (
        lambda: co.nt_xent_labelled(X, IDS, sample_weight=torch.ones(5)), ValueError,
        "sample_weight must have shape (4,), got (5,); give one value per row of features."),
    # several labels per sample
    "label_sets-rows": (
        lambda: co.supcon(X, torch.ones(5, 2)), ValueError,
        "labels must have shape (4,) or (4, C) with C >= 2, got (5, 2); "
        "give one label, or an entry of each of C labels, per row of features."),
    "label_sets-views": (
        lambda: co.supcon(X[:, None], torch.ones(4, 1, 2)), ValueError,
        "labels must have shape (4,) or (4, C) with C >= 2, got (4, 1, 2); "
        "give one label, or an entry of each of C labels, per row of features."),
    "label_sets-device": (
        lambda: co.supcon(X, torch.ones(4, 2, device="meta")), ValueError,
        "labels must be on the device of features, cpu, got meta; call labels.to(features.device)."),
    "label_sets-keys": (
        lambda: co.supcon(X, torch.ones(4, 2), keys=Y, key_labels=torch.ones(5, 3)), ValueError,
        "key_labels must have shape (5, 2), got (5, 3); give an entry of each of the 2 labels per row of keys."),
    "label_sets-keys-single": (
        lambda: co.supcon(X, torch.ones(4, 2), keys=Y, key_labels=torch.arange(5)), ValueError,
        "key_labels must have shape (5, 2), got (5,); give an entry of each of the 2 labels per row of keys."),
    "label_sets-keys-list": (
        lambda: co.supcon(X, torch.ones(4, 2), keys=Y, key_labels=[[0, 1]] * 5), TypeError,
        "key_labels must be a torch.Tensor, got list; call torch.as_tensor(key_labels)."),
    "label_sets-of-keys-alone": (
        lambda: co.supcon(X, IDS, keys=Y, key_labels=torch.ones(5, 2).long()), ValueError,
        "key_labels must have shape (5,), got (5, 2); give one value per row of keys."),
    # mw_loss
    "mw-compare": (
        lambda: co.mw_loss(X, X, compare="each"), ValueError,
        "compare must be one of 'all', 'own', got 'each'."),
    "mw-fewer_keys": (
        lambda: co.mw_loss(Y, X), ValueError,
        "key must have at least as many rows as query, N = 5, got M = 4; "
        "row i of key is the positive of query i, or pass target=."),
    "mw-temperature": (
        lambda: co.mw_loss(X, X, temperature=torch.ones(4)), ValueError,
        "temperature must be a float or a tensor of one element, got shape (4,); give one value for all rows."),
    # guided_info_nce
    "guided-rows": (
        lambda: co.guided_info_nce(X, Y), ValueError,
        "positive must have the shape of anchor, (4, 3), got (5, 3); row i of positive is the positive of row i of "
        "anchor."),
    "guided-negatives": (
        lambda: co.guided_info_nce(X, X, negatives=X[:, None]), ValueError,
        "negatives must have shape (M, D), got (4, 1, 3); every row is a candidate of all anchors."),
    "guided-margin": (
        lambda: co.guided_info_nce(X, X, margin=torch.tensor(0.1)), ValueError,
        "margin must be a finite float, got tensor(0.1000); 0.0 switches it off."),
    "guided-margin-nan": (
        lambda: co.guided_info_nce(X, X, margin=float("nan")), ValueError,
        "margin must be a finite float, got nan; 0.0 switches it off."),
    "guided-strategy": (
        lambda: co.guided_info_nce(X, X, margin_strategy="percent"), ValueError,
        "margin_strategy must be one of 'absolute', 'relative', got 'percent'."),
    "guided-guide-tensor": (
        lambda: co.guided_info_nce(X, X, guide=X), TypeError,
        "guide must be 2 tensors, the guide's features of anchors and positives, got Tensor."),
    "guided-guide-two": (
        lambda: co.guided_info_nce(X, X, negatives=Y, guide=(X, X)), TypeError,
        "guide must be 3 tensors, the guide's features of anchors, positives and negatives, got 2 values."),
    "guided-guide-rows": (
        lambda: co.guided_info_nce(X, X, guide=(X, Y)), ValueError,
        "guide[1] must have an entry for each row of positive, N = 4, got shape (5, 3); its first axis is that of the "
        "rows."),
    "guided-guide-width": (
        lambda: co.guided_info_nce(X, X, guide=(X, X[:, :2])), ValueError,
        "guide[1] must have the feature size of guide[0], D = 3, got 2; project both to one size."),
    "guided-guide-dtensor": (
        lambda: co.guided_info_nce(X, X, guide=(distributed(), X)), TypeError,
        "guide[0] must be a plain tensor, got a DTensor; call guide[0].full_tensor(), "
        "guide[0].to_local() is the part of this rank alone."),
    # soft_target_loss
    "soft-teacher-rows": (
        lambda: co.soft_target_loss(X, X, Y, X), ValueError,
        "u must have an entry for each row of x, N = 4, got shape (5, 3); its first axis is that of the rows."),
    "soft-teacher-width": (
        lambda: co.soft_target_loss(X, X, X, X[:, :2]), ValueError,
        "v must have the feature size of u, D = 3, got 2; project both to one size."),
    "soft-teacher-none": (
        lambda: co.soft_target_loss(X, X, X, None), TypeError,
        "v must be a torch.Tensor, got NoneType; pass a tensor, there is no default."),
    "soft-teacher-nested": (
        lambda: co.soft_target_loss(X, X, NESTED, X), TypeError,
        "u must be a plain tensor, got a nested one; its rows are torch.cat(u.unbind()), "
        "of which row i goes with row i of the other arguments."),
    "soft-y": (
        lambda: co.soft_target_loss(X, X[0], X, X), ValueError,
        "y must have shape (M, D), got (3,); every row is a column of the similarities."),
    "soft-symmetric": (
        lambda: co.soft_target_loss(X, Y, X, Y), ValueError,
        "y must have an entry for each row of x, N = 4, got shape (5, 3); its first axis is that of the rows."),
    "soft-one_hot-columns": (
        lambda: co.soft_target_loss(Y, X, Y, X, symmetric=False, one_hot=0.5), ValueError,
        "y must have at least as many rows as x with one_hot, N = 5, got M = 4; "
        "row i of y is the positive of row i of x."),
    "soft-one_hot": (
        lambda: co.soft_target_loss(X, X, X, X, one_hot=1.0), ValueError,
        "one_hot must be a float in [0, 1), got 1.0; 0.0 switches it off."),
    "soft-teacher_temperature": (
        lambda: co.soft_target_loss(X, X, X, X, teacher_temperature=0), ValueError,
        "teacher_temperature must be positive, got 0; pass a value such as 0.07."),
    # sums, expectations, the best k, guides
    "sum-of": (
        lambda: co.similarity_sum(X, of="exp"), ValueError,
        "of must be one of 'identity', 'softplus', 'relu', 'sigmoid', 'square', 'step', got 'exp'."),
    "sum-self": (
        lambda: co.similarity_sum(X, col_bias=1.0), ValueError,
        "col_bias must be None in self-similarity (y=None), where the row option applies to both sides, "
        "got a value; pass y=x for logits that are not symmetric."),
    "guide-one": (
        lambda: op(X, Y, guide=X, ceiling=0.0), TypeError,
        "guide must be a pair of tensors, for the rows of x and of y, got Tensor; pass (u, v)."),
    "guide-three": (
        lambda: co.similarity_sum(X, Y, guide=[X, Y, Y], ceiling=0.0), TypeError,
        "guide must be a pair of tensors, for the rows of x and of y, got 3 values; pass (u, v)."),
    "guide-self": (
        lambda: op(X, guide=(X, X), ceiling=0.0), TypeError,
        "guide must be one tensor in self-similarity (y=None), got a tuple; pass y=x for two that differ."),
    "guide-rows": (
        lambda: op(X, Y, guide=(X, X), ceiling=0.0), ValueError,
        "guide[1] must have an entry for each row of y, N = 5, got shape (4, 3); its first axis is that of the rows."),
    "guide-width": (
        lambda: op(X, Y, guide=(X, Y[:, :2]), ceiling=0.0), ValueError,
        "guide[1] must have the feature size of guide, D = 3, got 2; project both to one size."),
    "guide-no_ceiling": (
        lambda: op(X, Y, guide=(X, Y)), ValueError,
        "ceiling or col_ceiling must be given with a guide, got neither; "
        "pairs are left out by what their guide is compared with."),
    "guide-keep-no_ceiling": (
        lambda: op(X, keep="above"), ValueError,
        "ceiling or col_ceiling must be given with keep='above', got neither; "
        "pairs are left out by what their guide is compared with."),
    "guide-keep": (
        lambda: op(X, keep="under"), ValueError,
        "keep must be one of 'below', 'above', got 'under'."),
    "ceiling-size": (
        lambda: op(X, Y, ceiling=torch.ones(5)), ValueError,
        "ceiling must have shape (4,), got (5,); give one value per row of x."),
    "ceiling-self": (
        lambda: op(X, col_ceiling=1.0), ValueError,
        "col_ceiling must be None in self-similarity (y=None), where the row option applies to both sides, "
        "got a value; pass y=x for logits that are not symmetric."),
    "teacher-one": (
        lambda: co.similarity_expectation(X, Y, X), ValueError,
        "v must be given together with u, got only u; pass both or neither."),
    "teacher-self": (
        lambda: co.similarity_expectation(X, None, X, X), ValueError,
        "v must be None in self-similarity (y=None), got a value; pass y=x for two that differ."),
    "teacher-none": (
        lambda: co.similarity_expectation(X, Y, teacher_row_scale=2.0), ValueError,
        "u must be given with scales or biases of a teacher, got None; without it the student is its own teacher."),
    "teacher-scale": (
        lambda: co.similarity_expectation(X, Y, X, Y, teacher_col_scale=torch.ones(4)), ValueError,
        "teacher_col_scale must have shape (5,), got (4,); give one value per row of y."),
    "topk-k": (
        lambda: co.similarity_topk(X, Y, 0), ValueError,
        "k must be an integer in [1, 1024], the number of columns that are kept of each row at most, got 0."),
    "topk-k-large": (
        lambda: co.similarity_topk(X, Y, 1025), ValueError,
        "k must be an integer in [1, 1024], the number of columns that are kept of each row at most, got 1025."),
    "topk-largest": (
        lambda: co.similarity_topk(X, Y, largest="yes"), ValueError,
        "largest must be one of True, False, got 'yes'."),
    "topk-noise": (
        lambda: co.similarity_topk(X, Y, noise=2.0), ValueError,
        "noise must be an integer of 64 bits, the seed of the draw, got 2.0."),
    "topk-noise-smallest": (
        lambda: co.similarity_topk(X, Y, largest=False, noise=7), ValueError,
        "noise must be None with largest=False, got 7; draws are of the largest logits."),
    # metrics
    "recall-ks": (
        lambda: co.metrics.recall_at_k(X, X, ks=5), TypeError,
        "ks must be a list or tuple of at least one integer, got 5; pass (1, 5, 10)."),
    "recall-ks-none": (
        lambda: co.metrics.recall_at_k(X, X, ks=()), TypeError,
        "ks must be a list or tuple of at least one integer, got (); pass (1, 5, 10)."),
    "recall-ks-large": (
        lambda: co.metrics.recall_at_k(X, X, ks=(1, 2000)), ValueError,
        "ks must be an integer in [1, 1024], the number of keys that are kept of each query at most, got 2000."),
    "recall-target-ids": (
        lambda: co.metrics.recall_at_k(X, X, IDS, query_ids=IDS, key_ids=IDS), ValueError,
        "target must be None with query_ids and key_ids, got a value; they say which keys are positives."),
    "recall-target": (
        lambda: co.metrics.recall_at_k(X, Y, IDS + 2), ValueError,
        "target must be in [0, M) = [0, 5), got values from 2 to 5."),
    "recall-keys": (
        lambda: co.metrics.recall_at_k(Y, X), ValueError,
        "key must have at least as many rows as query, N = 5, got M = 4; "
        "row i of key is the positive of query i, or pass target=."),
    "recall-normalize": (
        lambda: co.metrics.recall_at_k(X, X, normalize="yes"), ValueError,
        "normalize must be one of True, False, got 'yes'."),
    # backends
    "backend-op": (
        lambda: op(X, backend="triton2"), ValueError,
        "backend must be one of {names}, got 'triton2'."),
    "backend-loss": (
        lambda: co.info_nce(X, Y, backend="gpu"), ValueError,
        "backend must be one of {names}, got 'gpu'."),
    "backend-device": (
        lambda: op(X.to("meta"), backend="cpu"), RuntimeError,
        'backend="cpu" can\'t run similarity_logsumexp: cpu runs CPU tensors, got a tensor on meta. '
        'Pass backend="auto".'),
    "explain-features": (
        lambda: co.explain(X[0]), ValueError,
        "x must have shape (N, D), got (3,); {axes (N, D)}."),
    "explain-op": (
        lambda: co.explain(X, op="attention"), ValueError,
        "op must be one of {ops}, got 'attention'."),
    "explain-backend": (
        lambda: co.explain(X.to("meta"), backend="cpu"), RuntimeError,
        'backend="cpu" can\'t run similarity_logsumexp: cpu runs CPU tensors, got a tensor on meta. '
        'Pass backend="auto".'),
    # modules
    "module-options": (
        lambda: co.nn.SupCon(variant="both"), ValueError,
        "variant must be one of 'out', 'in', got 'both'."),
    "module-unknown": (
        lambda: co.nn.NTXent(tau=1.0), TypeError,
        "NTXent has no option tau, got tau=1.0; its options are z2, temperature, ids, sample_weight, normalize, "
        "reduction, return_stats, backend."),
    "module-unknown-pairwise": (
        lambda: co.nn.PairwiseViews(loss="dcl", tau=1.0), TypeError,
        "PairwiseViews has no option tau, got tau=1.0; its options are loss, ids, temperature, sample_weight, "
        "normalize, reduction, return_stats, backend."),
    "module-pairwise-loss": (
        lambda: co.nn.PairwiseViews(loss="dhel"), ValueError,
        "loss must be one of 'nt_xent', 'info_nce', 'dcl', got 'dhel'."),
    "module-pairwise-stats": (
        lambda: co.nn.PairwiseViews(return_stats=True), ValueError,
        "return_stats must be False, got True: every pair of views has its own statistics; "
        "call nt_xent(views[0], views[1], return_stats=True)."),
    "module-backend": (
        lambda: co.nn.InfoNCE(backend="gpu"), ValueError,
        "backend must be one of {names}, got 'gpu'."),
    "scale_module-shape": (
        lambda: co.nn.LogitScale(shape=(2,)), ValueError,
        "shape must be () or (1,), got (2,)."),
    "scale_module-zero": (
        lambda: co.nn.LogitScale(initial=0.0), ValueError,
        "initial must be in (0, maximum] = (0, 100.0], got 0.0."),
    "scale_module-beyond": (
        lambda: co.nn.LogitScale(initial=20.0, maximum=10.0), ValueError,
        "initial must be in (0, maximum] = (0, 10.0], got 20.0."),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name):
    call, kind, sentence = REFUSALS[name]
    sentence = sentence.replace("{names}", ", ".join(repr(known) for known in backends.NAMES))
    sentence = sentence.replace("{ops}", ", ".join(repr(known) for known in backends.tiled.OPS))
    for expected, axes in checks.AXES.items():
        sentence = sentence.replace(f"{{axes {expected}}}", axes)
    with pytest.raises(kind, match=f"^{re.escape(sentence)}$") as info:
        call()
    assert type(info.value) is kind


LOSSES = [co.info_nce, co.clip_loss, co.nt_xent, co.dcl, co.dclw, co.supcon, co.dhel, co.gram_loss, co.triangle_loss,
          co.siglip_loss, co.nt_xent_labelled, co.guided_info_nce, co.soft_target_loss,
          co.mw_loss]  # fmt: skip
OF_VIEWS = [co.mv_infonce, co.mv_dhel, co.pvc, co.pairwise_views]


@pytest.mark.parametrize("loss", LOSSES + OF_VIEWS)
@pytest.mark.parametrize("option", ["reduction", "normalize", "backend"])
def test_every_loss_checks_the_common_options(option, loss):
    arguments = {
        co.clip_loss: (X, X, 1.0), co.siglip_loss: (X, X, 1.0, 0.0), co.supcon: (X, IDS), co.nt_xent_labelled: (X, IDS),
        co.triangle_loss: (X, X, X), co.soft_target_loss: (X, X, X, X),
    }.get(loss, (X, X))  # fmt: skip
    arguments = (VIEWS,) if loss in OF_VIEWS else arguments
    with pytest.raises(ValueError, match=rf"^{option} must be one of .*, got 'wrong'\.$"):
        loss(*arguments, **{option: "wrong"})


WRONG = {
    "reduction": "avg", "normalize": "yes", "backend": "gpu", "variant": "both", "empty": "keep", "aggregate": "mean",
    "include_same_view": 1.5, "detach_others": "no", "squared": 2, "temperature": 0.0, "logit_scale": torch.tensor(1),
    "sigma": -1.0, "t": 0.0, "alpha": float("nan"), "label_smoothing": 1.0, "sample_weight": IDS, "target": IDS.float(),
    "logit_bias": "0", "output_dict": True, "ids": [0], "query_ids": X, "key_ids": IDS > 0, "keys": IDS[:, None],
    "key_labels": X[0], "weight": "per_text", "over": "rows", "compare": "each", "margin": "0.1",
    "margin_strategy": "percent", "contrast_anchors": "no", "contrast_positives": 2, "teacher_temperature": -1.0,
    "symmetric": "no", "one_hot": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(co.nn._Loss.__subclasses__(), key=str), ids=lambda kind: kind.__name__)
def test_modules_refuse_options_where_they_are_given(kind):
    """Names that no loss has, and values that need no features to be wrong."""
    known = kind._known({})
    with pytest.raises(TypeError, match=f"^{kind.__name__} has no option tau, got tau=1.0; its options are "):
        kind(tau=1.0)
    assert set(known) - set(WRONG) <= {
        "z2",
        "key",
        "negatives",
        "labels",
        "text_features",
        "positive",
        "guide",
        "x",
        "y",
        "u",
        "v",
        "loss",
        "return_stats",
    }
    for name in set(known) & set(WRONG):
        with pytest.raises((ValueError, TypeError), match=rf"^{name} must be "):
            kind(**{name: WRONG[name]})


def test_every_refusal_of_checks_is_above():
    """Counts the `raise` statements, so that a new check can't come without its sentence here."""
    assert inspect.getsource(checks).count("    raise ") == 66  # those of flex ops are in test_flex.py


# it says of every size that is compared that the comparison is not recorded
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_jit_trace_is_refused():
    x = torch.randn(4, 3)
    for op, call in {
        "similarity_logsumexp": lambda x, **options: co.info_nce(x, x.roll(1, 0), **options),
        "volume_logsumexp": lambda x, **options: co.gram_loss(x, x.roll(1, 0), **options),
        "similarity_sum": lambda x, **options: co.siglip_loss(x, x.roll(1, 0), 5.0, -5.0, **options),
        "similarity_expectation": lambda x, **options: co.soft_target_loss(x, x.roll(1, 0), x, x.roll(1, 0), **options),
        "area_logsumexp": lambda x, **options: co.triangle_loss(x, x.roll(1, 0), x.roll(2, 0), **options),
    }.items():
        sentence = (
            f"{op} can't be recorded by torch.jit.trace, got a call under it; "
            'use torch.export or torch.compile, or backend="reference".'
        )
        with pytest.raises(RuntimeError, match=f"^{re.escape(sentence)}$"):
            torch.jit.trace(call, (x,))
        traced = torch.jit.trace(lambda x, call=call: call(x, backend="reference"), (x,))
        torch.testing.assert_close(traced(x), call(x, backend="reference"))


def test_dual_tensors_are_refused():
    sentence = (
        "similarity_logsumexp has no forward-mode derivative, got a dual tensor (torch.func.jvp, forward_ad); "
        'use reverse mode, or backend="reference".'
    )
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"^{re.escape(sentence)}$"):
        op(forward_ad.make_dual(X, X), backend="tiled")


# without a batching rule PyTorch loops over the batch, and says that this is slow
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_values_are_read_only_where_that_is_free():
    """No device is synchronised, and none are asked for where there are none: on meta, under tracing and transforms."""
    x, y, negative = torch.randn(4, 3), torch.randn(5, 3), torch.tensor(-0.5)

    def call(temperature, target):
        return co.info_nce(x, y, temperature=temperature, target=target, backend="tiled")

    with pytest.raises(ValueError, match=r"^temperature must be positive, got -0\.5; "):
        call(negative, IDS)
    with pytest.raises(ValueError, match=r"^target must be in "):
        call(1.0, IDS + 4)
    checks.positive_number("temperature", negative.to("meta"))
    checks.positive_number("temperature", torch.empty(0))
    assert call(torch.tensor(float("nan")), IDS).isnan()
    assert torch.vmap(call, (0, None))(negative.expand(2), IDS).shape == (2,)
    assert torch.vmap(call, (None, 0))(1.0, torch.stack([IDS, IDS])).shape == (2,)
    assert make_fx(call)(negative, IDS) is not None
    assert torch.compile(call, backend="eager", fullgraph=True)(negative, IDS).shape == ()
    fake = FakeTensorMode().from_tensor
    x, y = fake(x), fake(y)
    assert call(fake(negative), fake(IDS)).shape == ()


def test_target_values_are_read_only_where_that_is_free():
    """A device tensor isn't synchronised: on meta there are no values, and none are asked for."""
    checks.target_range(torch.empty(4, dtype=torch.int64, device="meta"), 1)
    checks.target_range(torch.empty(0, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match=r"target must be in \[0, M\) = \[0, 0\), got values from 0 to 3"):
        co.info_nce(X, Y[:0], target=IDS)


def test_auto_takes_the_first_that_can_run(monkeypatch):
    monkeypatch.setattr(build, "missing", None)
    assert backends.choose("similarity_logsumexp", X, "auto") == "cpu"
    monkeypatch.setattr(build, "missing", "not here.")
    assert backends.choose("similarity_logsumexp", X, "auto") == "tiled"  # test_build.py has the warning
    assert backends.choose("similarity_logsumexp", X.to("meta"), "auto") == "tiled"


def test_named_backend_that_is_not_built_is_refused_with_its_sentence(monkeypatch):
    monkeypatch.setattr(build, "missing", "the C++ engine is not part of this installation.")
    sentence = (
        'backend="cpu" can\'t run similarity_logsumexp: the C++ engine is not part of this installation. '
        'Pass backend="auto".'
    )
    for call in (lambda: op(X, backend="cpu"), lambda: co.info_nce(X, Y, backend="cpu")):
        with pytest.raises(RuntimeError, match=f"^{re.escape(sentence)}$"):
            call()


def test_environment_variable_stands_in_for_auto(monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_OPS_BACKEND", "tiled")
    assert co.explain(X).chosen == "tiled"
    monkeypatch.setenv("CONTRASTIVE_OPS_BACKEND", "reference")
    assert co.explain(X).chosen == "reference"
    assert co.explain(X, backend="tiled").chosen == "tiled"
    monkeypatch.setenv("CONTRASTIVE_OPS_BACKEND", "auto")
    assert co.explain(X).chosen in backends.AUTO


def test_environment_variable_that_is_no_backend_is_refused(monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_OPS_BACKEND", "fast")
    names = ", ".join(repr(known) for known in backends.NAMES)
    with pytest.raises(
        ValueError, match=f"^{re.escape(f'CONTRASTIVE_OPS_BACKEND must be one of {names}')}, got 'fast'\\.$"
    ):
        op(X)
    assert op(X, backend="tiled").row_lse.shape == (4,)


def test_environment_variable_whose_backend_cannot_run_is_refused(monkeypatch):
    """Named is named, wherever: no silent fallback."""
    monkeypatch.setenv("CONTRASTIVE_OPS_BACKEND", "cpu")
    sentence = (
        'CONTRASTIVE_OPS_BACKEND="cpu" can\'t run similarity_logsumexp: cpu runs CPU tensors, got a tensor on meta. '
        'Pass backend="auto".'
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(sentence)}$"):
        op(X.to("meta"))


def test_no_backend_says_why_for_each(monkeypatch):
    monkeypatch.setattr(backends, "AUTO", ("cpu",))
    sentence = "no backend can run similarity_logsumexp on meta tensors: cpu runs CPU tensors, got a tensor on meta."
    with pytest.raises(RuntimeError, match=f"^{re.escape(sentence)}$"):
        op(X.to("meta"))


def test_why_not(monkeypatch):
    assert backends.why_not("tiled", "similarity_logsumexp", X) is None
    assert backends.why_not("reference", "similarity_logsumexp", X) is None
    for name in ("cpu", "tiled", "reference"):
        assert backends.why_not(name, "attention", X) == f"{name} has no attention."
    monkeypatch.setattr(build, "missing", None)
    assert backends.why_not("cpu", "similarity_logsumexp", X) is None
    assert backends.why_not("cpu", "similarity_logsumexp", X.long()) == (
        "cpu takes float32, bfloat16, float16, float64, got int64."
    )


def test_explain_is_a_report(monkeypatch):
    monkeypatch.setattr(build, "missing", "not built here.")
    for backend in (backends.cuda, backends.triton):
        monkeypatch.setattr(backend, "why_not", lambda op, x: "no GPU here.")
    report = co.explain(X.bfloat16())
    assert report.chosen == "tiled"
    reasons = {"cpu": "not built here.", "cuda": "no GPU here.", "triton": "no GPU here."}
    assert report.reasons == {**reasons, "tiled": None, "reference": None}
    assert str(report).splitlines() == [
        'similarity_logsumexp on bfloat16 tensors on cpu takes backend "tiled"',
        "  cpu        can't: not built here.",
        "  cuda       can't: no GPU here.",
        "  triton     can't: no GPU here.",
        "  tiled      chosen",
        "  reference  can run, only when named",
    ]
    monkeypatch.setattr(build, "missing", None)
    assert str(co.explain(X)).splitlines()[1:5:3] == ["  cpu        chosen", "  tiled      can run, not needed"]
