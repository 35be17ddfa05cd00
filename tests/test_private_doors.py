"""What is assumed of other people's libraries: the names are there, they are called, and no other one is used."""

import ast
import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import ROOT, small_model
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import Trainer
from transformers.cache_utils import Cache

import sft
from sid_sft.forward import architecture
from sid_sft.private_doors import DOORS, closed_doors, is_recurrent
from sid_sft.sid_rows import SidRows
from sid_sft.trainer import SidTrainer

OURS = [*ROOT.glob("*.py"), *(ROOT / "sid_sft").rglob("*.py"), *(ROOT / "rq").rglob("*.py")]
NAMED_TUPLE = {"_replace", "_fields", "_asdict", "_make"}  # public, for all their underscore
MODES = pytest.mark.parametrize("freeze", [True, False], ids=["freeze", "full"])


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def stop(arguments: list[str], caplog) -> str:
    """The last line of a run that must stop, with exit code 2."""
    caplog.clear()
    caplog.set_level("INFO", logger="sft")
    assert sft.main(arguments) == 2, caplog.text
    return caplog.messages[-1]


# ---------------------------------------------------------------------------------------------- names


def private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name != "_"


def private_names(source: str) -> list[str]:
    """Each private name of another library that a module imports, reads, sets, passes or replaces, with its line.

    A module's own are those that it both defines (`def _x` in a class, `self._x = ..`) and uses as `self._x`: a method
    that nothing here calls is there for another library to call, and an attribute that nothing here sets is another's.
    """
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    methods = [item for node in nodes if isinstance(node, ast.ClassDef) for item in node.body if hasattr(item, "name")]
    of_self = [
        node for node in nodes if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in ("self", "cls")
    ]
    set_here = {node.attr for node in of_self if isinstance(node.ctx, ast.Store)} | {method.name for method in methods}
    own = set_here & {node.attr for node in of_self if isinstance(node.ctx, ast.Load)}
    found = [(method.lineno, method.name) for method in methods if method.name not in own]
    for node in nodes:
        names: list[object] = []
        if isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute) and node.attr not in NAMED_TUPLE:
            names = [] if node in of_self and node.attr in own else [node.attr]
        elif isinstance(node, ast.Call):
            names = [keyword.arg for keyword in node.keywords]
            if getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr", "delattr"):
                names += [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            # another's method that is replaced is as private as a name
            names = ["_replaced" for target in node.targets if isinstance(target, ast.Attribute) and target not in of_self]
        found += [(node.lineno, name) for name in names]
    return [f"{line}: {name}" for line, name in sorted(found, key=str) if private(name)]


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_one_module_uses_private_names_of_other_libraries(path):
    found = private_names(path.read_text(encoding="utf-8"))
    if path.name == "private_doors.py":
        assert {line.split()[1] for line in found} == {name for names in DOORS.values() for name in names}
    else:
        assert not found


def test_the_search_for_private_names_finds_each_way_to_use_one():
    for line in (
        "from torch._dynamo import config",
        "import torch._dynamo",
        "from torch.nn.modules.dropout import _DropoutNd",
        "model._is_stateful",
        "if getattr(model, '_is_stateful', False): pass",
        "cached_file(name, _raise_exceptions_for_missing_entries=False)",
        "class A(Trainer):\n def _save(self): pass",
        "class A(Trainer):\n def save(self): super()._save()",
        "class A(Trainer):\n def save(self): self._save()",
        "class A(Trainer):\n def save(self): self._saved = True",
        "trainer.accelerator.prepare_model = lambda model: model",
    ):
        assert private_names(line), line
    for line in (
        "class A(Module):\n def _look(self): pass\n def look(self): self._look()",
        "class A:\n def set(self): self._seen = 1\n def get(self): return self._seen",
        "row._replace(user=1)._fields",
        "_own()",
        "for _ in range(3): pass",
    ):
        assert not private_names(line), line


@pytest.mark.parametrize("owner", DOORS)
def test_the_installed_library_has_each_private_name_as_it_is_used(owner):
    assert closed_doors(owner) == []
    assert all(hasattr(getattr(transformers, owner), name) for name in DOORS[owner])


def test_a_renamed_door_stops_a_resumed_run_with_one_line(flags, tmp_path, caplog, monkeypatch):
    assert sft.main(flags(max_steps=3)) == 0
    monkeypatch.delattr(Trainer, "_load_from_checkpoint")
    line = stop(flags(max_steps=3, resume_from_checkpoint=tmp_path / "run" / "checkpoint-3"), caplog)
    assert "there is no Trainer._load_from_checkpoint(self, resume_from_checkpoint, model)" in line
    assert "install the versions of requirements.txt" in line
    monkeypatch.setattr(Trainer, "_load_from_checkpoint", lambda self, folder: None, raising=False)
    assert closed_doors("Trainer")


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (Trainer, "train", {"resume_from_checkpoint"}),
        (Trainer, "training_step", {"model", "inputs", "num_items_in_batch"}),
        (Trainer, "get_train_dataloader", set()),
        (Trainer, "create_optimizer", {"model"}),
        (Trainer, "floating_point_ops", {"inputs"}),
        (Trainer, "evaluate", {"eval_dataset", "ignore_keys", "metric_key_prefix"}),
        (Trainer, "log", {"logs", "start_time"}),
        (Trainer, "save_model", {"output_dir"}),
        (Accelerator, "prepare_model", {"model", "evaluation_mode"}),
        (Cache, "update", {"key_states", "value_states", "layer_idx"}),
        (Cache, "get_seq_length", {"layer_idx"}),
    ],
)
def test_the_public_methods_that_are_replaced_or_called_are_there(owner, name, parameters):
    assert parameters <= inspect.signature(getattr(owner, name)).parameters.keys()


