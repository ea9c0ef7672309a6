"""A way to share precisions of one's own, as a user would write it: one file."""

import torch

from kfac_laplace.posterior.sharing import Sharing


class ByKind(Sharing):
    """One precision for all matrices and one for all vectors, biases among them."""

    constant_on_blocks = True

    def index(self, layouts):
        """0 for vectors, 1 for matrices; one number alone where there is one kind alone."""
        matrices = {name: len(layout.shapes[0]) > 1 for name, layout in layouts.groups.items()}
        kinds = sorted(set(matrices.values()))
        return {name: torch.tensor(kinds.index(kind)) for name, kind in matrices.items()}
