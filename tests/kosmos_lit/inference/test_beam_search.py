import pytest
import torch

from kosmos_lit.inference.beam_search import BLOCK, _highest


@pytest.mark.parametrize("n_scores", [13, 7 * BLOCK, 23 * BLOCK, 23 * BLOCK + 5])
@pytest.mark.parametrize("k", [1, 2, 10])
def test_the_highest_scores_are_found_by_blocks(n_scores, k):
    scores = torch.randn(11, n_scores, generator=torch.Generator().manual_seed(k))
    scores[3, :3] = 9.0 + torch.arange(3)  # several in one block
    scores[5, -3:] = 9.0 + torch.arange(3)  # and in what is left over
    values, places = _highest(scores, k)
    assert torch.equal(values, scores.topk(k).values)
    assert torch.equal(scores.gather(1, places), values)


def test_rows_with_few_scores_that_count():
    scores = torch.full((1, 23 * BLOCK + 5), float("-inf"))
    scores[0, [3, 900]] = torch.tensor([1.0, 2.0])
    values, places = _highest(scores, 10)
    assert (values.tolist()[0][:3], places.tolist()[0][:2]) == ([2.0, 1.0, float("-inf")], [900, 3])
