"""Rules: from gradients and eigenbases of the factors to updates. One file a rule.

A rule is a frozen value; what changes from step to step lies in one plain dictionary for each group
of parameters. A step has two phases, as some lengths depend on all groups:

    before = table.eigenbases(names, gradients)
    if table.update(step, factors):
        rule.turn(states, before, table.eigenbases(names, gradients))
    directions = rule.directions(gradients, states, table.eigenbases(names, gradients))
    updates = rule.lengths(directions, lrs)
    parts = update.parts(split)  # from matrices to parameters, of each
    descend_(parameters, parts, lr=lr, weight_decay=weight_decay)
"""

from kfac_laplace.optim.rules.adamw import AdamW
from kfac_laplace.optim.rules.damped import Damped
from kfac_laplace.optim.rules.damping import ExactDamping, FactoredDamping
from kfac_laplace.optim.rules.descent import descend_
from kfac_laplace.optim.rules.eigen_adam import EigenAdam
from kfac_laplace.optim.rules.length import AdamNorm, KLClip
from kfac_laplace.optim.rules.rule import Direction, Rule, State, Update

__all__ = [
    "AdamNorm",
    "AdamW",
    "Damped",
    "Direction",
    "EigenAdam",
    "ExactDamping",
    "FactoredDamping",
    "KLClip",
    "Rule",
    "State",
    "Update",
    "descend_",
]
