import pytest

from datamodules.mixture.steps import Steps
from datamodules.resume import DataState
from kosmos_lit.errors import UserError
from tests.datamodules.mixture.test_history import history


def state(step: int = 10, rows: int = 12) -> DataState:
    return DataState(step, Steps.constant(rows), history())


def test_a_state_goes_through_a_checkpoint_as_plain_data():
    assert DataState.from_dict(state().to_dict()) == state()


def test_a_state_holds_the_first_row_of_the_next_step():
    assert state(step=10, rows=12).to_dict()["next_row"] == 120


def test_a_state_whose_phases_are_called_legs_is_refused_with_what_to_do():
    data = state().to_dict()
    data["legs"] = data.pop("phases")
    with pytest.raises(UserError, match=r"has no phases: an earlier version wrote it\. Go on with that version, or start"):
        DataState.from_dict(data)


def test_a_state_without_steps_is_refused_with_what_to_do():
    data = {k: v for k, v in state().to_dict().items() if k not in ("steps", "phases")}
    with pytest.raises(UserError, match=r"has no steps and no phases: an earlier version .* with model\.init_from"):
        DataState.from_dict(data)


def test_a_run_that_goes_on_as_before_has_no_changes():
    assert state().resume(lambda _: history(), 12, accept=False) == (state(), [])


def test_another_global_batch_is_a_change_that_need_not_be_accepted():
    resumed, changes = state(step=10, rows=12).resume(lambda _: history(), 24, accept=False)
    assert changes == ["a step reads 24 rows (global_batch_rows), not 12"]
    assert (resumed.next_row, resumed.steps.rows(11)) == (120, range(120, 144))


def test_the_configured_history_follows_from_the_steps_of_the_resumed_run():
    seen = []
    state(step=10, rows=12).resume(lambda steps: seen.append(steps.row(11)) or history(), 24, accept=False)
    assert seen == [144]
