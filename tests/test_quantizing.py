"""A frozen base in 8 or 4 bits: rows learn through it, none of its bits moves, and what is saved is the base's own model."""

import json

import pytest
import torch
import transformers
from test_adapters import run
from test_frozen_prefix import plain_recipe
from test_resuming import SHORT, last_line
from test_sft import assert_only_sid_rows_moved, losses, weights

import sft
from sid_sft.adapters import ADAPTER_FOLDER, WEIGHTS_FILE
from sid_sft.checkpoint import load_base
from sid_sft.files import InputError
from sid_sft.finite import broken_weights
from sid_sft.forward.examples import Examples
from sid_sft.quantizing import differing_bits, frozen_bits, stored_bytes
from sid_sft.settings import TrainFlags
from sid_sft.sid_rows import ROWS_FILE, SidRowAdamW, SidRows, base_hash, read_rows_file

pytest.importorskip("peft")
pytest.importorskip("torchao")
bitsandbytes = pytest.importorskip("bitsandbytes")

BITS = pytest.mark.parametrize("bits", [8, 4])
LAYERS = 14  # linear layers of the small base


def loaded(base, bits: int, **changes):
    """The base as a run holds it."""
    flags = {"base_model": str(base), "output_dir": "out", "sid_index_path": "x", "freeze_LLM": True, **changes}
    return load_base(TrainFlags(**flags, **{f"load_in_{bits}bit": True}), torch.device("cpu"))[0]


def dequantized(model, base):
    """A plain model whose layers hold the numbers that a quantized one stands for."""
    plain = sft.load_model(str(base), trust_remote_code=False)
    found = dict(model.named_parameters())
    count = 0
    for name, weight in plain.named_parameters():
        own = found[name]
        if isinstance(own, bitsandbytes.nn.Params4bit):
            weight.data = bitsandbytes.functional.dequantize_4bit(own.data, own.quant_state)
            count += 1
        elif hasattr(own, "dequantize") and type(own) is not torch.nn.Parameter:
            weight.data = own.dequantize()
            count += 1
    assert count == LAYERS
    return plain


# ---------------------------------------------------------------------------------------------- the model


@BITS
def test_loss_and_gradient_are_those_of_the_numbers_that_the_bits_stand_for(bits, base, tokenizer, sid_tokens, dataset):
    """Also after the model was used without gradients, as a trial and every evaluation do."""
    examples = Examples(dataset)
    found = []
    quantized = loaded(base, bits)
    for model in (quantized, dequantized(quantized, base)):
        sft.grow_embeddings(model, len(tokenizer))
        sft.init_rows(model, tokenizer.convert_tokens_to_ids(sid_tokens), 300, seed=42)
        rows = sft.freeze_llm(model.eval(), tokenizer.convert_tokens_to_ids(sid_tokens), sid_tokens)
        with torch.no_grad():
            plain_recipe(model, examples, range(4))
        loss = plain_recipe(model, examples, range(4))
        loss.backward()
        rows.collect_gradients()
        found.append((loss.detach(), rows.masters[0].grad))
    torch.testing.assert_close(*(loss for loss, _ in found), rtol=1e-5, atol=0)
    gradients = [gradient for _, gradient in found]
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


@BITS
def test_a_quantized_model_is_smaller_and_keeps_its_embedding(bits, base):
    plain, model = sft.load_model(str(base), trust_remote_code=False), loaded(base, bits)
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    layers = sum(weight.numel() for name, weight in plain.named_parameters() if name.endswith("proj.weight"))
    saved = stored_bytes(plain) - stored_bytes(model)
    assert layers * 4 * 0.7 < saved < layers * (4 - bits / 8)  # float32 before; codes and scales now
    assert model.num_parameters() == plain.num_parameters()


@BITS
def test_every_bit_but_the_sid_rows_is_in_the_proof(bits, base):
    model = loaded(base, bits)
    rows = SidRows(model, [5, 9], ["<a>", "<b>"])
    before = frozen_bits(model, rows.ids)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[rows.ids] += 1
        assert differing_bits(before, frozen_bits(model, rows.ids)) == []
        embedding[6, 3] *= -1
        assert differing_bits(before, frozen_bits(model, rows.ids)) == ["model.embed_tokens.weight"]
        embedding[6, 3] *= -1
        layer = model.model.layers[1].mlp.up_proj.weight
        codes, scales = (layer.data, layer.quant_state.absmax) if bits == 4 else (layer.qdata, layer.scale)
        codes.view(torch.uint8).flatten()[7] ^= 1
        (moved,) = differing_bits(before, frozen_bits(model, rows.ids))
        assert moved.startswith("model.layers.1.mlp.up_proj.weight")
        codes.view(torch.uint8).flatten()[7] ^= 1
        assert differing_bits(before, frozen_bits(model, rows.ids)) == []
        scales.flatten()[0] *= 1.001
        (moved,) = differing_bits(before, frozen_bits(model, rows.ids))
        assert moved.startswith("model.layers.1.mlp.up_proj.weight")
        assert base_hash(model, 5) == base_hash(model, 5)


