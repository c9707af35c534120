"""Writes fit_256.json: coefficients for 256 sources in 100 digits, rounded to float64 at the end. Takes a minute.

Sources: power profiles of widths 0.05 and 0.10 at times 1/128 to 1. The integrals of (1 - F_a)(1 - F_b) are in closed
form (docs/maths.md); the bordered system of the minimum with coefficients that sum to 1 is solved by LU. Widths are
turned into exponents by the definition, solved by Newton's method. Nothing of the package is used.
"""

import json
from pathlib import Path

from mpmath import lu_solve, matrix, mp, mpf, sqrt

mp.dps = 100
TIMES = [mpf(i) / 128 for i in range(1, 129)]
WIDTHS, TARGETS = ("0.05", "0.10"), ("0.07", "0.20", "0.25")


def gamma_of(width):
    return mp.findroot(lambda g: sqrt((g + 1) / (g + 3)) / (g + 2) - mpf(width), 1 / mpf(width) - 2)


def overlap(a, b):
    """Integral of (1 - F_a)(1 - F_b) for (exponent of F, time)."""
    (p, s), (q, t) = sorted((a, b), key=lambda x: x[1])
    ratio = (s / t) ** q
    return s * (1 - 1 / (p + 1) - ratio / (q + 1) + ratio / (p + q + 1))


def main():
    exponents = {width: gamma_of(width) + 1 for width in (*WIDTHS, *TARGETS)}
    sources = [(exponents[width], t) for t in TIMES for width in WIDTHS]
    n = len(sources)
    system = matrix(n + 1, n + 1)
    for i, a in enumerate(sources):
        system[i, n] = system[n, i] = 1
        for j, b in enumerate(sources[: i + 1]):
            system[i, j] = system[j, i] = overlap(a, b)
    cases = []
    for width in TARGETS:
        target = (exponents[width], mpf(1))
        right = matrix([overlap(a, target) for a in sources] + [1])
        c = lu_solve(system, right)
        gram = sum(c[i] * c[j] * system[i, j] for i in range(n) for j in range(n))
        squared = gram - 2 * sum(c[i] * right[i] for i in range(n)) + overlap(target, target)
        raw = 1 / (2 * target[0] + 1)  # integral of F^2
        cases.append(
            {
                "target_sigma_rel": width,
                "coefficients": [float(c[i]) for i in range(n)],
                "error": float(sqrt(squared)),
                "forecast": float(sqrt(squared / raw)),
            }
        )
        print(width, float(sqrt(squared)), max(abs(float(x)) for x in c))
    note = __doc__.strip()
    data = {"note": note, "times": 128, "sigma_rels": WIDTHS, "cases": cases}
    Path(__file__).with_name("fit_256.json").write_text(json.dumps(data, indent=0) + "\n")


main()
