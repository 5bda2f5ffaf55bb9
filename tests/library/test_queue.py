"""The queue of negatives: order, state, gradients, several processes."""

import re
import subprocess
import sys

import pytest
import torch

from densessl import KeyQueue, info_nce_loss


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=1)


@pytest.mark.parametrize("sizes", [[4, 4, 4], [3, 5, 2, 6], [10, 1], [25], [12, 3]])
def test_holds_the_last_keys_oldest_first(sizes):
    """Batches that divide the length, that do not, and one that is longer."""
    queue = KeyQueue(10, 3)
    pushed = queue.keys
    for size in sizes:
        batch = unit(size, 3)
        queue.push(5 * batch)
        pushed = torch.cat([pushed, batch])
        assert queue.keys.shape == (10, 3)
        torch.testing.assert_close(queue.keys, pushed[-10:])


def test_starts_with_random_unit_vectors():
    torch.testing.assert_close(KeyQueue(50, 8).keys.norm(dim=1), torch.ones(50))
    assert not torch.equal(KeyQueue(5, 4).keys, KeyQueue(5, 4).keys)


def test_is_saved_with_the_state():
    queue, other = KeyQueue(6, 3), KeyQueue(6, 3)
    queue.push(torch.randn(4, 3))
    other.load_state_dict(queue.state_dict())
    assert torch.equal(queue.keys, other.keys)


def test_keys_pushed_before_the_backward_pass_do_not_change_it():
    query, key = torch.randn(2, 1, 3, requires_grad=True), torch.randn(2, 1, 3)
    queue = KeyQueue(6, 3)
    (expected,) = torch.autograd.grad(info_nce_loss(query, key, queue.keys), query)
    loss = info_nce_loss(query, key, queue.keys)
    queue.push(key[:, 0])
    (gradient,) = torch.autograd.grad(loss, query)
    assert torch.equal(gradient, expected)
    assert not queue.keys.requires_grad


def test_half_precision_keys():
    queue = KeyQueue(6, 3)
    queue.push(torch.randn(4, 3, requires_grad=True).bfloat16())
    assert queue.keys.dtype == torch.float32
    assert not queue.keys.requires_grad


SCRIPT = """
import sys, time, torch, torch.distributed as dist
from densessl import KeyQueue
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.manual_seed(0)
queue, batch = KeyQueue(10, 3), torch.eye(3).repeat(2, 1) + torch.arange(6)[:, None]
queue.push(batch[3 * rank : 3 * rank + 3])
dist.barrier()  # neither ends while the other still asks the store
time.sleep(0.3)  # with torch 2.6, closing the group may wait for ever for a thread that still has tensors to free
dist.destroy_process_group()
torch.manual_seed(0)
alone = KeyQueue(10, 3)
alone.push(batch)
assert torch.equal(queue.keys, alone.keys), (queue.keys, alone.keys)
"""


def test_two_processes_hold_what_one_would(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KeyQueue(0, 3), "length: expected a whole number of at least 1, got 0"),
        (lambda: KeyQueue(3, 0), "dim: expected a whole number of at least 1, got 0"),
        (
            lambda: KeyQueue(3, 4).push(torch.rand(2, 3)),
            "keys: expected floating point (B, 4), got torch.float32 (2, 3",
        ),
        (lambda: KeyQueue(3, 4).push(torch.rand(2, 4).long()), "keys: expected floating point (B, 4), got torch.int64"),
        (lambda: KeyQueue(3, 4).push(torch.rand(2, 4, 1)), "keys: expected floating point (B, 4)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
