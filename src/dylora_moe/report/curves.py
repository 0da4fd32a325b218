"""Lines of figures -> the charts of a run's page."""

from collections.abc import Sequence

from markupsafe import Markup

from dylora_moe.report.charts import COLOURS, SMALL, Axes, Line, all_sizes, line_chart, range_chart, stacked_chart
from dylora_moe.report.figures import DomainFigures, curve, loads, loss_curves, number
from dylora_moe.report.records import Record

Marks = Sequence[tuple[str, float]]
# (title, key, lowest y at the least, highest at the least)
_SMALL = (
    ("Learning rate", "learning_rate", 0.0, None),
    ("Tokens a second", "tokens_per_second", 0.0, None),
    ("Memory, GB", "memory_gb", 0.0, None),
    ("Norm of the gradient", "grad_norm", 0.0, None),
)
_OF_THE_ROUTER = (
    ("Experts without load", "dead_experts", 0.0, 1.0),
    ("Balance loss", "balance_loss", None, None),
)


def loss_chart(metrics: Sequence[Record], marks: Marks = ()) -> Markup:
    """Validation loss of each domain and training loss; of many domains each in a frame of its own."""
    domains, training = loss_curves(metrics), curve(metrics, "loss")
    grey = Line(label="training", points=training, colour=None)
    if marks:  # of a stream: each stage has its own skills, named by its mark
        evaluations = Line(label="validation", points=curve(metrics, "eval_loss"))
        axes = Axes(title="Loss by step", y="nats a token", marks=marks)
        return all_sizes(lambda size: line_chart([grey, evaluations], axes, size))
    lines = [Line(label=name, points=points, colour=place) for place, (name, points) in enumerate(domains.items())]
    if len(lines) > COLOURS:
        frames = [
            Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(
                line.label,
                line_chart(
                    [Line(label=line.label, points=line.points)],
                    Axes(title=f"Validation loss of {line.label} by step"),
                ),
            )
            for line in lines
        ]
        mean = line_chart(
            [grey, Line(label="validation", points=curve(metrics, "eval_loss"))], Axes(title="Loss by step")
        )
        first = Markup("<figure><figcaption>all domains</figcaption>{}</figure>").format(mean)
        return Markup('<div class="charts">{}</div>').format(Markup("").join([first, *frames]))
    axes = Axes(title="Loss by step", y="nats a token")
    return all_sizes(lambda size: line_chart([grey, *lines], axes, size))


def small_charts(metrics: Sequence[Record], marks: Marks = ()) -> list[tuple[str, Markup]]:
    """Learning rate, speed, memory and the like, each in a small frame."""
    quiet = [("", at) for _, at in marks]
    return _frames(metrics, _SMALL, quiet)


def _frames(
    metrics: Sequence[Record], wanted: Sequence[tuple[str, str, float | None, float | None]], marks: Marks = ()
) -> list[tuple[str, Markup]]:
    found = []
    for title, key, low, high in wanted:
        axes = Axes(title=f"{title} by step", low=low, high=high, marks=marks)
        if drawn := line_chart([Line(label=title, points=curve(metrics, key))], axes):
            found.append((title, drawn))
    return found


def load_chart(routing: Sequence[Record]) -> Markup:
    """The load of each expert over training, for wide pages and for narrow ones."""
    names, rows = loads(routing)
    if len(names) < 2:
        return Markup("")
    axes = Axes(title="Share of the load of each expert by step")
    return all_sizes(lambda size: stacked_chart(names, rows, axes, (size[0], 240)))


def entropy_chart(metrics: Sequence[Record]) -> tuple[Markup, list[tuple[str, Markup]]]:
    """Entropies of the router, and its other figures; those that were never other than zero are no picture."""
    lines = [
        Line(label="load", points=curve(metrics, "load_entropy"), colour=0),
        Line(label="decisions", points=curve(metrics, "router_entropy"), colour=1),
    ]
    drawn = line_chart(lines, Axes(title="Entropies of the router by step", low=0.0, high=1.0), SMALL)
    more = [
        (title, key, low, high)
        for title, key, low, high in _OF_THE_ROUTER
        if any(number(line.get(key)) for line in metrics)
    ]
    return drawn, _frames(metrics, more) if drawn else []


def changes_chart(changes: Sequence[Record]) -> list[tuple[str, Markup]]:
    """How much of the load moved from one evaluation of training to the next."""
    points = [(float(each["step"]), float(each["change"])) for each in changes]
    axes = Axes(title="Routing changed by step", low=0.0, high=1.0)
    drawn = line_chart([Line(label="changed", points=points)], axes) if len(points) > 1 else Markup("")
    return [("Load that moved since the evaluation before", drawn)] if drawn else []


def range_of_losses(found: Sequence[DomainFigures]) -> Markup:
    """Losses before and after with intervals, for wide pages and for narrow ones."""
    rows = []
    for row in found:
        ends = row.after.get("loss_interval") if row.after else None
        before, after = (None if each is None else number(each["loss"]) for each in (row.before, row.after))
        rows.append((row.domain, before, after, (float(ends[0]), float(ends[1])) if ends else None))
    axes = Axes(title="Loss before and after by domain", x="nats a token")
    return all_sizes(lambda size: range_chart(rows, axes, size))
