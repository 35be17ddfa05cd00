"""One level of clusters: k-means by faiss, and k-means whose clusters are of about equal size.

    centroids_KD = kmeans(x_ND, 256, seed=42)
    labels_N = nearest(x_ND, centroids_KD)                  # faiss k-means: the nearest centroid
    centroids_KD, prices_K = balanced_kmeans(x_ND, 256, slack=0.2, seed=42, epsilon=0.02)
    labels_N = nearest(x_ND, centroids_KD, prices_K)        # each centroid gets about N / 256 rows

N rows, K centroids, D dimensions; cost_NK is the squared distance. A price per centroid
turns nearest-centroid into balanced assignment: argmin over k of cost_NK + price_K.
"""

import logging
import math

import faiss
import numpy as np
import torch

from rq.embeddings import Embeddings
from rq.files import InputError

log = logging.getLogger("rq.clustering")

# faiss's own rule: more rows per centroid than this move the centroids no further that matters, but cost time.
TRAINING_ROWS_PER_CENTROID = 256
# Above this many rows x centroids the exact flow problem of k-means-constrained takes minutes a level; Sinkhorn stays
# quick.
LARGEST_EXACT_PROBLEM = 1_000_000
# Rows x centroids whose float32 distances are held at once, 1 GiB, with two or three copies; more rows are thinned out.
LARGEST_SINKHORN_PROBLEM = 2**28
SINKHORN_ROUNDS = 100
DISTANCES_AT_ONCE = 2**24  # 64 MiB of float32


def training_sample(embeddings: Embeddings, levels: tuple[int, ...], *, size: int | None = None, seed: int) -> np.ndarray:
    """Rows (S, D) to make codebooks from: `size`, or 256 for each centroid of the largest level. Stops
    when a level has more centroids than there are rows, and at a row that is not finite.
    """
    if len(embeddings) < max(levels):
        raise InputError(
            f"{embeddings.path} has {len(embeddings):,} items, fewer than the {max(levels):,} centroids of a level; "
            "give smaller --levels"
        )
    if size is not None and size < max(levels):
        raise InputError(f"--fit_sample {size:,} is less than the {max(levels):,} centroids of a level; give more")
    sample_SD = embeddings.sample(size or TRAINING_ROWS_PER_CENTROID * max(levels), seed=seed)
    log.info(
        "codebooks from %s of %s items, %s dimensions", f"{len(sample_SD):,}", f"{len(embeddings):,}", embeddings.n_dims
    )
    return sample_SD


def squared_distances(x_ND: torch.Tensor, centroids_KD: torch.Tensor) -> torch.Tensor:
    """||x_n - c_k||^2 as (N, K), by one matrix product."""
    return (x_ND.square().sum(1, keepdim=True) - 2 * x_ND @ centroids_KD.T + centroids_KD.square().sum(1)).clamp_min(0)


def kmeans(x_ND: np.ndarray, n_centroids: int, *, seed: int, rounds: int = 25, device: str = "cpu") -> np.ndarray:
    """Centroids (K, D) of faiss k-means on at most 256 K rows; on all GPUs faiss sees when `device` is one.

    Clusters the first principal components first and adds the others step by
    step, as faiss trains its residual quantizers: from the second level on this
    ends 7 to 10 % lower in error than k-means started in all dimensions at once.
    """
    settings = faiss.ProgressiveDimClusteringParameters()
    settings.niter, settings.seed = rounds, seed
    settings.min_points_per_centroid, settings.max_points_per_centroid = 1, TRAINING_ROWS_PER_CENTROID
    clusters = faiss.ProgressiveDimClustering(x_ND.shape[1], n_centroids, settings)
    rows_ND = no_fewer_rows_than_dimensions(x_ND)
    clusters.train(len(rows_ND), faiss.swig_ptr(rows_ND), _index_factory(device))
    return faiss.vector_to_array(clusters.centroids).reshape(n_centroids, -1).copy()


