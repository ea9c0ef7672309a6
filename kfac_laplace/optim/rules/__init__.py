"""Rules: from gradients and eigenbases of the factors to updates. One file a rule.

A rule is a frozen value; what changes from step to step lies in one plain dictionary for each group
of parameters. A step has two phases, as some lengths depend on all groups:

    directions = rule.directions(gradients, states, bases)
    updates = rule.lengths(directions, lrs)
    descend_(parameters, updates, lr=lr, weight_decay=weight_decay)
"""

from kfac_laplace.optim.rules.adamw import AdamW
from kfac_laplace.optim.rules.damped import Damped
from kfac_laplace.optim.rules.damping import ExactDamping, FactoredDamping
from kfac_laplace.optim.rules.eigen_adam import EigenAdam
from kfac_laplace.optim.rules.length import AdamNorm, KLClip
from kfac_laplace.optim.rules.rule import Rule, State, Update, descend_

__all__ = [
    "AdamNorm",
    "AdamW",
    "Damped",
    "EigenAdam",
    "ExactDamping",
    "FactoredDamping",
    "KLClip",
    "Rule",
    "State",
    "Update",
    "descend_",
]
