"""report.md: every number in it is read from the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from criteria import criteria
from infold.report import format_bytes
from queries import by_seed, difference, names, of
from results import Results

HEAD = """# LeNet-5 on MNIST, staged

Made by `examples/lenet5/run.py`; the tables are beside it as CSV. Accuracies are of the test images, in per cent, mean
± 95% interval by Student's t over seeds, {seeds} here; differences are in points, paired by seed. Settings: {settings}.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """As Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def write(results: Results) -> None:
    """The whole report."""
    seeds = len(by_seed(results.rows("accuracy", variant="lenet5"), "accuracy"))
    settings = ", ".join(f"{name}: {value}" for name, value in results.settings.items())
    sections = {
        "Success criteria of the roadmap": table(("phase", "criterion", "measured", "verdict"), criteria(results))
        + "\nA verdict is *met* or *not met* where the whole 95% interval says so, else *undecided*.\n",
        "Accuracy": _accuracy(results),
        "Variance hierarchy": _variance(results),
        "Splines before the PCA": _splines(results),
        "Trajectories in control points": _trajectories(results),
        "Do the signals agree?": _agreement(results),
        "Tiers of components": _components(results),
        "Accuracy against memory": _curve(results),
        "Tiers of layers": _layers(results),
        "Latency": _latency(results),
    }
    body = "".join(f"\n## {title}\n\n{text}" for title, text in sections.items())
    (results.folder / "report.md").write_text(HEAD.format(seeds=seeds, settings=settings) + body)


def _accuracy(results: Results) -> str:
    base, rows = results.rows("accuracy", variant="lenet5"), []
    for name in names(results.rows("accuracy"), "variant"):
        own = results.rows("accuracy", variant=name)
        gap = "" if name == "lenet5" else str(difference(own, base))
        sizes = [f"{own[0]['parameters']:,}", format_bytes(own[0]["tokenizer_bytes"])]
        seconds = f"{of(results, 'accuracy', 'seconds', variant=name).mean:.0f}"
        rows.append([name, *sizes, of(results, "accuracy", "accuracy", 100, variant=name), gap, seconds])
    return (
        "`tokens-k`: the first k components into a network of one hidden layer with about LeNet-5's parameters. "
        "`rebuilt-k`: LeNet-5 on images of which only these components are left. `pixels`: the former network on all "
        "pixels. `spline-k`: monotone splines before the PCA, as `SplinePCATokenizer.fit` keeps them.\n\n"
        + table(("variant", "parameters", "tokenizer", "accuracy", "− LeNet-5", "s a training"), rows)
        + "\n![Accuracy](accuracy.png)\n"
    )


def _variance(results: Results) -> str:
    shares = [100 * row["share"] for row in results.rows("variance")]
    kept, rows = sum(shares[:64]), []
    for name, low, high, goal in (("first 16", 0, 16, 80), ("next 32", 16, 48, 15), ("last 16", 48, 64, 5)):
        share = sum(shares[low:high])
        rows.append([name, f"{goal}", f"{share:.1f}", f"{100 * share / kept:.1f}"])
    rows.append(["all 64", 100, f"{kept:.1f}", "100.0"])
    head = ("components of 64", "roadmap, %", "of all variance, %", "of the 64's, %")
    return table(head, rows) + "\n![Variance](variance.png)\n\n![Components](components.png)\n"


def _splines(results: Results) -> str:
    every = results.rows("splines")
    chosen = next(row for row in every if row["spline"] == "chosen")
    tried = [[f"{row['strength']:g}", f"{row['error']:.5f}"] for row in every if row["spline"] == "fit"]
    rebuilt = [[row["spline"], f"{row['error']:.5f}"] for row in every if row["spline"] not in ("fit", "chosen")]
    return (
        "Mean squared error of rebuilt images, 64 components. `SplinePCATokenizer.fit` tries strengths on a tenth of "
        f"the training part, held out, and keeps {chosen['strength']:g}, which changes {chosen['moved']} of 784 "
        "pixels:\n\n"
        + table(("strength", "error"), tried)
        + "\nOn the validation part, of PCA alone (`none`) and with the splines that were kept; a spline keeps images "
        "to the range of pixels, and so does clipping:\n\n" + table(("splines", "error"), rebuilt)
    )


def _trajectories(results: Results) -> str:
    every, rows = results.rows("trajectories"), []
    counts = names(every, "control_points")
    for variant, series in dict.fromkeys((row["variant"], row["series"]) for row in every):
        wanted = {"variant": variant, "series": series}
        own = results.rows("trajectories", seed=0, **wanted)
        cells: list[object] = [variant, series, own[0]["count"]]
        for count in counts:
            found = [
                of(results, "trajectories", name, 100, control_points=count, **wanted).mean
                for name in ("mean", "median", "p90", "centred")
            ]
            cells.append(" / ".join(f"{value:.2f}" for value in found))
        rows.append(cells)
    ratios = {row["control_points"]: row["ratio"] for row in every}
    head = ("network", "series", "count", *(f"{count} points, {ratios[count]:.0f} times smaller" for count in counts))
    return (
        "Relative errors in per cent, mean / median / 90th percentile over series: ‖series − spline‖ / ‖series‖; and "
        "the mean of what is missed of the *movement*, ‖series − spline‖ / ‖series − its mean‖. `components` are norms "
        "of the first layer's columns, other series single weights of the layer so named. Means over seeds.\n\n"
        + table(head, rows)
        + "\n![Trajectories](trajectories.png)\n\n![Series](series.png)\n"
    )


