import pytest
import torch
import torch.distributed as dist

from sid_sft.interruption import StopSignals
from sid_sft.process_groups import process_groups_left


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


class Broken(Exception):
    pass


@pytest.mark.usefixtures("group")
def test_groups_are_left_at_the_end():
    with process_groups_left():
        dist.all_reduce(torch.ones(2))
        assert dist.is_initialized()
    assert not dist.is_initialized()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt, SystemExit])
def test_groups_are_left_after_an_error_and_the_error_stays(error):
    with pytest.raises(error), process_groups_left():
        raise error
    assert not dist.is_initialized()


@pytest.mark.usefixtures("group")
def test_the_groups_of_gpus_are_not_left_after_an_error_of_perhaps_one_process(monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    with pytest.raises(Broken), process_groups_left():
        raise Broken
    assert dist.is_initialized()
    with process_groups_left():
        pass
    assert not dist.is_initialized()


@pytest.mark.usefixtures("group")
def test_the_group_in_which_processes_agree_to_stop_is_left_beside_those_of_gpus():
    signals = StopSignals()
    signals.group = dist.new_group(backend="gloo")
    with pytest.raises(Broken), signals:
        raise Broken
    assert dist.is_initialized()
    with pytest.raises(ValueError, match="[Gg]roup"):
        dist.destroy_process_group(signals.group)  # it is none any more


def test_without_groups_nothing_is_done():
    with process_groups_left():
        assert not dist.is_initialized()
