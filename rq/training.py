"""Training the quantizers with a network, RQ-VAE and RQ-KMeans+, on one process or several (accelerate).

N items, S sampled rows, R rows of a chunk, L levels, D dimensions.
"""

import argparse
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast, broadcast_object_list
from tqdm import tqdm

from rq import checkpoints, clustering, quantizers
from rq.embeddings import Embeddings
from rq.files import InputError
from rq.quantizers import Quantizer

log = logging.getLogger("rq.training")

REVIVAL_ROWS = 8_192  # rows that dead codes are moved onto: plenty for any codebook, quick to encode
LEAST_GAIN = 1e-3  # an evaluation that improves by less than this share counts as no improvement
WARMUP_STEPS = 100


@dataclass(frozen=True)
class Measure:
    """How good a quantizer is on the sample: error is the share of
    variance left, collisions the share of items above distinct SIDs.
    """

    error: float
    collisions: float


def initialise(quantizer: Quantizer, sample_SD: np.ndarray, *, seed: int) -> None:
    """Standardise the input and place the codebooks by k-means
    of what the encoder makes of the sample, once and for all.

    Does nothing to a quantizer that was initialised before: the flag is a buffer and comes back with its checkpoint.
    """
    if bool(quantizer.residual.initialised):
        return
    quantizer.standardise(sample_SD)
    with torch.no_grad():
        parts = [
            quantizer.encoder(torch.from_numpy(sample_SD[part]))
            for part in quantizers.sub_chunks(len(sample_SD), width=sample_SD.shape[1])
        ]
        residual_SZ = torch.cat(parts).numpy()
        for level, codebook_KZ in enumerate(quantizer.residual.codebooks):
            centroids_KZ = clustering.kmeans(residual_SZ, len(codebook_KZ), seed=seed + level, rounds=10)
            residual_SZ = residual_SZ - centroids_KZ[clustering.nearest(residual_SZ, centroids_KZ)]
            codebook_KZ.copy_(torch.from_numpy(centroids_KZ))
        quantizer.residual.initialised.fill_(True)


def measure(quantizer: Quantizer, sample_SD: np.ndarray) -> Measure:
    """Error and collisions of the sample, as it would be indexed now."""
    was_training = quantizer.training
    quantizer.eval()
    codes_SL = np.concatenate(
        [
            quantizer.codes(sample_SD[part])
            for part in quantizers.sub_chunks(len(sample_SD), width=max(quantizer.design.levels))
        ]
    )
    error = quantizers.squared_error(quantizer, sample_SD, codes_SL)[-1] / float(quantizer.decoder[-1].scale) ** 2
    quantizer.train(was_training)
    return Measure(error, 1 - len(np.unique(codes_SL, axis=0)) / len(codes_SL))


def batches(embeddings: Embeddings, size: int, *, rng: np.random.Generator, rank: int, world: int) -> Iterator[np.ndarray]:
    """One epoch of shuffled batches, this process's share of
    each: chunks in random order, rows shuffled within a chunk.
    """
    for _, chunk_RD in embeddings.chunks(shuffle=rng):
        order_R = rng.permutation(len(chunk_RD))
        for start in range(0, len(order_R), size):
            batch = order_R[start : start + size]
            if len(batch) >= world:
                yield chunk_RD[batch[rank::world]]