def _agreement(results: Results) -> str:
    every, rows = results.rows("agreement"), []
    moved = [name for name in every[0] if name.startswith("elsewhere")]
    for a, b in dict.fromkeys((row["a"], row["b"]) for row in every):
        found = [of(results, "agreement", name, 100, a=a, b=b) for name in moved]
        rows.append([f"{a} / {b}", of(results, "agreement", "spearman", a=a, b=b), *found])
    head = ("signals", "Spearman", *(f"in other tiers at {name.split()[1]}, %" for name in moved))
    return table(head, rows)


def _tiers(results: Results, stage: str) -> str:
    """For each scheme, an order's accuracy less that of the whole network at each cut."""
    every, text = results.rows(stage), ""
    whole, cuts = results.rows(stage, order="whole"), names(every, "cut")
    all_bytes = whole[0]["bytes"]
    for scheme in names(every, "scheme"):
        rows = []
        for order in names(results.rows(stage, scheme=scheme), "order"):
            cells: list[object] = [order]
            for cut in cuts:
                own = results.rows(stage, scheme=scheme, order=order, cut=cut)
                nbytes = of(results, stage, "bytes", scheme=scheme, order=order, cut=cut).mean
                cells += [difference(own, whole), f"{100 * (1 - nbytes / all_bytes):.1f}"]
            rows.append(cells)
        head = [f"{cut}{what}" for cut in cuts for what in (", points", ", % saved")]
        text += f"\n**{scheme}**\n\n" + table(("order", *head), rows)
    return text


def _components(results: Results) -> str:
    weights = "; ".join(
        f"{row['scheme']} {row['cut']} seed {row['seed']}: {row['alpha']:g}, {row['beta']:g}, {row['gamma']:g}"
        for row in results.rows("components", order="combined")
    )
    ours = [
        f"{scheme}: combined − {order} = {_over_cuts(results, scheme, 'combined', order)} points"
        for scheme in names(results.rows("components"), "scheme")
        for order in ("variance", "trajectory", "adam", "contribution", "random", "ablation")
    ]
    return (
        "The columns of `tokens-64`'s first layer in three tiers: *mild* holds them as float32, int8 and int4, *harsh* "
        "as int8, int4 and not at all. Points are lost (−) against the whole network; saved is of its memory. "
        "All columns have one size, so ranking by size alone is ranking at random: that row is both controls. "
        "`contribution` is the trajectory's variance times the token's; `ablation` ranks by the validation loss "
        "without each component, which no training gives for nothing.\n"
        + _tiers(results, "components")
        + "\nMean over the three cuts:\n\n- "
        + "\n- ".join(ours)
        + f"\n\nTuned α, β, γ (variance, trajectory, Adam): {weights}.\n"
    )


def _over_cuts(results: Results, scheme: str, a: str, b: str) -> object:
    return difference(
        results.rows("components", scheme=scheme, order=a), results.rows("components", scheme=scheme, order=b)
    )


def _curve(results: Results) -> str:
    every, text = results.rows("curve"), ""
    orders = names(every, "order")
    for below, title in (("nothing", "dropped"), ("int4", "stored in 4 bits")):
        rows = []
        for kept in names(every, "kept"):
            wanted = {"below": below, "kept": kept}
            size = [
                of(results, "curve", name, order="variance", **wanted).mean for name in ("bytes", "tokenizer_bytes")
            ]
            found = [of(results, "curve", "accuracy", 100, order=order, **wanted) for order in orders]
            rows.append([kept, format_bytes(round(size[0])), format_bytes(round(sum(size))), *found])
        text += f"Components after the first ones of each order are {title}:\n\n"
        text += table(("kept", "classifier", "with tokenizer", *orders), rows) + "\n"
    return text + "`combined` has equal weights here.\n\n![Accuracy against memory](curve.png)\n"


def _layers(results: Results) -> str:
    plans = "; ".join(
        f"{row['order']}: {row['tiers']}"
        for row in results.rows("layers", seed=0, scheme="mild", cut="30/50/20")
        if row["order"] != "random"
    )
    return (
        "LeNet-5's five layers, packed by `infold.convert`: *mild* float32, int8, int4; *harsh* int8, int4, ECSQ 2. "
        "A layer is in the tier in whose share of the bytes its middle lies, and one of them has 78% of all bytes, so "
        "plans differ in size: compare points and savings together. Variance explained is not defined for a layer.\n"
        + _tiers(results, "layers")
        + f"\nSeed 0, mild, 30/50/20: {plans}.\n"
    )


def _latency(results: Results) -> str:
    rows = [
        [
            row["what"],
            row["batch"],
            *(f"{row[name]:.3f}" if name in row else "" for name in ("plain", "emulated", "mild", "harsh")),
        ]
        for row in results.rows("latency")
        if "plain" in row
    ]
    return (
        "Median milliseconds, in turn. *emulated*: 30/50/20 by Adam's state in RAM, behind PCIe 4 and on an NVMe "
        "drive, which are waited for (`tier_hints.json` is that plan); *mild*, *harsh*: packed layers.\n\n"
        + table(("", "batch", "plain", "emulated", "mild", "harsh"), rows)
    )
