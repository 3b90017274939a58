"""The roadmap's success criteria, each with what was measured and whether that meets it."""

from __future__ import annotations

from collections.abc import Iterator

from estimates import verdict
from queries import difference, of
from results import Results

Line = tuple[str, str, str, str]
#: How far a share of variance may be from the roadmap's "about", in points.
ABOUT = 5.0
ABSENT = "not measured"
#: In LeNet-5, the layers that are convolutions.
CONVOLUTIONS = {"0", "3"}
#: What latency is judged on: its limits name no batch.
BATCHES = (128, 1)


def criteria(results: Results) -> Iterator[Line]:
    """Phase, criterion, measured value, verdict; in the order of the roadmap."""
    yield from _baseline(results)
    yield from _tokenizer(results)
    yield from _trajectories(results)
    yield from _integration(results)
    yield from _summary(results)


def _overhead(results: Results, what: str, batch: int, mode: str) -> float:
    """In per cent."""
    (row,) = results.rows("latency", what=what, batch=batch)
    return 100 * (float(row[mode]) / float(row["plain"]) - 1)


def _placement(results: Results) -> tuple[float, float]:
    """What the first tier holds less than the model, in per cent, its ring counted; overhead of a training step."""
    (row,) = results.rows("latency", what="first tier")
    return 100 * (1 - row["held"] / row["bytes"]), _overhead(results, "training step", 128, "emulated")


def _baseline(results: Results) -> Iterator[Line]:
    units = results.rows("latency", what="tier")
    yield "2.1", "tiering completes without errors", f"{len(units)} layers placed, run and trained", "met"
    ranked = sorted(units, key=lambda row: -row["score"])
    first = {row["unit"] for row in ranked[: len(CONVOLUTIONS)]}
    order = ", ".join(row["unit"] for row in ranked)
    yield (
        "2.1",
        "convolutions rank first, fully connected layers last (by Adam's state)",
        order,
        verdict(first == CONVOLUTIONS),
    )
    # The first tier is the one of the layer that ranks first.
    hot = [row["unit"] for row in ranked if row["tier"] == ranked[0]["tier"]]
    tiers = ", ".join(f"{row['unit']} ({row['tier']})" for row in ranked)
    yield "2.1", "only convolutions in the hot tier (by Adam's state)", tiers, verdict(set(hot) == CONVOLUTIONS)
    for what, batch in (("training step", 128), *(("forward", batch) for batch in BATCHES)):
        overhead = _overhead(results, what, batch, "emulated")
        yield "2.1", f"emulated overhead < 10% on CPU, {what} of {batch}", f"{overhead:.1f}%", verdict(overhead < 10)
    base = of(results, "accuracy", "accuracy", 100, variant="lenet5")
    yield "2.1", "baseline about 99.2% (99.0% or more)", f"{base}%", base.within(99.0)
    minutes = of(results, "accuracy", "seconds", 1 / 60, variant="lenet5")
    yield "2.1", "training takes 50 minutes or less", f"{minutes} minutes", verdict(minutes.mean < 50)


def _against_baseline(results: Results, variant: str) -> tuple[str, str]:
    rows = results.rows("accuracy", variant=variant)
    gap = difference(rows, results.rows("accuracy", variant="lenet5"))
    return f"{variant}: {gap} points", gap.within(-1)


def _tokenizer(results: Results) -> Iterator[Line]:
    yield "2.2", "12 times fewer input dimensions", f"{784 / 64:.2f}", "met"
    for variant in ("tokens-64", "rebuilt-64"):
        yield "2.2", "accuracy at most 1 point below the baseline", *_against_baseline(results, variant)
    shares = [100 * row["share"] for row in results.rows("variance")]
    groups = [sum(shares[low:high]) for low, high in ((0, 16), (16, 48), (48, 64))]
    of_kept = [100 * group / sum(groups) for group in groups]
    for name, found in (("all variance", groups), ("the 64's variance", of_kept)):
        near = all(abs(share - goal) <= ABOUT for share, goal in zip(found, (80, 15, 5), strict=True))
        measured = " / ".join(f"{share:.1f}" for share in found)
        yield "2.2", f"16 / 32 / 16 components have about 80 / 15 / 5% of {name} (± {ABOUT:g})", measured, verdict(near)
    tenth = sum(shares[:78])
    yield "", "the top 10% of components explain 90% of the variance", f"78 of 784: {tenth:.1f}%", verdict(tenth >= 90)
    yield "2.2", "top components visually interpretable", "components.png", "a matter of judgement"
    wanted = {"order": "variance", "below": "nothing"}
    whole, some = (results.rows("curve", kept=kept, **wanted) for kept in (64, 26))
    quality = [100 * a["accuracy"] / b["accuracy"] for a, b in zip(some, whole, strict=True)]
    memory = [(row[0]["bytes"] + row[0]["tokenizer_bytes"]) for row in (whole, some)]
    worst, ratio = min(quality), memory[0] / memory[1]
    measured = f"26 of 64, others dropped: {worst:.2f}% (worst seed) at {ratio:.2f} times less, tokenizer counted"
    yield (
        "",
        "40% of components: 99% of quality at 2.5 times less memory",
        measured,
        verdict(worst >= 99 and ratio >= 2.5),
    )


