"""The one quantizer behind all five methods: encoder -> residual codebooks -> decoder.

The k-means family has the identity for encoder and decoder; RQ-VAE and RQ-KMeans+ put networks there.

    quantizer = load_checkpoint(Path("Shop.rqkmeans"))    # rq.checkpoints
    codes_NL = quantizer.codes(x_ND)          # [[12, 3, 255], [7, 0, 31]]: item 0 is nearest to codeword 12 of level 1, ..
    quantizer.reconstruction(codes_NL)        # (N, D): the sums of the codewords, decoded

N items, R rows of a chunk, L levels, K centroids of a level, D input dimensions, Z latent dimensions, B beams.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from rq.clustering import sinkhorn_prices, squared_distances
from rq.embeddings import Embeddings
from rq.files import InputError, named, told
from rq.origin import Origin, check_fit

NETWORK_METHODS = ("rqvae", "rqkmeans_plus")
METHODS = ("rqkmeans", "rqkmeans_constrained", "rqfaiss", *NETWORK_METHODS)
REVIVED_CODES_SHIFT = 1e-3  # revived codes land beside, not on, a row, so two of them never coincide


@dataclass(frozen=True)
class Design:
    """What a quantizer is built from; the config.json of its checkpoint."""

    method: str
    n_dims: int
    levels: tuple[int, ...]
    latent: int = 0
    hidden: tuple[int, ...] = ()
    beam: int = 1
    sinkhorn_epsilons: tuple[float, ...] = ()
    seed: int = 42
    origin: Origin | None = None  # of the embeddings it was trained on, where that is known


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class IdentityPlus(nn.Module):
    """x + MLP(x) whose last layer starts at zero, so training starts from the identity exactly."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.change = perceptron(widths)
        nn.init.zeros_(self.change[-1].weight)
        nn.init.zeros_(self.change[-1].bias)

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, D)."""
        return x_ND + self.change(x_ND)


class Affine(nn.Module):
    """scale * x + shift, fixed: what makes training independent of the scale of the embeddings."""

    def __init__(self, n_dims: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(n_dims))

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, D)."""
        return x_ND * self.scale + self.shift