def test_a_recurrent_model_is_known_as_one():
    assert is_recurrent(small_model("mamba", 50))
    assert not is_recurrent(small_model("qwen2", 50))


def test_attention_layers_read_the_past_that_our_cache_gives_them():
    (kind,) = [
        value for value in vars(architecture).values() if inspect.isclass(value) and Cache in getattr(value, "__bases__", ())
    ]
    model, ids = small_model("qwen2", 50).eval(), torch.arange(12)[None] + 3
    first = kind({}, keep=True)
    model.base_model(input_ids=ids[:, :7], past_key_values=first, use_cache=True)
    past = architecture.appended({}, first.new)
    positions = torch.arange(7, 12)[None]
    mask = torch.full((5, 12), -math.inf).triu(diagonal=8)[None, None]
    rest = model.base_model(
        input_ids=ids[:, 7:],
        position_ids=positions,
        attention_mask=mask,
        past_key_values=kind(past, keep=False),
        use_cache=True,
    )
    whole = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(rest.last_hidden_state, whole[:, 7:], rtol=1e-4, atol=1e-5)


def test_the_trainer_imports_no_command_and_is_given_what_measures_recommendations():
    tree = ast.parse((ROOT / "sid_sft" / "trainer.py").read_text())
    modules = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert "sid_sft.sid_rows" in modules
    assert not {module for module in modules if module.split(".")[0] in ("sft", "evaluate", "data", "fire")}
    assert not {module for module in modules if module.startswith("sid_sft.recommend")}


# ---------------------------------------------------------------------------------------------- clipping


def total_norm(parameters) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


@pytest.fixture
def small_norm(monkeypatch) -> float:
    """Runs clip to a norm that every gradient is far above of."""
    make = sft.training_arguments

    def arguments(*given):
        args = make(*given)
        args.max_grad_norm = 1e-3
        return args

    monkeypatch.setattr(sft, "training_arguments", arguments)
    return 1e-3


@MODES
def test_a_huge_gradient_is_clipped_at_every_step_and_logged_as_it_was(freeze, flags, tmp_path, small_norm, monkeypatch):
    before, stepped = [], []
    total = SidTrainer.sum_gradients

    def sum_gradients(self):
        total(self)
        before.append(total_norm(self.trained()))

    monkeypatch.setattr(SidTrainer, "sum_gradients", sum_gradients)
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: stepped.append(total_norm([p for group in optimizer.param_groups for p in group["params"]]))
    )
    try:
        assert sft.main(flags(freeze_LLM=freeze, max_steps=3)) == 0
    finally:
        hook.remove()
    logged = [entry["grad_norm"] for entry in history(tmp_path / "run") if "grad_norm" in entry]
    assert len(before) == len(logged) == 3
    assert len(stepped) >= 3
    assert min(before) > 100 * small_norm
    assert stepped == pytest.approx([small_norm] * len(stepped), rel=1e-3)
    assert logged == pytest.approx(before, rel=1e-6)


