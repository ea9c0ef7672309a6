"""Every number of the demo in one place."""

from dataclasses import dataclass, field, replace

MODELS = ("cnn", "vit")


@dataclass(frozen=True)
class Recipe:
    """How one network is trained, with or without tuning.

    Attributes:
        epochs: passes over the training set.
        batch_size: examples in a mini-batch.
        learning_rate: start of Adam's cosine schedule, which ends at zero.
        weight_decay: the default λ of plain training, whose loss is the mean over examples plus
            λ/2 ‖θ‖²; it amounts to the prior precision δ = λ N.
        frequency: epochs between evidence steps of online tuning, the one option that is set.
        temperature: T of loss and evidence in online tuning; below 1 the data weigh more.
    """

    epochs: int = 150
    batch_size: int = 50
    learning_rate: float = 3e-3
    weight_decay: float = 5e-4
    frequency: int = 5
    temperature: float = 1.0


def default_images() -> dict[str, Recipe]:
    """The recipes of the classification half: one for all networks."""
    return {name: Recipe() for name in MODELS}


@dataclass(frozen=True)
class Settings:
    """One run of the demo.

    Attributes:
        seeds: how many seeds; each draws the data split, the initial weights and the batch order.
        seed: the first of them.
        device: where to train, as torch names it.
        models: networks of the classification half, from `MODELS`.
        n_train: training images; few, so that overfitting is real.
        n_test: most test images; by default all that are left.
        n_ood: patches of photographs that serve as out-of-distribution inputs.
        grid: weight decays that the grid tries.
        fixed_precision: δ of the row with a sensible fixed precision.
        holdout: share of the training examples on which weight decays, temperatures, scales and
            noise are chosen, where they are chosen on held-out data.
        images: recipes of the classification half by network.
        n_patients: training patients of the regression half.
        patients: recipe of the regression half.
    """

    seeds: int = 1
    seed: int = 0
    device: str = "cpu"
    models: tuple[str, ...] = MODELS
    n_train: int = 200
    n_test: int = 1597
    n_ood: int = 1000
    grid: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    fixed_precision: float = 1.0
    holdout: float = 0.2
    images: dict[str, Recipe] = field(default_factory=default_images)
    n_patients: int = 300
    patients: Recipe = field(default_factory=lambda: Recipe(learning_rate=1e-2))


def quick() -> Settings:
    """Less of everything, to see the whole in a few minutes; its numbers prove little."""
    full = Settings()
    return replace(
        full,
        n_train=150,
        n_test=300,
        n_ood=200,
        grid=full.grid[2::3],
        images={name: replace(recipe, epochs=80) for name, recipe in full.images.items()},
        patients=replace(full.patients, epochs=80),
    )


PRESETS = {"default": Settings(), "quick": quick()}
