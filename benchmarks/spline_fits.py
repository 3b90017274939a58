"""Least-squares cubic B-splines: many series of one length to a few control points, against SciPy.

100,000 random walks of 1,000 points, to 8 control points over one clamped uniform knot vector:

- ours: `infold.tokenizers.fit_bspline` of float64 (checks for numbers that are not finite included), and of float32;
- loop: `scipy.interpolate.make_lsq_spline` for one series after the other. 1,000 of them are timed, and the time is
  scaled to all;
- at once: the same function with all series as columns.

SciPy runs at its best of method "qr" and "norm-eq", of series by rows or by columns in memory (for the call at once),
with ``check_finite=False``; the row says which. It solves on one thread. Before anything is timed, control points must
be SciPy's to 1e-8 of the largest (float32: 1e-5); what was found is in the notes.

Run: python benchmarks/spline_fits.py [--threads N] [--quick] [--json FILE]
"""

from __future__ import annotations

from functools import partial
from typing import Any

import infold
import numpy as np
import scipy
import torch
from harness import Results, interleaved_medians, parse_arguments
from infold.tokenizers import fit_bspline
from scipy.interpolate import make_lsq_spline

LOOPED = 1_000
CONTROL_POINTS = 8


def main() -> None:
    arguments = parse_arguments(__doc__)
    series, points = (10_000, 1_000) if arguments.quick else (100_000, 1_000)
    values = torch.randn(series, points, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum_(1)
    single = values.float()
    t = np.arange(points, dtype=float)
    rows = values.numpy()
    columns = np.ascontiguousarray(rows.T)
    knots = fit_bspline(values[:1], CONTROL_POINTS).knots.numpy()

    def at_once(y: np.ndarray, method: str) -> Any:
        return make_lsq_spline(t, y, knots, 3, check_finite=False, method=method).c

    def loop(method: str) -> None:
        for row in rows[:LOOPED]:
            make_lsq_spline(t, row, knots, 3, check_finite=False, method=method)

    expected = at_once(columns, "qr").T
    scale = np.abs(expected).max()
    found = {
        "float64": np.abs(fit_bspline(values, CONTROL_POINTS).control.numpy() - expected).max() / scale,
        "float32": np.abs(fit_bspline(single, CONTROL_POINTS).control.numpy() - expected).max() / scale,
        "norm-eq": np.abs(at_once(columns, "norm-eq").T - expected).max() / scale,
    }
    assert found["float64"] <= 1e-8, found
    assert found["float32"] <= 1e-5, found

    loops = {f"loop, {method}": partial(loop, method) for method in ("qr", "norm-eq")}
    layouts = {"by rows": rows.T, "by columns": columns}
    calls = {
        f"at once, {method}, {layout}": partial(at_once, y, method)
        for method in ("qr", "norm-eq")
        for layout, y in layouts.items()
    }
    ours = {
        "float64": partial(fit_bspline, values, CONTROL_POINTS),
        "float32": partial(fit_bspline, single, CONTROL_POINTS),
    }
    medians = interleaved_medians({**ours, **loops, **calls}, arguments.seconds)
    results = Results(arguments)
    fastest_loop, fastest_call = (min(group, key=lambda name: medians[name]) for group in (loops, calls))
    for dtype in ours:
        case = f"{series:,} x {points:,} to {CONTROL_POINTS}, {dtype}"
        differs = f"differs from qr by {found[dtype]:.1e}"
        scaled = medians[fastest_loop] * series / LOOPED
        note = f"{fastest_loop}; {LOOPED:,} series timed, scaled; {differs}"
        results.add(case, "SciPy, loop", medians[dtype], scaled, 20.0, note=note)
        results.add(
            case, "SciPy, at once", medians[dtype], medians[fastest_call], 2.0, note=f"{fastest_call}; {differs}"
        )
    for name in (*loops, *calls):
        print(f"  {name:<32} {medians[name]:>10.1f} ms" + (f" for {LOOPED:,} series" if name in loops else ""))
    results.write(
        scipy=scipy.__version__, numpy=np.__version__, differences=found, medians_ms=medians, build=infold.build_info()
    )


if __name__ == "__main__":
    main()