@MODES
def test_a_run_whose_gradients_nothing_clips_stops_before_its_first_step(
    freeze, flags, tmp_path, small_norm, monkeypatch, caplog
):
    if freeze:
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_, **settings: torch.tensor(1.0))
    else:
        monkeypatch.setattr(Trainer, "_clip_grad_norm", lambda self, model: torch.tensor(1.0))
    line = stop(flags(freeze_LLM=freeze), caplog)
    assert f"with transformers {transformers.__version__} and accelerate" in line
    assert "the gradients are not clipped; install the versions of requirements.txt" in line
    assert not list((tmp_path / "run").glob("*"))


# ---------------------------------------------------------------------------------------------- checkpoints


def tensors(folder: Path, freeze: bool) -> dict[str, torch.Tensor]:
    return load_file(folder / ("sid_rows.safetensors" if freeze else "model.safetensors"))


@MODES
def test_a_checkpoint_holds_what_trains_and_the_best_of_them_is_the_final_one(freeze, flags, tmp_path, monkeypatch):
    measured = SidTrainer.evaluate

    def worse_each_time(self, *arguments, **settings):
        return {**measured(self, *arguments, **settings), "eval_loss": float(self.state.global_step)}

    monkeypatch.setattr(SidTrainer, "evaluate", worse_each_time)
    assert sft.main(flags(freeze_LLM=freeze)) == 0
    run = tmp_path / "run"
    files = {path.name for path in (run / "checkpoint-3").iterdir()}
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "checkpoint.json"}
    assert files >= state
    if freeze:
        assert files == state | {"sid_rows.safetensors"}
    else:
        assert "model.safetensors" in files
    first, last, final = (tensors(run / name, freeze) for name in ("checkpoint-3", "checkpoint-6", "final_checkpoint"))
    assert all(torch.equal(final[name], first[name]) for name in final)
    assert not all(torch.equal(final[name], last[name]) for name in final)


