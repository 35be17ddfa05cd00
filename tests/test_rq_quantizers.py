"""Residual quantization against oracles, and what training must and must not change."""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from refusals import refusal
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from rq import (
    checkpoints,
    clustering,
    embeddings,
    quantizers,
    rqfaiss,
    rqkmeans,
    rqkmeans_constrained,
    rqkmeans_plus,
    rqvae,
    training,
)
from rq.collisions import add_a_code, group_sizes
from rq.embeddings import open_embeddings
from rq.files import InputError
from rq.index_file import read_sids
from rq.quantizers import Design, Quantizer, ResidualCodebooks

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Toy matrices gain nothing from threads, and threads that wait for a busy core cost a lot."""
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


@pytest.fixture(scope="module")
def clustered() -> np.ndarray:
    """1,500 rows of 16 dimensions around 60 centres of falling spread: like embeddings, and unlike noise."""
    rng = np.random.default_rng(0)
    spread = np.linspace(1.0, 0.2, 16)
    centres = rng.normal(size=(60, 16)) * spread
    return (centres[rng.integers(60, size=1500)] + 0.3 * rng.normal(size=(1500, 16)) * spread).astype(np.float32)


@pytest.fixture
def data_path(clustered: np.ndarray, tmp_path: Path) -> Path:
    np.save(tmp_path / "E.npy", clustered)
    return tmp_path / "E.npy"


def error(quantizer: Quantizer, rows: np.ndarray) -> float:
    return quantizers.squared_error(quantizer, rows, quantizer.codes(rows))[-1]


def faiss_quantizer(rows: np.ndarray, *, bits: int, levels: int, beam: int) -> faiss.ResidualQuantizer:
    oracle = faiss.ResidualQuantizer(rows.shape[1], levels, bits)
    oracle.max_beam_size = beam
    oracle.cp.min_points_per_centroid = 1
    oracle.train(rows)
    return oracle


def test_rqkmeans_is_within_two_percent_of_faiss(clustered):
    oracle = faiss_quantizer(clustered, bits=5, levels=3, beam=1)
    oracle_error = float(np.square(clustered - oracle.decode(oracle.compute_codes(clustered))).mean())
    own = error(rqkmeans.fit(clustered, (32, 32, 32), seed=0), clustered)
    assert own <= 1.02 * oracle_error


@pytest.mark.parametrize("beam", [1, 4])
def test_codes_are_those_of_faiss_for_the_same_codebooks_and_beam(clustered, beam):
    oracle = faiss_quantizer(clustered, bits=5, levels=3, beam=beam)
    books = faiss.vector_to_array(oracle.codebooks).reshape(3, 32, 16)
    own = quantizers.quantizer_from_codebooks(Design("rqfaiss", 16, (32, 32, 32), beam=beam), books)
    unpacked = np.array(
        [[int(bits[level * 5 : level * 5 + 5][::-1], 2) for level in range(3)] for bits in bit_strings(oracle, clustered)]
    )
    same = (own.codes(clustered) == unpacked).all(axis=1)
    assert same.mean() > 0.995  # what is left are ties to the last float32 digit


def bit_strings(oracle: faiss.ResidualQuantizer, rows: np.ndarray) -> list[str]:
    packed = np.unpackbits(oracle.compute_codes(rows), axis=1, bitorder="little")
    return ["".join(map(str, row)) for row in packed]


def test_greedy_codes_are_those_of_vector_quantize_pytorch(clustered):
    oracle_of = pytest.importorskip("vector_quantize_pytorch").ResidualVQ
    own = rqkmeans.fit(clustered, (32, 32, 32), seed=0)
    oracle = oracle_of(dim=16, num_quantizers=3, codebook_size=32).eval()
    with torch.no_grad():
        for layer, book in zip(oracle.layers, own.residual.codebooks, strict=True):
            layer._codebook.embed.copy_(book[None])
            layer._codebook.initted.fill_(True)
        quantized, codes, _ = oracle(torch.from_numpy(clustered)[None])
    np.testing.assert_array_equal(own.codes(clustered), codes[0].numpy())
    np.testing.assert_allclose(own.reconstruction(own.codes(clustered)), quantized[0].numpy(), atol=1e-5)


def test_a_beam_finds_better_sums(clustered):
    books = [book.numpy() for book in rqkmeans.fit(clustered, (32, 32, 32), seed=0).residual.codebooks]
    greedy, beamed = (
        quantizers.quantizer_from_codebooks(Design("rqfaiss", 16, (32, 32, 32), beam=beam), books) for beam in (1, 5)
    )
    assert error(beamed, clustered) < error(greedy, clustered)


def test_each_level_lowers_the_error(clustered):
    quantizer = rqkmeans.fit(clustered, (8, 16, 4), seed=0)
    assert [len(book) for book in quantizer.residual.codebooks] == [8, 16, 4]
    errors = quantizers.squared_error(quantizer, clustered, quantizer.codes(clustered))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < clustered.var(axis=0).mean()


def test_the_same_seed_gives_the_same_codebooks(clustered):
    first, again, other = (rqkmeans.fit(clustered, (8, 8), seed=seed).residual.codebooks[1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("largest_exact_problem", [10**9, 0])
def test_constrained_clusters_are_balanced_by_both_solvers(clustered, monkeypatch, largest_exact_problem):
    monkeypatch.setattr(clustering, "LARGEST_EXACT_PROBLEM", largest_exact_problem)
    quantizer = rqkmeans_constrained.fit(clustered, (30, 30), slack=0.2, epsilon=0.02, seed=0)
    plain = rqkmeans.fit(clustered, (30, 30), seed=0)
    for level in range(2):
        sizes, plain_sizes = (np.bincount(q.codes(clustered)[:, level], minlength=30) for q in (quantizer, plain))
        assert sizes.max() <= 1.5 * 50
        assert sizes.min() >= 0.5 * 50
        assert sizes.std() < plain_sizes.std() / 2


def test_sinkhorn_in_the_log_domain_agrees_with_plain_sinkhorn_and_survives_where_it_cannot():
    cost = torch.from_numpy(np.random.default_rng(0).random((40, 8)))
    prices = clustering.sinkhorn_prices(cost, epsilon=0.5, rounds=200)
    kernel = torch.exp(-cost / (0.5 * cost.mean()))
    column = torch.ones(8, dtype=cost.dtype)
    for _ in range(200):
        row = 1 / (kernel @ column)
        column = 5 / (kernel.T @ row)
    plain = -0.5 * cost.mean() * (column.log() - column.log().mean())
    torch.testing.assert_close(prices, plain)
    assert torch.isfinite(clustering.sinkhorn_prices(cost.float() * 1e4, epsilon=1e-4)).all()


def test_the_gradient_reaches_the_encoder_from_the_decoder_and_from_every_level():
    torch.manual_seed(0)
    residual = ResidualCodebooks((4, 4, 4), 5)
    for book in residual.codebooks:
        torch.nn.init.normal_(book)
    latent = torch.randn(7, 5, requires_grad=True)
    weight = torch.randn(7, 5)
    quantized, loss, codes = residual(latent, commitment=0.25)
    ((quantized * weight).sum() + loss).backward()
    # by hand: the straight-through gradient is the decoder's own; level l adds 2 * 0.25 * (residual - codeword) / 35
    expected, left = weight.clone(), latent.detach().clone()
    for level, book in enumerate(residual.codebooks):
        left = left - book.detach()[codes[:, level]]
        expected += 2 * 0.25 * left / latent.numel()
    torch.testing.assert_close(latent.grad, expected)
    torch.testing.assert_close(quantized, residual.sum_of_codewords(codes))


def test_the_codebook_loss_moves_the_chosen_codewords_only():
    torch.manual_seed(0)
    residual = ResidualCodebooks((6, 6), 3)
    for book in residual.codebooks:
        torch.nn.init.normal_(book)
    latent = torch.randn(4, 3)
    _, loss, codes = residual(latent, commitment=0.25)
    loss.backward()
    for level, book in enumerate(residual.codebooks):
        moved = set(torch.nonzero(book.grad.abs().sum(1)).flatten().tolist())
        assert moved == set(codes[:, level].tolist())


def test_dead_codes_are_revived_and_living_ones_stay():
    torch.manual_seed(0)
    residual = ResidualCodebooks((4, 4), 2)
    with torch.no_grad():
        residual.codebooks[0].copy_(torch.tensor([[1.0, 0], [-1, 0], [90, 90], [99, 99]]))
        residual.codebooks[1].copy_(torch.tensor([[0.1, 0], [-0.1, 0], [0, 0.1], [0, -0.1]]))
    before = [book.detach().clone() for book in residual.codebooks]
    latent = torch.cat([torch.randn(50, 2) * 0.1 + 1, torch.randn(50, 2) * 0.1 - 1])
    residual.train()(latent, commitment=0.25)
    moved = residual.revive_dead_codes(latent, generator=torch.Generator().manual_seed(0))
    assert moved[0].tolist() == [2, 3]
    assert torch.equal(residual.codebooks[0][:2], before[0][:2])
    assert residual.codebooks[0][2:].abs().max() < 2
    assert residual.uses(0).sum() == 0
    residual(latent, commitment=0.25)
    assert (residual.uses(0)[2:] > 0).all()


def flags_of(tmp_path: Path, **changed: object) -> argparse.Namespace:
    flags = {
        "epochs": 3,
        "batch_size": 500,
        "learning_rate": 1e-3,
        "commitment": 0.25,
        "codebook_weight": 1.0,
        "eval_every": 1,
        "patience": 0,
        "revive_until": 0.5,
        "keep_best": "error",
        "ckpt_path": None,
        "device": "cpu",
        "seed": 0,
    }
    return argparse.Namespace(**{**flags, **changed})


def test_kmeans_initialisation_happens_once_and_survives_reload(clustered, tmp_path):
    quantizer = Quantizer(Design("rqvae", 16, (8, 8), latent=4, hidden=(12,)))
    training.initialise(quantizer, clustered, seed=0)
    start = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    assert start["residual.codebooks.0"].abs().sum() > 0
    checkpoints.save_checkpoint(quantizer, tmp_path / "c")
    again = checkpoints.load_checkpoint(tmp_path / "c")
    assert bool(again.residual.initialised)
    training.initialise(again, clustered, seed=99)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, start[name]), name


def test_training_moves_encoder_codebooks_and_decoder(data_path, clustered, tmp_path):
    torch.manual_seed(0)
    quantizer = Quantizer(Design("rqvae", 16, (8, 8), latent=4, hidden=(12,)))
    training.initialise(quantizer, clustered, seed=0)
    start = {name: parameter.detach().clone() for name, parameter in quantizer.named_parameters()}
    before = training.measure(quantizer, clustered)
    opened = embeddings.open_embeddings(data_path)
    training.train(quantizer, opened, clustered, flags_of(tmp_path, epochs=20, batch_size=50, learning_rate=5e-3))
    for name, parameter in quantizer.named_parameters():
        assert not torch.equal(parameter, start[name]), name
    assert training.measure(quantizer, clustered).error < 0.7 * before.error


def test_training_stops_early_and_returns_the_best(data_path, clustered, tmp_path, monkeypatch):
    measured = iter([training.Measure(*pair) for pair in [(0.9, 0.5), (0.5, 0.5), (0.7, 0.5), (0.7, 0.5), (0.1, 0.1)]])
    states = []

    def measure(quantizer: Quantizer, _: np.ndarray) -> training.Measure:
        states.append({name: tensor.clone() for name, tensor in quantizer.state_dict().items()})
        return next(measured)

    monkeypatch.setattr(training, "measure", measure)
    quantizer = Quantizer(Design("rqvae", 16, (8, 8), latent=4, hidden=(12,)))
    training.initialise(quantizer, clustered, seed=0)
    flags = flags_of(tmp_path, epochs=50, patience=2, revive_until=0)
    training.train(quantizer, embeddings.open_embeddings(data_path), clustered, flags)
    assert len(states) == 4  # the fifth, better one is never reached
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in quantizer.state_dict().items())


def test_fewest_collisions_never_means_the_untrained_encoder(data_path, clustered, tmp_path, monkeypatch):
    measured = iter([training.Measure(*pair) for pair in [(1.0, 0.1), (0.5, 0.4), (0.4, 0.3), (0.3, 0.5)]])
    states = []

    def measure(quantizer: Quantizer, _: np.ndarray) -> training.Measure:
        states.append({name: tensor.clone() for name, tensor in quantizer.state_dict().items()})
        return next(measured)

    monkeypatch.setattr(training, "measure", measure)
    quantizer = Quantizer(Design("rqvae", 16, (8, 8), latent=4, hidden=(12,)))
    training.initialise(quantizer, clustered, seed=0)
    flags = flags_of(tmp_path, epochs=3, keep_best="collisions", revive_until=0)
    training.train(quantizer, embeddings.open_embeddings(data_path), clustered, flags)
    assert all(torch.equal(tensor, states[2][name]) for name, tensor in quantizer.state_dict().items())


def test_rqkmeans_plus_starts_as_balanced_rqkmeans_exactly_and_ends_below_rqkmeans(data_path, clustered, tmp_path):
    flags = flags_of(
        tmp_path,
        levels=(16, 16),
        slack=0.2,
        sinkhorn_epsilon=0.02,
        sinkhorn_epsilons=None,
        hidden=(64,),
        epochs=60,
        learning_rate=3e-3,
    )
    quantizer = rqkmeans_plus.warm_start(clustered, flags).eval()
    x = torch.from_numpy(clustered)
    torch.testing.assert_close(quantizer.decoder(quantizer.encoder(x)), x, atol=1e-5, rtol=0)
    scale = float(quantizer.decoder[-1].scale)
    start = rqkmeans_constrained.fit((clustered - clustered.mean(0)) / scale, (16, 16), slack=0.2, epsilon=0.02, seed=0)
    for own, given in zip(quantizer.residual.codebooks, start.residual.codebooks, strict=True):
        torch.testing.assert_close(own, given, atol=1e-4, rtol=1e-4)
    training.train(quantizer, embeddings.open_embeddings(data_path), clustered, flags)
    assert error(quantizer, clustered) < error(rqkmeans.fit(clustered, (16, 16), seed=0), clustered)


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        (rqkmeans, ()),
        (rqkmeans_constrained, ()),
        (rqfaiss, ("--beam", "3")),
        (rqvae, ("--epochs", "2", "--hidden", "12", "--latent", "4")),
        (rqkmeans_plus, ("--epochs", "2", "--hidden", "12")),
    ],
)
def test_every_method_goes_from_embeddings_to_an_index_and_a_checkpoint_without_pickle(module, extra, data_path, tmp_path):
    output, checkpoint, codes = tmp_path / "X.index.json", tmp_path / "c", tmp_path / "codes.npy"
    module.main(
        ["--data_path", str(data_path), "--levels", "8,4,16", "--output", str(output), "--ckpt_path", str(checkpoint)]
        + ["--codes_output", str(codes), "--seed", "1", "--device", "cpu", "--collisions", "relocate", *extra]
    )
    index, saved = read_sids(output), np.load(codes)
    assert list(index) == list(range(1500))
    assert saved.shape == (1500, 3)
    assert saved.dtype == np.int32
    assert (saved.max(axis=0) < [8, 4, 16]).all()
    assert sorted(path.name for path in checkpoint.iterdir()) == ["config.json", "model.safetensors"]
    again = checkpoints.load_checkpoint(checkpoint)
    np.testing.assert_array_equal(again.codes(np.load(data_path)), saved)


def test_training_resumes_from_a_checkpoint_of_its_own_kind_only(data_path, tmp_path):
    common = ["--data_path", str(data_path), "--epochs", "1", "--hidden", "12", "--latent", "4"]
    rqvae.main([*common, "--levels", "8,8", "--output", str(tmp_path / "1.index.json"), "--ckpt_path", str(tmp_path / "c")])
    rqvae.main(
        [
            *common,
            "--levels",
            "8,8",
            "--output",
            str(tmp_path / "2.index.json"),
            "--resume_from_checkpoint",
            str(tmp_path / "c"),
        ]
    )
    other = [*common, "--levels", "8,4", "--output", tmp_path / "3.index.json"]
    told = refusal(rqvae.main, *other, "--resume_from_checkpoint", tmp_path / "c")
    assert "of levels 8,8, this run is rqvae of 8,4" in told


def test_a_checkpoint_of_another_shape_is_one_line(clustered, tmp_path):
    folder = tmp_path / "c"
    checkpoints.save_checkpoint(rqkmeans.fit(clustered, (8, 8), seed=0), folder)
    with pytest.raises(InputError, match="made for embeddings of 16 dimensions, E.npy has 32"):
        checkpoints.load_checkpoint(folder, n_dims=32, data_path=Path("E.npy"))
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "residual.codebooks.1": torch.zeros(9, 16)}, folder / "model.safetensors")
    with pytest.raises(
        InputError, match=r"residual.codebooks.1 is float32 \(9, 16\), config.json asks for float32 \(8, 16\)"
    ):
        checkpoints.load_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "colour": 3}))
    with pytest.raises(InputError, match="colour"):
        checkpoints.load_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="expected a folder with config.json and model.safetensors"):
        checkpoints.load_checkpoint(folder)


def test_codebooks_of_an_npz_are_a_quantizer_too(clustered, tmp_path):
    quantizer = rqkmeans.fit(clustered, (8, 4), seed=0)
    books = {f"codebook_{level}": book.numpy() for level, book in enumerate(quantizer.residual.codebooks)}
    np.savez(tmp_path / "X.codebooks.npz", **books)
    again = checkpoints.load_checkpoint(tmp_path / "X.codebooks.npz")
    np.testing.assert_array_equal(again.codes(clustered), quantizer.codes(clustered))


def test_chunks_change_no_code(data_path, clustered, monkeypatch):
    opened = embeddings.open_embeddings(data_path)
    quantizer = rqkmeans.fit(clustered, (8, 8), seed=0)
    whole = quantizers.encode(quantizer, opened)
    sample = opened.sample(300, seed=3)
    monkeypatch.setattr(embeddings, "CHUNK_BYTES", 4 * 16 * 7)
    assert opened.chunk_rows == 7
    np.testing.assert_array_equal(quantizers.encode(quantizer, opened), whole)
    np.testing.assert_array_equal(opened.sample(300, seed=3), sample)
    assert len(np.unique(sample, axis=0)) == 300
    monkeypatch.setattr(embeddings, "SCATTERED_ROWS", 7)
    np.testing.assert_array_equal(opened.rows(np.arange(1499, 0, -3)), clustered[1499:0:-3])
    seen = np.concatenate([chunk for _, chunk in opened.chunks(shuffle=np.random.default_rng(0))])
    assert not np.array_equal(seen, clustered)
    np.testing.assert_array_equal(np.sort(seen, axis=0), np.sort(clustered, axis=0))


def test_two_processes_train_one_quantizer(data_path, tmp_path):
    """As with several GPUs, here on the CPU: both see half of each batch, one writes."""
    output = tmp_path / "X.index.json"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
        "rq.rqvae",
        "--device",
        "cpu",
        "--data_path",
        str(data_path),
    ]
    command += [
        "--levels",
        "8,8",
        "--hidden",
        "12",
        "--latent",
        "4",
        "--epochs",
        "4",
        "--eval_every",
        "1",
        "--output",
        str(output),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(read_sids(output)) == 1500
    assert result.stderr.count("before training") == 1
    assert "best (error)" in result.stderr


def test_the_loss_of_rqvae_is_in_input_space(clustered):
    quantizer = Quantizer(Design("rqvae", 16, (8, 8), latent=4, hidden=(12,))).eval()
    training.initialise(quantizer, clustered, seed=0)
    x = torch.from_numpy(clustered)
    share, _, codes = quantizer(x, commitment=0.25)
    own = F.mse_loss(torch.from_numpy(quantizer.reconstruction(codes.numpy())), x)
    torch.testing.assert_close(share, own / clustered.var(axis=0).mean(), rtol=1e-4, atol=0)


def test_codebooks_of_a_sample_are_those_of_its_rows_and_every_item_gets_codes(tmp_path):
    rng = np.random.default_rng(0)
    rows_ND = rng.standard_normal((3000, 4), np.float32)
    np.save(tmp_path / "E.npy", rows_ND)
    line = [f"--data_path={tmp_path}/E.npy", "--levels=8,8", f"--ckpt_path={tmp_path}/q", "--overwrite", "--fit_sample=64"]
    rqkmeans.main([*line, f"--codes_output={tmp_path}/alone.npy"])
    rqkmeans.main([*line, f"--codes_output={tmp_path}/with_index.npy", f"--output={tmp_path}/X.index.json"])
    codes_NL = np.load(tmp_path / "alone.npy")
    assert (codes_NL.dtype, codes_NL.shape) == (np.int32, (3000, 2))
    assert (tmp_path / "alone.npy").read_bytes() == (tmp_path / "with_index.npy").read_bytes()
    sample_SD = open_embeddings(tmp_path / "E.npy").sample(64, seed=42)
    assert len(sample_SD) == 64
    quantizer = rqkmeans.fit(sample_SD, (8, 8), seed=42)
    assert np.array_equal(quantizer.codes(rows_ND), codes_NL)
    told = refusal(rqkmeans.main, *line[:-1], "--fit_sample=7")
    assert told == "rq.rqkmeans: --fit_sample 7 is less than the 8 centroids of a level; give more"


def test_extra_codes_are_those_counted_one_item_after_the_other():
    rng = np.random.default_rng(1)
    for dtype in (np.int32, np.uint8):
        codes_NL = rng.integers(0, 6, (500, 3)).astype(dtype)
        seen: Counter = Counter()
        sizes = Counter(map(tuple, codes_NL.tolist()))
        expected = []
        for codes in map(tuple, codes_NL.tolist()):
            expected.append((*codes, seen[codes]) if sizes[codes] > 1 else codes)
            seen[codes] += 1
        found = add_a_code(codes_NL)
        assert list(found) == expected
        assert found[3] == expected[3]
        assert sorted(group_sizes(codes_NL)) == sorted(sizes.values())
