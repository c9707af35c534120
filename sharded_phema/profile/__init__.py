"""Profile: a cumulative distribution over training time, which says what a weight average is.

The average that a profile ``F`` denotes is the integral of the weights against ``dF``: ``F(tau)`` is the share of
the average that comes from weights no later than ``tau``. A jump of ``F`` is weight on one moment. Time is a real
number in the unit of the run (steps, samples or tokens), never an update counter.
"""

from sharded_phema.profile.contract import Profile, Tracked
from sharded_phema.profile.fixed import Checkpoint, Decay, Shape
from sharded_phema.profile.mixture import Mixture
from sharded_phema.profile.running import Exponential, Power, Ramped, Uniform
from sharded_phema.profile.tabulated import Tabulated, tabulate
from sharded_phema.profile.unaware import Unaware

__all__ = [
    "Checkpoint",
    "Decay",
    "Exponential",
    "Mixture",
    "Power",
    "Profile",
    "Ramped",
    "Shape",
    "Tabulated",
    "Tracked",
    "Unaware",
    "Uniform",
    "tabulate",
]