def test_a_resumed_run_and_its_best_checkpoint_load_the_rows(flags, tmp_path, monkeypatch):
    assert sft.main(flags()) == 0
    run, read, load = tmp_path / "run", [], SidRows.load

    def note(self, path):
        read.append(path)
        load(self, path)

    monkeypatch.setattr(SidRows, "load", note)
    assert sft.main(flags(output_dir=tmp_path / "resumed", resume_from_checkpoint=run / "checkpoint-3")) == 0
    best = json.loads((tmp_path / "resumed" / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert read == [run / "checkpoint-3" / "sid_rows.safetensors", Path(best) / "sid_rows.safetensors"]


def test_a_resumed_run_without_the_rows_of_its_checkpoint_stops_before_its_first_step(flags, tmp_path, monkeypatch, caplog):
    assert sft.main(flags()) == 0
    monkeypatch.setattr(SidTrainer, "_load_from_checkpoint", lambda self, *_: None)
    line = stop(flags(resume_from_checkpoint=tmp_path / "run" / "checkpoint-3"), caplog)
    assert "the rows of the checkpoint are not loaded" in line


# ---------------------------------------------------------------------------------------------- a loss that is not finite


def turns_nan(monkeypatch, step: int) -> None:
    """The forward gives nan at a step."""
    train = SidTrainer.training_step

    def training_step(self, *arguments):
        if self.state.global_step + 1 == step:
            nll = self.forward.nll
            self.forward.nll = lambda part: nll(part) * math.nan
        return train(self, *arguments)

    monkeypatch.setattr(SidTrainer, "training_step", training_step)


@MODES
@pytest.mark.parametrize(
    "when",
    [
        {"eval_steps": 3, "save_steps": 3},
        {"eval_file": None, "eval_steps": None, "save_steps": 3},
        {"eval_file": None, "eval_steps": None, "save_steps": 100, "max_steps": 2},
    ],
    ids=["at the evaluation", "at the save", "at the end"],
)
def test_a_loss_of_nan_stops_the_run_though_no_line_of_the_log_is_due(freeze, when, flags, tmp_path, monkeypatch, caplog):
    turns_nan(monkeypatch, 2)
    line = stop(flags(freeze_LLM=freeze, logging_steps=100, learning_rate=0.02, **when), caplog)
    expected = "the loss of step 2 is not finite (nan or infinite); try a lower --learning_rate than 0.02"
    assert line == f"sft.py: {expected}"
    assert not list((tmp_path / "run").glob("*"))


def test_a_line_of_the_log_names_the_step_of_a_nan_before_it(flags, monkeypatch, caplog):
    turns_nan(monkeypatch, 2)
    line = stop(flags(logging_steps=4, eval_steps=5, save_steps=5), caplog)
    assert "the loss of step 2 is not finite" in line


@MODES
def test_an_infinite_gradient_of_the_last_step_leaves_no_checkpoint(freeze, flags, tmp_path, monkeypatch, caplog):
    total = SidTrainer.sum_gradients

    def sum_gradients(self):
        total(self)
        if self.state.global_step + 1 == 2:
            self.trained()[0].grad[0] = math.inf

    monkeypatch.setattr(SidTrainer, "sum_gradients", sum_gradients)
    changes = {"eval_file": None, "eval_steps": None, "save_steps": 100, "max_steps": 2, "logging_steps": 100}
    line = stop(flags(freeze_LLM=freeze, **changes), caplog)
    assert "some weights after step 2 are not finite" in line
    assert not list((tmp_path / "run").glob("*"))


def test_an_evaluation_that_is_not_finite_stops_the_run(flags, tmp_path, monkeypatch, caplog):
    measured = SidTrainer.evaluate

    def evaluate(self, *arguments, **settings):
        self.eval_forward.nll = lambda part: torch.tensor(math.nan)
        return measured(self, *arguments, **settings)

    monkeypatch.setattr(SidTrainer, "evaluate", evaluate)
    assert "the evaluation loss after step 3 is not finite" in stop(flags(), caplog)
    assert not list((tmp_path / "run").glob("*"))


# ---------------------------------------------------------------------------------------------- two processes


END = """
code = sft.main(sys.argv[1:])
import torch.distributed
assert not torch.distributed.is_initialized(), "a group that is left may end the process by SIGABRT"
sys.exit(code)
"""


def two_processes(script: str, arguments: list[str], tmp_path: Path) -> subprocess.CompletedProcess:
    """sft.py on two processes, after some lines of Python that change it."""
    path = tmp_path / "changed.py"
    path.write_text(f"import os, sys\nimport sft\nfrom sid_sft.trainer import SidTrainer\n{script}\n{END}")
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [sys.executable, *start, str(path), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


STEP = """
train = SidTrainer.training_step
def training_step(self, model, *rest):
    {change}
    return train(self, model, *rest)
SidTrainer.training_step = training_step
"""


@pytest.mark.parametrize("freeze", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["freeze", "full"])
def test_two_processes_train_the_model_itself_and_no_wrapper_of_it(freeze, flags, tmp_path):
    change = "assert self.args.world_size == 2 and model is self.model is self.model_wrapped"
    result = two_processes(STEP.format(change=change), flags(freeze_LLM=freeze, max_steps=3), tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_wrapper_that_comes_all_the_same_stops_the_run(flags, tmp_path):
    forget = """
train = SidTrainer.train
def forgets_that_it_is_prepared(self, *arguments, **settings):
    self.model._is_accelerate_prepared = False
    return train(self, *arguments, **settings)
SidTrainer.train = forgets_that_it_is_prepared
"""
    result = two_processes(forget, flags(), tmp_path)
    assert result.returncode != 0
    assert "the model is in a wrapper that sums gradients at every backward; install the versions" in result.stderr
    assert not list((tmp_path / "run").glob("*"))


def test_a_nan_of_one_process_stops_them_all(flags, tmp_path):
    change = "nll, factor = self.forward.nll, float('nan' if os.environ['RANK'] == '1' else 1)"
    change += "; self.forward.nll = lambda part: nll(part) * factor"
    changes = {"logging_steps": 100, "eval_steps": 2, "save_steps": 2, "max_steps": 2}
    result = two_processes(STEP.format(change=change), flags(**changes), tmp_path)
    assert result.returncode != 0
    assert result.stderr.count("the loss of step 1 is not finite") == 1  # rank 0 says so
    assert "exitcode  : 2" in result.stderr
    assert not list((tmp_path / "run").glob("*"))
