"""Width: how long a power average is, as sigma_rel or as its exponent, and what each step then weighs."""

from __future__ import annotations

import math

from sharded_phema.errors import check_number

__all__ = ["MAX_SIGMA_REL", "gamma_of", "sigma_rel_of", "step_weight"]

MAX_SIGMA_REL = 12**-0.5
"""Relative width of the running mean (gamma 0), which no power profile with gamma > 0 reaches."""


def sigma_rel_of(gamma: float) -> float:
    """Relative width, standard deviation over ``t``, of the power profile ``gamma``.

    Args:
        gamma: Exponent, >= 0.

    Raises:
        TargetError: ``gamma`` is negative or not finite.

    Source: Karras et al., arXiv:2312.02696, section 3.1.
    """
    check_number(gamma, "gamma", "at least 0", lambda x: x >= 0, "gamma=6.94 is sigma_rel 0.10")
    return math.sqrt((gamma + 1.0) / (gamma + 3.0)) / (gamma + 2.0)


def gamma_of(sigma_rel: float) -> float:
    """Exponent of the power profile whose relative width is ``sigma_rel``; inverts ``sigma_rel_of`` to rounding.

    Args:
        sigma_rel: Relative width, above 0 and below ``MAX_SIGMA_REL``.

    Raises:
        TargetError: The width is outside that range.

    Source: Karras et al., arXiv:2312.02696, section 3.1; solved in closed form here.
    """
    mend = "try a width from 0.03 to 0.25"
    check_number(sigma_rel, "sigma_rel", "above 0 and below 0.2886", lambda x: 0.0 < x < MAX_SIGMA_REL, mend)
    # With x = gamma + 2 and v = sigma_rel**-2 the definition reads x^3 + x^2 - v x + v = 0. All three roots are real
    # and the largest is wanted: with x = y - 1/3 the cubic is depressed, and Viete's cosine formula gives it.
    v = sigma_rel**-2.0
    p, q = v + 1.0 / 3.0, 4.0 * v / 3.0 + 2.0 / 27.0
    # Near the largest width rounding can push the cosine below -1.
    cosine = max(-1.0, -1.5 * q / p * math.sqrt(3.0 / p))
    gamma = 2.0 * math.sqrt(p / 3.0) * math.cos(math.acos(cosine) / 3.0) - 7.0 / 3.0
    return max(gamma, 0.0)


def step_weight(gamma: float, t: float, dt: float) -> float:
    """Weight that the current weights get when a power average moves from ``t - dt`` to ``t``.

    This is ``1 - beta`` with ``beta = (1 - dt / t) ** (gamma + 1)``, in float64. It is formed directly: late in a run
    it is of the order of 1e-5, and taking a rounded ``beta`` from 1 would leave it a few digits short. The weights of
    all steps telescope, so any sequence of times realises the continuous profile exactly.

    Args:
        gamma: Exponent, >= 0.
        t: Training time after the step, > 0.
        dt: Training time since the *last update of the average*, 0 < dt <= t; at dt = t the weight is exactly 1.

    Raises:
        TargetError: An argument is outside its range.

    Source: Karras et al., arXiv:2312.02696, equation (2) and appendix C.
    """
    check_number(gamma, "gamma", "at least 0", lambda x: x >= 0, "gamma=6.94 is sigma_rel 0.10")
    check_number(t, "t", "above 0", lambda x: x > 0, "t is the training time after the step")
    check_number(
        dt, "dt", f"above 0 and at most t={t!r}", lambda x: 0 < x <= t, "dt is the time since the average's last update"
    )
    return 1.0 if dt == t else -math.expm1((gamma + 1.0) * math.log1p(-dt / t))
