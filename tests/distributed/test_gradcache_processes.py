"""GradCache with accumulation on two processes against one plain step on the whole batch."""

import pytest
import torch

from tests.support.launches import ROOT, launch

WORKER = ROOT / "tests" / "distributed" / "gradcache_worker.py"


def trained_by(processes, out):
    launch(WORKER, out, processes=processes, cwd=out.parent)
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return trained_by(1, tmp_path_factory.mktemp("one") / "weights.pt")


@pytest.mark.parametrize("processes, cases", [(2, 12), (3, 7)])
def test_processes_in_chunks_train_as_one_without_also_after_a_shortage_of_memory(
    processes, cases, one_process, tmp_path
):
    several = trained_by(processes, tmp_path / "weights.pt")
    assert len(several) == cases
    for case, parameters in several.items():
        expected = one_process.get(case, one_process["gcl"])  # a shortage of memory changes nothing
        for name, parameter in parameters.items():
            torch.testing.assert_close(
                parameter, expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, at=(case, name): f"{at}: {m}"
            )
