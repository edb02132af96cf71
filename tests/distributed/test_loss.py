"""The losses of a batch shared by two and three processes; see `loss_worker.py` for what they are held against."""

import pytest
import torch

from modeling_gcl import gcl_loss
from tests.support.launches import ROOT, launch
from universal_gcl.training.distributed import BatchProcesses

WORKER = ROOT / "tests" / "distributed" / "loss_worker.py"


@pytest.mark.parametrize("processes", [2, 3])
def test_a_shared_batch_equals_the_whole_on_one_process(processes, tmp_path):
    """Every loss and switch; even, ragged and single-pair shares; gathered and in a half ring; float32 and float64."""
    launch(WORKER, tmp_path, processes=processes, options=["-W", "error::FutureWarning"])
    counts = [int((tmp_path / f"rank_{rank}").read_text()) for rank in range(processes)]
    assert len(set(counts)) == 1 and counts[0] > 300


def test_alone_a_process_has_the_whole_batch():
    embeds = [torch.nn.functional.normalize(torch.randn(5, 4), dim=-1) for _ in range(3)]
    for half_ring in (False, True):
        shared = gcl_loss(*embeds, 20.0, processes=BatchProcesses(half_ring=half_ring))
        assert torch.equal(shared, gcl_loss(*embeds, 20.0))
    with pytest.raises(ValueError, match="^the batch is empty"):
        gcl_loss(*(x[:0] for x in embeds), 20.0, processes=BatchProcesses())