def no_fewer_rows_than_dimensions(x_ND: np.ndarray) -> np.ndarray:
    """The rows, all repeated equally often until faiss's principal
    components have enough; neither they nor means change.
    """
    times = -(-x_ND.shape[1] // len(x_ND))
    return np.ascontiguousarray(np.tile(x_ND, (times, 1)), dtype=np.float32)


def _index_factory(device: str) -> faiss.ProgressiveDimIndexFactory:
    if not device.startswith("cuda"):
        return faiss.ProgressiveDimIndexFactory()
    if hasattr(faiss, "GpuProgressiveDimIndexFactory") and faiss.get_num_gpus():
        return faiss.GpuProgressiveDimIndexFactory(faiss.get_num_gpus())
    log.warning("this faiss has no GPU support: k-means runs on the CPU, all else on %s", device)
    return faiss.ProgressiveDimIndexFactory()


def nearest(x_ND: np.ndarray, centroids_KD: np.ndarray, prices_K: np.ndarray | None = None) -> np.ndarray:
    """(N,) argmin over k of squared distance + price, a few rows at a time."""
    centroids = torch.from_numpy(centroids_KD)
    prices = torch.zeros(len(centroids)) if prices_K is None else torch.from_numpy(prices_K)
    parts = torch.split(torch.from_numpy(x_ND), max(1, DISTANCES_AT_ONCE // len(centroids)))
    return torch.cat([(squared_distances(part, centroids) + prices).argmin(1) for part in parts]).numpy()


def sinkhorn_prices(cost_NK: torch.Tensor, *, epsilon: float, rounds: int = SINKHORN_ROUNDS) -> torch.Tensor:
    """Prices (K,) under which every centroid receives N / K of the rows, by Sinkhorn's iteration in the log domain.

    `epsilon` blurs the assignment, as a share of the mean cost; sums of exponentials
    never leave log space, so a small one neither overflows nor vanishes
    (https://arxiv.org/abs/1306.0895; log domain: https://arxiv.org/abs/1610.06519).
    """
    n_rows, n_centroids = cost_NK.shape
    temperature = epsilon * cost_NK.mean().clamp_min(torch.finfo(cost_NK.dtype).tiny)
    log_kernel_NK = -cost_NK / temperature
    column_K = torch.zeros(n_centroids, dtype=cost_NK.dtype, device=cost_NK.device)
    for _ in range(rounds):
        row_N = -torch.logsumexp(log_kernel_NK + column_K, dim=1)
        column_K = math.log(n_rows / n_centroids) - torch.logsumexp(log_kernel_NK + row_N[:, None], dim=0)
    return -temperature * (column_K - column_K.mean())


def balanced_kmeans(
    x_ND: np.ndarray,
    n_centroids: int,
    *,
    slack: float,
    seed: int,
    epsilon: float,
    rounds: int = 15,
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """Centroids (K, D) and prices (K,) of clusters of about N / K rows: exact for small N, Sinkhorn for large.

    Exact (k-means-constrained): sizes within N / K (1 -+ slack); the prices come out of
    the sizes it found. Sinkhorn: Lloyd's rounds whose assignment is argmin(cost + price).
    """
    if x_ND.shape[0] * n_centroids <= LARGEST_EXACT_PROBLEM:
        centroids_KD = _constrained_centroids(x_ND, n_centroids, slack=slack, seed=seed)
        rounds = 0
    else:
        most = max(n_centroids, LARGEST_SINKHORN_PROBLEM // n_centroids)
        x_ND = x_ND[np.linspace(0, len(x_ND) - 1, min(most, len(x_ND))).astype(np.int64)]
        centroids_KD = kmeans(x_ND, n_centroids, seed=seed, rounds=5, device=device)
    x, centroids = torch.from_numpy(x_ND).to(device), torch.from_numpy(centroids_KD).to(device)
    for _ in range(rounds):
        cost_NK = squared_distances(x, centroids)
        labels_N = (cost_NK + sinkhorn_prices(cost_NK, epsilon=epsilon)).argmin(1)
        sums_KD = torch.zeros_like(centroids).index_add_(0, labels_N, x)
        counts_K = torch.bincount(labels_N, minlength=n_centroids)
        centroids = torch.where(counts_K[:, None] > 0, sums_KD / counts_K[:, None].clamp_min(1), centroids)
    prices_K = sinkhorn_prices(squared_distances(x, centroids), epsilon=epsilon)
    return centroids.cpu().numpy(), prices_K.cpu().numpy()


def _constrained_centroids(x_ND: np.ndarray, n_centroids: int, *, slack: float, seed: int) -> np.ndarray:
    from k_means_constrained import KMeansConstrained  # pulls in ortools: only who needs it pays

    mean_size = len(x_ND) / n_centroids
    clusters = KMeansConstrained(
        n_centroids,
        size_min=math.floor(mean_size * (1 - slack)),
        size_max=math.ceil(mean_size * (1 + slack)),
        n_init=1,
        max_iter=30,
        random_state=seed,
    )
    return clusters.fit(x_ND.astype(np.float64)).cluster_centers_.astype(np.float32)