@BITS
def test_broken_numbers_of_a_base_are_found_through_the_bits(bits, base, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.model.norm.weight.data[1] = torch.nan
    model.save_pretrained(tmp_path)
    assert broken_weights(loaded(tmp_path, bits)) == {"model.norm.weight": 1}


# ---------------------------------------------------------------------------------------------- a run


@BITS
def test_a_run_moves_the_sid_rows_alone_and_saves_the_unquantized_base(bits, flags, base, sid_tokens, tmp_path, caplog):
    library = {8: "torchao", 4: "bitsandbytes"}[bits]
    changes = {"max_steps": 20, "eval_steps": 10, "save_steps": 10, "warmup_steps": 2, f"load_in_{bits}bit": True}
    log = run(flags(**changes), caplog)
    whole = f"{4 * transformers.AutoModelForCausalLM.from_pretrained(base).num_parameters() / 1e6:.1f}"
    assert f"Base model in {bits} bits ({library}): 0.1 MB, in place of {whole} MB in float32; training goes" in log
    assert "Frozen prefix: " in log
    assert " tensors of the quantized base, by SHA-256)" in log
    assert "frozen values changed: 0 (" in log
    assert "Trainable parameters (with grad-mask): 640 / 29,120 (" in log
    found = losses(tmp_path / "run")
    assert sum(found[-3:]) < sum(found[:3]) - 0.5
    final = tmp_path / "run" / "final_checkpoint"
    assert_only_sid_rows_moved(base, final, sid_tokens)
    rows = read_rows_file(final / ROWS_FILE)
    assert torch.equal(weights(final)["model.embed_tokens.weight"][rows.ids], rows.rows["embedding"])
    assert "quantization_config" not in json.loads((final / "config.json").read_text())
    assert f"the base was held in {bits} bits" in (final / "README.md").read_text()
    tokenizer, model = (
        sft.load_tokenizer(str(base), trust_remote_code=False),
        sft.load_model(str(base), trust_remote_code=False),
    )
    sft.apply_sid_rows(model, tokenizer, final / ROWS_FILE)  # the rows file is of the unquantized base


@BITS
def test_adapters_train_through_the_bits_and_a_run_resumes(bits, flags, tmp_path, caplog):
    changes = {**SHORT, "lora_rank": 2, "lora_learning_rate": 0.02, f"load_in_{bits}bit": True}
    log = run(flags(**changes), caplog)
    assert "loss equal to the model's own" in log
    assert "frozen values changed: 0 (" in log
    final = tmp_path / "run" / "final_checkpoint"
    expected = (final / ADAPTER_FOLDER / WEIGHTS_FILE).read_bytes(), (final / "model.safetensors").read_bytes()
    run(flags(**changes, resume_from_checkpoint=tmp_path / "run" / "checkpoint-4"), caplog)
    assert ((final / ADAPTER_FOLDER / WEIGHTS_FILE).read_bytes(), (final / "model.safetensors").read_bytes()) == expected
    other = {8: "load_in_8bit True (now False)", 4: "load_in_4bit True (now False)"}[bits]
    line = last_line(run(flags(**{**changes, f"load_in_{bits}bit": False}, resume_from_checkpoint=True), caplog, code=2))
    assert f"is of another run: {other}" in line
    assert f"with another load_in_{bits}bit start afresh" in line


@BITS
def test_a_bit_that_moves_leaves_no_model(bits, flags, tmp_path, caplog, monkeypatch):
    step = SidRowAdamW.step

    def move_one(self, closure=None):
        result = step(self, closure)
        layer = trained[0].model.layers[0].self_attn.o_proj.weight
        codes = layer.data if bits == 4 else layer.qdata
        codes.view(torch.uint8).flatten()[0] ^= 1
        return result

    trained = []
    freeze = sft.freeze_llm

    def note(model, *rest):
        trained.append(model)
        return freeze(model, *rest)

    monkeypatch.setattr(sft, "freeze_llm", note)
    monkeypatch.setattr(SidRowAdamW, "step", move_one)
    log = run(flags(max_steps=1, eval_file=None, **{f"load_in_{bits}bit": True}), caplog, code=2)
    assert "frozen values changed: 1 (" in log
    assert last_line(log).endswith("1 frozen values changed in training; no final_checkpoint was written")
    assert not (tmp_path / "run" / "final_checkpoint").exists()


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("freeze", [True, False])
def test_a_base_that_is_quantized_already_is_refused_in_one_line(freeze, flags, base, tmp_path, caplog):
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=settings)
    model.save_pretrained(tmp_path / "quantized")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "quantized")
    line = last_line(run(flags(base_model=tmp_path / "quantized", freeze_LLM=freeze), caplog, code=2))
    assert "quantized: is quantized already (bitsandbytes); start from the unquantized model" in line
    with pytest.raises(InputError, match="is quantized already"):
        loaded(tmp_path / "quantized", 8)