def train(quantizer: Quantizer, embeddings: Embeddings, sample_SD: np.ndarray, flags: argparse.Namespace) -> Quantizer:
    """Train until neither error nor collisions of the sample
    improve; returns the best quantizer met, in every process.
    """
    quantizers.take_origin(quantizer, embeddings)
    accelerator = Accelerator(
        cpu=flags.device == "cpu", kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
    )
    model = accelerator.prepare(quantizer.to(accelerator.device).train())
    # no weight decay: it would pull unused codes to zero
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=flags.learning_rate, weight_decay=0.0)
    rng, generator = np.random.default_rng(flags.seed), torch.Generator().manual_seed(flags.seed)
    start = measure(quantizer, sample_SD)
    # A random encoder collides little and reconstructs nothing: it must not win by --keep_best collisions.
    best = Measure(math.inf, math.inf) if quantizer.design.method == "rqvae" else start
    best_state = {name: tensor.detach().cpu().clone() for name, tensor in quantizer.state_dict().items()}
    lowest, stale, step = start, 0, 0
    log.info("before training: %.4f of the variance left, %.2f %% collisions", start.error, 100 * start.collisions)
    with tqdm(
        total=flags.epochs, desc="train", unit=" epochs", disable=None if accelerator.is_main_process else True
    ) as bar:
        for epoch in range(1, flags.epochs + 1):
            for batch_RD in batches(
                embeddings, flags.batch_size, rng=rng, rank=accelerator.process_index, world=accelerator.num_processes
            ):
                step += 1
                for group in optimizer.param_groups:
                    group["lr"] = flags.learning_rate * min(1.0, step / WARMUP_STEPS) * cosine(epoch / flags.epochs)
                error, codebook_loss, _ = model(
                    torch.from_numpy(batch_RD).to(accelerator.device), commitment=flags.commitment
                )
                loss = error + flags.codebook_weight * codebook_loss
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                if not torch.isfinite(loss):
                    raise InputError(
                        f"epoch {epoch}: the loss is {loss.item()}; "
                        f"give a smaller --learning_rate than {flags.learning_rate}"
                    )
            bar.update()
            if epoch % flags.eval_every and epoch != flags.epochs:
                continue
            now = broadcast_object_list([measure(quantizer, sample_SD)])[0]
            bar.set_postfix(left=f"{now.error:.4f}", collisions=f"{now.collisions:.2%}")
            better = getattr(now, flags.keep_best) < getattr(best, flags.keep_best)
            if better:
                best = now
                best_state = {name: tensor.detach().cpu().clone() for name, tensor in quantizer.state_dict().items()}
                save_best(quantizer, flags.ckpt_path, is_main=accelerator.is_main_process)
            enough = 1 - LEAST_GAIN
            improved = now.error < enough * lowest.error or now.collisions < enough * lowest.collisions
            lowest = Measure(min(now.error, lowest.error), min(now.collisions, lowest.collisions))
            stale = 0 if improved else stale + 1
            if flags.patience and stale >= flags.patience:
                log.info("stopped after epoch %s: %s evaluations without gain in error or collisions", epoch, stale)
                break
            if epoch <= flags.revive_until * flags.epochs:
                revive(quantizer, optimizer, sample_SD, accelerator=accelerator, generator=generator)
    quantizer.load_state_dict(best_state)
    log.info("best (%s): %.4f of the variance left, %.2f %% collisions", flags.keep_best, best.error, 100 * best.collisions)
    return quantizer.eval()


def cosine(progress: float) -> float:
    """1 at the start, 0.05 at the end: what is left of the learning rate."""
    return 0.05 + 0.95 * 0.5 * (1 + float(np.cos(np.pi * progress)))


def save_best(quantizer: Quantizer, path: Path | None, *, is_main: bool) -> None:
    """Keep the best so far on disk, so that a run cut short can be resumed."""
    if path is not None and is_main:
        checkpoints.save_checkpoint(quantizer, path)


def revive(
    quantizer: Quantizer,
    optimizer: torch.optim.Optimizer,
    sample_SD: np.ndarray,
    *,
    accelerator: Accelerator,
    generator: torch.Generator,
) -> None:
    """Move the codes no process used since the last call, alike in every process, and forget their Adam moments."""
    for level in range(len(quantizer.design.levels)):
        quantizer.residual.uses(level).copy_(accelerator.reduce(quantizer.residual.uses(level), "sum"))
    rows = torch.randperm(len(sample_SD), generator=generator)[:REVIVAL_ROWS].numpy()
    with torch.no_grad():
        latent_SZ = quantizer.encoder(torch.from_numpy(sample_SD[rows]).to(accelerator.device))
    moved = quantizer.residual.revive_dead_codes(latent_SZ, generator=generator)
    for codes, codebook_KZ in zip(moved, quantizer.residual.codebooks, strict=True):
        codebook_KZ.data.copy_(broadcast(codebook_KZ.data))
        for moment in optimizer.state[codebook_KZ].values():
            if moment.shape == codebook_KZ.shape:
                moment[codes] = 0


def resume(flags: argparse.Namespace, *, method: str, embeddings: Embeddings) -> Quantizer:
    """The quantizer of --resume_from_checkpoint, refused when its method, levels or encoder are not those of this run."""
    resumed = flags.resume_from_checkpoint
    quantizer = checkpoints.load_checkpoint(resumed, n_dims=embeddings.n_dims, data_path=flags.data_path)
    if quantizer.design.method != method or quantizer.design.levels != flags.levels:
        raise InputError(
            f"{resumed}: a {quantizer.design.method} of levels {','.join(map(str, quantizer.design.levels))}, "
            f"this run is {method} of {','.join(map(str, flags.levels))}"
        )
    quantizers.is_of_these(quantizer, embeddings, checkpoint=resumed)
    return quantizer