def _trajectories(results: Results) -> Iterator[Line]:
    rows = results.rows("trajectories")
    yield "2.3", "spline fitting succeeds", f"{len(rows)} sets of series", "met"
    yield "2.3", "trajectories compressed with < 5% error (8 control points)", *_spline_error(results, 5)
    moved = of(results, "agreement", "elsewhere 30/50/20", 100, a="variance", b="trajectory")
    rank = of(results, "agreement", "spearman", a="variance", b="trajectory")
    measured = f"Spearman {rank}; {moved}% of components in other tiers at 30/50/20 (at random: 62%)"
    yield "2.3", "temporal tiers differ from spatial ones (10% of components or more)", measured, moved.within(10)
    for scheme in ("mild", "harsh"):
        combined = results.rows("components", scheme=scheme, order="combined")
        for order in ("variance", "trajectory"):
            gap = difference(combined, results.rows("components", scheme=scheme, order=order))
            name = f"combined tiers are better than {order}'s alone ({scheme})"
            yield "2.3", name, f"{gap} points, mean of three cuts", gap.within(1e-9)


def _spline_error(results: Results, limit: float) -> tuple[str, str]:
    rows = results.rows("trajectories", control_points=8)
    wanted = {"control_points": 8}
    series = dict.fromkeys((row["variant"], row["series"]) for row in rows)
    means = {
        f"{variant} {name}": of(results, "trajectories", "mean", 100, variant=variant, series=name, **wanted)
        for variant, name in series
    }
    worst = max(means, key=lambda name: means[name].mean)
    moved = max(of(results, "trajectories", "centred", 100, variant=v, series=s, **wanted).mean for v, s in series)
    measured = f"components: {means['tokens-64 components']}%; worst set, {worst}: {means[worst]}%; of what moves: "
    return f"{measured}up to {moved:.1f}%", means[worst].within(0, limit)


def _integration(results: Results) -> Iterator[Line]:
    gaps = [
        difference(
            results.rows("components", scheme=scheme, order="combined"),
            results.rows("components", scheme=scheme, order=order),
        )
        for scheme in ("mild", "harsh")
        for order in ("random", "adam")
    ]
    measured = "combined − random: {0} (mild), {2} (harsh); − Adam alone: {1}, {3} points".format(*gaps)
    yield "3.1", "the combined score pays (harsh, against random)", measured, gaps[2].within(1e-9)
    for cut in ("30/50/20", "15/60/25", "10/60/30"):
        parts = []
        for scheme in ("mild", "harsh"):
            saved, gap = _precision(results, scheme, cut)
            parts.append(f"{scheme}: {saved:.0f}% saved, {gap} points")
        yield "3.2", f"accuracy against memory at {cut}, combined", "; ".join(parts), "measured"
    yield "3.3", "dynamic tiering", "see benchmarks/tier_dynamic.py", ABSENT


def _precision(results: Results, scheme: str, cut: str) -> tuple[float, object]:
    """Per cent of the classifier's bytes that combined tiers of components save, and the points that they cost."""
    whole = results.rows("components", order="whole")
    rows = results.rows("components", scheme=scheme, cut=cut, order="combined")
    nbytes = of(results, "components", "bytes", scheme=scheme, cut=cut, order="combined").mean
    return 100 * (1 - nbytes / whole[0]["bytes"]), difference(rows, whole)


def _summary(results: Results) -> Iterator[Line]:
    yield "minimum", "PCA tokenizer at most 1 point below the baseline", *_against_baseline(results, "tokens-64")
    yield "minimum", "trajectories compressed with < 10% error (8 control points)", *_spline_error(results, 10)
    goals = (("minimum", 30, 10), ("strong", 50, 20), ("transformative", 70, 10))
    for phase, memory, latency in goals:
        name = f"tiering: {memory}% less memory, < {latency}% latency"
        saved, overhead = _placement(results)
        held = f"placement: first tier {round(saved, 1) + 0.0:.1f}% smaller, ring counted"
        measured = f"{held}; training step of 128 {overhead:+.1f}%, emulated"
        yield phase, name, measured, verdict(saved >= memory and overhead < latency)
        scheme = "harsh" if phase == "transformative" else "mild"
        rows = results.rows("layers", scheme=scheme, cut="30/50/20", order="adam")
        whole = results.rows("layers", order="whole")
        saved = 100 * (1 - sum(row["bytes"] for row in rows) / sum(row["bytes"] for row in whole))
        smaller = f"precision of layers, {scheme}: {saved:.0f}% smaller at {difference(rows, whole)} points"
        for batch in BATCHES:
            overhead = _overhead(results, "forward", batch, scheme)
            measured = f"{smaller}; forward of {batch} {overhead:+.1f}%"
            yield phase, f"{name}, batch {batch}", measured, verdict(saved >= memory and overhead < latency)
        if phase == "strong":
            rows = results.rows("accuracy", variant="spline-64")
            gap = difference(rows, results.rows("accuracy", variant="lenet5"))
            own = difference(rows, results.rows("accuracy", variant="tokens-64"))
            measured = f"{gap} points; against PCA alone {own}"
            yield phase, "PCA and splines beat the baseline by 0.1 points", measured, gap.within(0.1)
            yield phase, "ResNet-50 matches ImageNet within 0.5 points", "no ImageNet here", ABSENT
    yield "transformative", "ResNet-50 beats its baseline by 0.5 points", "no ImageNet here", ABSENT
    yield (
        "transformative",
        "models 2 to 3 times larger on one machine",
        "examples/larger_than_memory.py",
        ABSENT,
    )
