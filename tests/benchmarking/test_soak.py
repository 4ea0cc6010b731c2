from benchmarking.scenarios.soak import grow


def test_what_grows_by_one_an_epoch_has_grown() -> None:
    assert grow(list(range(200))) == 180 - 80


def test_what_comes_and_goes_has_not_grown() -> None:
    assert grow([10 + epoch * 7 % 5 for epoch in range(200)]) == 0


def test_what_was_reached_before_the_second_half_has_not_grown() -> None:
    assert grow([min(epoch, 50) for epoch in range(200)]) == 0
