"""Every number of the image experiments, fixed before test images were seen.

Chosen on MNIST's training images from number 50,000 on and on digits under seeds below 10.
"""

from dataclasses import dataclass

#: Passes over the training images, by their number.
EPOCHS = {100: 200, 300: 120, 1000: 100, 5000: 40}
LEARNING_RATE = {"cnn": 3e-3, "batch-norm": 3e-3, "vit": 1e-3, "mlp": 3e-3}
#: Seed number k of digits is 10 + k: those before it were looked at.
FIRST_SEED = {"digits": 10, "mnist": 0}
#: Digits that are left to test on must be more than those trained on.
MOST = {"digits": 1000, "mnist": 50_000}

PLAIN = 1e-4
GRID = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2)
#: Share of the training images that the grid, and temperature scaling, hold out.
HELD_OUT = 0.2
MEMBERS = 5
#: Epochs between rounds of the tuner; all else is its default.
FREQUENCY = 5
#: Exact evidence takes 9 rows an example at ten classes: up to this number of them.
EXACT_UP_TO = 100


@dataclass(frozen=True)
class Counts:
    """How many images are predicted.

    Args:
        mode: most test images, by the network alone.
        posterior: test images, and images of each other kind, by the posterior and by the mode
            beside it.
    """

    mode: int = 10_000
    posterior: int = 500