class ResidualCodebooks(nn.Module):
    """L codebooks, each quantizing what the levels before it left over.

    Residuals are taken against detached codewords: the commitment of every level
    then reaches the encoder (Lee et al. 2022, https://arxiv.org/abs/2203.01941).
    Subtracting a straight-through codeword instead would cancel it beyond level one.
    """

    def __init__(
        self, levels: Sequence[int], n_dims: int, *, sinkhorn_epsilons: Sequence[float] = (), beam: int = 1
    ) -> None:
        super().__init__()
        self.codebooks = nn.ParameterList(torch.zeros(size, n_dims) for size in levels)
        self.sinkhorn_epsilons = tuple(sinkhorn_epsilons) or (0.0,) * len(levels)
        self.beam = beam
        self.register_buffer("initialised", torch.tensor(False))
        for level, size in enumerate(levels):
            self.register_buffer(f"prices_{level}", torch.zeros(size))
            self.register_buffer(f"uses_{level}", torch.zeros(size))

    def price(self, level: int) -> torch.Tensor:
        """(K,) added to the squared distances of a level: zero, or what balances its clusters."""
        return getattr(self, f"prices_{level}")

    def uses(self, level: int) -> torch.Tensor:
        """(K,) how often each code was chosen in training since the last revival."""
        return getattr(self, f"uses_{level}")

    def codes(self, latent_NZ: torch.Tensor) -> torch.Tensor:
        """(N, L) codes: greedy, or the best of `beam` partial sums kept at each level."""
        residual_NBZ = latent_NZ[:, None]
        chosen_NBL = torch.empty(len(latent_NZ), 1, 0, dtype=torch.long, device=latent_NZ.device)
        for level, codebook_KZ in enumerate(self.codebooks):
            n_rows, n_beams, n_dims = residual_NBZ.shape
            cost_NBK = squared_distances(residual_NBZ.reshape(-1, n_dims), codebook_KZ).view(n_rows, n_beams, -1)
            cost_NBK = cost_NBK + self.price(level)
            keep = min(self.beam, n_beams * len(codebook_KZ))
            if keep == 1:
                best_NB = cost_NBK.flatten(1).argmin(1, keepdim=True)  # several times quicker than topk
            else:
                best_NB = cost_NBK.flatten(1).topk(keep, largest=False).indices
            beam_NB, code_NB = best_NB // len(codebook_KZ), best_NB % len(codebook_KZ)
            row_N1 = torch.arange(n_rows, device=best_NB.device)[:, None]
            residual_NBZ = residual_NBZ[row_N1, beam_NB] - codebook_KZ[code_NB]
            chosen_NBL = torch.cat([chosen_NBL[row_N1, beam_NB], code_NB[..., None]], dim=2)
        return chosen_NBL[:, 0]

    def sum_of_codewords(self, codes_NL: torch.Tensor) -> torch.Tensor:
        """(N, Z): the codewords of the first l levels added up, l being the width of `codes_NL`."""
        return sum(self.codebooks[level][codes_NL[:, level]] for level in range(codes_NL.shape[1]))

    def forward(self, latent_NZ: torch.Tensor, *, commitment: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Straight-through quantized latents (N, Z), the codebook and commitment loss, and codes (N, L)."""
        residual_NZ, quantized_NZ = latent_NZ, torch.zeros_like(latent_NZ)
        loss, codes = latent_NZ.new_zeros(()), []
        for level, codebook_KZ in enumerate(self.codebooks):
            code_N = self._training_codes(residual_NZ.detach(), level)
            codeword_NZ = codebook_KZ[code_N]
            loss = loss + F.mse_loss(codeword_NZ, residual_NZ.detach())
            loss = loss + commitment * F.mse_loss(residual_NZ, codeword_NZ.detach())
            residual_NZ = residual_NZ - codeword_NZ.detach()
            quantized_NZ = quantized_NZ + codeword_NZ.detach()
            codes.append(code_N)
        return latent_NZ + (quantized_NZ - latent_NZ).detach(), loss, torch.stack(codes, dim=1)

    @torch.no_grad()
    def _training_codes(self, residual_NZ: torch.Tensor, level: int) -> torch.Tensor:
        cost_NK = squared_distances(residual_NZ, self.codebooks[level]) + self.price(level)
        if self.training and self.sinkhorn_epsilons[level] > 0:
            cost_NK = cost_NK + sinkhorn_prices(cost_NK, epsilon=self.sinkhorn_epsilons[level], rounds=20)
        code_N = cost_NK.argmin(1)
        if self.training:
            self.uses(level).add_(torch.bincount(code_N, minlength=cost_NK.shape[1]))
        return code_N

    @torch.no_grad()
    def revive_dead_codes(self, latent_NZ: torch.Tensor, *, generator: torch.Generator) -> list[torch.Tensor]:
        """Move every code unused since the last call onto a random
        residual of `latent_NZ`; returns the codes moved, by level.

        The restart of unused codes of Jukebox (https://arxiv.org/abs/2005.00341) and SoundStream
        (https://arxiv.org/abs/2107.03312).
        """
        moved, residual_NZ = [], latent_NZ
        for level, codebook_KZ in enumerate(self.codebooks):
            dead = torch.nonzero(self.uses(level) == 0).flatten()
            code_N = squared_distances(residual_NZ, codebook_KZ).argmin(1)
            rows = torch.randint(len(residual_NZ), (len(dead),), generator=generator).to(residual_NZ.device)
            shift = torch.randn(len(dead), codebook_KZ.shape[1], generator=generator).to(residual_NZ.device)
            codebook_KZ[dead] = residual_NZ[rows] + REVIVED_CODES_SHIFT * residual_NZ.std() * shift
            residual_NZ = residual_NZ - codebook_KZ[code_N]
            self.uses(level).zero_()
            moved.append(dead)
        return moved


class Quantizer(nn.Module):
    """Embeddings (N, D) -> codes (N, L) -> reconstructions (N, D)."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.design = design
        self.encoder: nn.Module = nn.Identity()
        self.decoder: nn.Module = nn.Identity()
        latent = design.latent or design.n_dims
        if design.method in NETWORK_METHODS:
            if design.method == "rqvae":
                encoder = perceptron((design.n_dims, *design.hidden, latent))
                decoder = perceptron((latent, *reversed(design.hidden), design.n_dims))
            else:
                encoder = IdentityPlus((design.n_dims, *design.hidden, design.n_dims))
                decoder = IdentityPlus((design.n_dims, *reversed(design.hidden), design.n_dims))
            self.encoder = nn.Sequential(Affine(design.n_dims), encoder)
            self.decoder = nn.Sequential(decoder, Affine(design.n_dims))
        self.residual = ResidualCodebooks(
            design.levels, latent, sinkhorn_epsilons=design.sinkhorn_epsilons, beam=design.beam
        )

    @torch.no_grad()
    def standardise(self, sample_SD: np.ndarray) -> None:
        """Let the encoder see, and the decoder restore, embeddings of mean zero and mean variance one."""
        mean_D = torch.from_numpy(sample_SD.mean(axis=0))
        scale = float(sample_SD.var(axis=0).mean()) ** 0.5 or 1.0
        self.encoder[0].scale.fill_(1 / scale)
        self.encoder[0].shift.copy_(-mean_D / scale)
        self.decoder[-1].scale.fill_(scale)
        self.decoder[-1].shift.copy_(mean_D)

    def forward(self, x_ND: torch.Tensor, *, commitment: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reconstruction loss (share of the variance left), codebook and commitment loss, codes (N, L)."""
        quantized_NZ, codebook_loss, codes_NL = self.residual(self.encoder(x_ND), commitment=commitment)
        error = F.mse_loss(self.decoder(quantized_NZ), x_ND) / self.decoder[-1].scale.square()
        return error, codebook_loss, codes_NL

    @property
    def device(self) -> torch.device:
        """Where the codebooks are."""
        return self.residual.codebooks[0].device

    @torch.no_grad()
    def codes(self, x_RD: np.ndarray) -> np.ndarray:
        """int32 (R, L) codes of a chunk."""
        return self.residual.codes(self.encoder(self._on_device(x_RD))).cpu().numpy().astype(np.int32)

    @torch.no_grad()
    def reconstruction(self, codes_RL: np.ndarray) -> np.ndarray:
        """(R, D) embeddings that the first l levels stand for, l being the width of `codes_RL`."""
        codes = torch.from_numpy(codes_RL.astype(np.int64)).to(self.device)
        return self.decoder(self.residual.sum_of_codewords(codes)).cpu().numpy()

    @torch.no_grad()
    def last_level_costs(self, x_RD: np.ndarray, codes_RL: np.ndarray) -> np.ndarray:
        """(R, K of the last level): squared distance of what the other levels left over to each code of the last."""
        codes = torch.from_numpy(codes_RL[:, :-1].astype(np.int64)).to(self.device)
        residual_RZ = self.encoder(self._on_device(x_RD)) - self.residual.sum_of_codewords(codes)
        return squared_distances(residual_RZ, self.residual.codebooks[-1]).cpu().numpy()

    def _on_device(self, x_RD: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x_RD, dtype=np.float32)).to(self.device)


def quantizer_from_codebooks(
    design: Design, codebooks: Sequence[np.ndarray], prices: Sequence[np.ndarray] = ()
) -> Quantizer:
    """A quantizer whose codebooks, (K, Z) each, and prices, (K,) each, are given."""
    quantizer = Quantizer(design)
    with torch.no_grad():
        for level, codebook_KZ in enumerate(codebooks):
            quantizer.residual.codebooks[level].copy_(torch.from_numpy(codebook_KZ))
            if len(prices):
                quantizer.residual.price(level).copy_(torch.from_numpy(prices[level]))
        quantizer.residual.initialised.fill_(True)
    return quantizer.requires_grad_(design.method in NETWORK_METHODS).eval()


def sub_chunks(n_rows: int, *, width: int) -> Iterator[slice]:
    """Slices of a chunk so that a float32 matrix of that many rows by `width` stays near 64 MiB."""
    step = max(1, 2**24 // width)
    for start in range(0, n_rows, step):
        yield slice(start, start + step)


def encoded_chunks(
    quantizer: Quantizer, embeddings: Embeddings, *, first: int = 0, progress: bool = False
) -> Iterator[np.ndarray]:
    """int32 (R, L) codes of each chunk of the rows from `first` on, in order."""
    from tqdm import tqdm

    quantizer.eval()
    width = quantizer.residual.beam * max(quantizer.design.levels)
    n_rows = len(embeddings) - first
    with tqdm(total=n_rows, desc="assign codes", unit=" items", disable=None if progress else True) as bar:
        for _, chunk_RD in embeddings.chunks(first=first):
            yield np.concatenate([quantizer.codes(chunk_RD[part]) for part in sub_chunks(len(chunk_RD), width=width)])
            bar.update(len(chunk_RD))


def encode(quantizer: Quantizer, embeddings: Embeddings, *, first: int = 0, progress: bool = False) -> np.ndarray:
    """int32 (M, L) codes of the M rows from `first` on."""
    codes_ML = np.empty((len(embeddings) - first, len(quantizer.design.levels)), np.int32)  # the chunks write every row
    at = 0
    for codes_RL in encoded_chunks(quantizer, embeddings, first=first, progress=progress):
        codes_ML[at : at + len(codes_RL)] = codes_RL
        at += len(codes_RL)
    return codes_ML


def squared_error(quantizer: Quantizer, x_RD: np.ndarray, codes_RL: np.ndarray) -> list[float]:
    """Mean squared error per dimension in input space after each level: [after level 1, .., after level L]."""
    sums = np.zeros(codes_RL.shape[1])
    for part in sub_chunks(len(x_RD), width=x_RD.shape[1]):
        for level in range(codes_RL.shape[1]):
            difference_RD = x_RD[part] - quantizer.reconstruction(codes_RL[part, : level + 1])
            sums[level] += np.square(difference_RD, out=difference_RD).sum(dtype=np.float64)
    return (sums / x_RD.size).tolist()


def choose_device(name: str) -> str:
    """'auto' -> the GPU where there is one; a device that is not there is one clear line."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).tolist()  # a device without memory, such as meta, has no values
    except (RuntimeError, AssertionError, ImportError) as error:
        first_line = Exception((str(error).splitlines() or [""])[0])
        raise InputError(
            f"--device {named(name)}: not usable here ({told(first_line)}); give --device cpu or auto"
        ) from error
    return name


def is_of_these(quantizer: Quantizer, embeddings: Embeddings, *, checkpoint: Path) -> bool:
    """InputError where embeddings and quantizer are of two encoders; False where one of them has no record."""
    return check_fit(quantizer.design.origin, embeddings.origin, checkpoint=checkpoint, npy=embeddings.path)


def take_origin(quantizer: Quantizer, embeddings: Embeddings) -> None:
    """Let the checkpoint say which encoder the embeddings it was trained on are of."""
    quantizer.design = replace(quantizer.design, origin=embeddings.origin)
