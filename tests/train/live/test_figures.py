"""Lines of metrics come to figures: curves from their start, the newest of the rest, loads over a few lines."""

import pytest

from dylora_moe.train.live.figures import Curve, Figures, History, Learned, Place

PLACE = Place(run="stream", number=1, total=2, decided=(Learned(skill="a", kind="grow", expert="a"),))


def figures(history: History, place: Place | None = None) -> Figures:
    return history.figures(name="run", step=3, max_steps=9, elapsed_s=1.5, warnings=["one"], place=place)


def train_line(loss: float, **changes: float) -> dict[str, float]:
    return {"step": 1, "loss": loss, "learning_rate": 1e-4, "tokens_per_second": 10.0, "memory_gb": 2.0} | changes


def test_curves_have_the_first_value_and_the_newest() -> None:
    history = History()
    history.add({"step": 0, "eval_loss": 3.0, "eval_code_loss": 2.0, "eval_chat_loss": 4.0})
    for number in range(1000):
        history.add(train_line(8.0 - number / 250))
    history.add({"step": 9, "eval_loss": 2.0, "eval_code_loss": 1.0, "eval_chat_loss": 3.0})
    found = figures(history)
    assert found.training is not None and found.validation is not None
    assert (found.training.first, found.training.last) == (8.0, pytest.approx(4.004))
    assert len(found.training.points) == 200  # however long the run
    assert found.validation.points == (3.0, 2.0)
    assert [(curve.name, curve.points, curve.change) for curve in found.domains] == [
        ("code", (2.0, 1.0), -0.5),
        ("chat", (4.0, 3.0), -0.25),
    ]


def test_the_rest_is_that_of_the_newest_line_of_training() -> None:
    history = History()
    history.add(train_line(2.0, memory_share=0.1, router_entropy=0.9))
    history.add(train_line(1.0, memory_share=0.2, learning_rate=5e-5, tokens_per_second=20.0, router_entropy=0.8))
    history.add({"step": 2, "eval_loss": 3.0})
    found = figures(history)
    assert (found.learning_rate, found.tokens_per_second, found.memory_gb) == (5e-5, 20.0, 2.0)
    assert (found.memory_share, found.router_entropy, found.warnings) == (0.2, 0.8, ("one",))


def test_before_the_first_line_nothing_is_known() -> None:
    found = figures(History())
    assert (found.training, found.validation, found.domains, found.loads) == (None, None, (), ())
    assert (found.name, found.step, found.max_steps, found.learning_rate) == ("run", 3, 9, None)


def test_loads_are_means_of_the_last_five_lines_and_dead_below_a_hundredth_of_the_even_share() -> None:
    history = History()
    for share in (0.9, 0.1, 0.2, 0.3, 0.4, 0.5):
        history.add(train_line(1.0, load_entropy=0.5, load_a=share, load_b=1 - share, load_c=0.0033))
    assert [(load.name, load.share, load.dead) for load in figures(history).loads] == [
        ("a", pytest.approx(0.3), False),
        ("b", pytest.approx(0.7), False),
        ("c", pytest.approx(0.0033), True),
    ]
    assert not any(load.dead for load in figures(history, PLACE).loads)  # the experts of other skills rest


def test_other_experts_begin_anew_and_without_a_router_there_is_none() -> None:
    history = History()
    history.add(train_line(1.0, load_a=1.0))
    history.add(train_line(1.0, load_a=0.5, load_b=0.5))
    assert [(load.name, load.share) for load in figures(history).loads] == [("a", 0.5), ("b", 0.5)]
    history.add(train_line(1.0))
    assert figures(history).loads == ()


@pytest.mark.parametrize(
    ("points", "change"),
    [((2.0, 3.0), 0.5), ((2.0,), None), ((0.0, 1.0), None), ((float("nan"), 1.0), None), ((1.0, float("inf")), None)],
)
def test_a_change_is_told_where_it_says_something(points: tuple[float, ...], change: float | None) -> None:
    assert Curve(name="a", points=points, first=points[0], last=points[-1]).change == change
