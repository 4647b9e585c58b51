"""fp16's loss scale: when it falls, how far, and when it grows."""

from phi1.train.recipe.recipe import Train
from phi1.train.step.grad_scaler import GradScaler


def scales(events, enabled=True, **changes):
    """The scale after each step of a row such as "++-": + finite, - not."""
    given = {"loss_scale": 64.0, "loss_scale_window": 3, "loss_scale_hysteresis": 2, "loss_scale_floor": 16.0} | changes
    scale, seen = GradScaler(Train(**given), enabled), []
    for event in events:
        scale.update(event == "+")
        seen.append(scale.scale)
    return seen


def test_the_first_overflows_of_a_growth_are_put_up_with():
    assert scales("-+-++-") == [64, 64, 32, 32, 32, 16]
    assert scales("---", loss_scale_hysteresis=1) == [32, 16, 16]
    assert scales("-----", loss_scale_hysteresis=3) == [64, 64, 32, 16, 16]


def test_finite_steps_in_a_row_double_it_and_restore_the_patience():
    assert scales("+++++++") == [64, 64, 128, 128, 128, 256, 256]
    assert scales("++-+++") == [64, 64, 64, 64, 64, 128]
    assert scales("-+++--") == [64, 64, 64, 128, 128, 64]


def test_it_does_not_fall_below_the_floor_nor_rise_to_it():
    assert scales("------") == [64, 32, 16, 16, 16, 16]
    assert scales("---", loss_scale=8.0) == [8, 8, 8]


def test_a_saved_scale_goes_on_as_it_would_have():
    first = GradScaler(Train(loss_scale_window=4), enabled=True)
    for finite in (True, True, False, True, True):
        first.update(finite)
    second = GradScaler(Train(loss_scale_window=4), enabled=True)
    second.load_state_dict(first.state_dict())
    for finite in (False, True, True, True, True):
        first.update(finite)
        second.update(finite)
        assert second.state_dict() == first.state_dict()
    assert first.scale == 65536


def test_outside_fp16_it_is_1_and_saves_nothing():
    assert scales("-++++", enabled=False) == [1] * 5
    plain = GradScaler(Train(), enabled=False)
    assert plain.state_dict() == {}
    plain.load_state_dict({"scale": 4.0, "clean": 1, "patience": 1})
    assert plain.scale == 1
