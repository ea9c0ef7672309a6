"""The tasks, by name."""

from benchmarks.experiments.fixup import WideResNet
from benchmarks.experiments.optimizers import graphs, text, vision
from benchmarks.experiments.optimizers.task import Size, Task

JPEG = "CIFAR-10 from JPEG copies, which are lossy"
#: Sizes are steps, batch, every, train, held_out, width, depth, side. One run of AdamW at the size
#: "cpu" takes 4 to 11 seconds of one core, evaluations as long again; all phases of a method at the
#: default budget are 26 such runs.
TASKS: dict[str, Task] = {
    "graphs": Task(
        "generated molecule-like graphs, four classes by the medians of a random network; message "
        "passing by MLPs with layer norms, sums over edges, mean over nodes",
        {
            "cpu": Size(400, 100, 20, 4000, 2500, 32, 3, 20),
            "gpu": Size(4000, 256, 100, 40_000, 5000, 128, 5, 30),
        },
        graphs.data,
        graphs.network,
    ),
    "mnist-vit": Task(
        "MNIST, ViT with the mean over tokens",
        {
            "cpu": Size(400, 100, 20, 5000, 2500, 32, 2, 16),
            "gpu": Size(2000, 256, 50, 50_000, 5000, 96, 4, 28),
        },
        vision.mnist,
        vision.mnist_transformer,
    ),
    "cifar-vit": Task(
        f"{JPEG}, ViT with the mean over tokens",
        {
            "cpu": Size(400, 100, 20, 8000, 2000, 48, 3, 16),
            "gpu": Size(6000, 256, 150, 40_000, 5000, 192, 6, 32),
        },
        vision.cifar,
        vision.cifar_transformer,
    ),
    "convolutions": Task(
        f"{JPEG}, 3 × 3 convolutions without norms, mean over places",
        {
            "cpu": Size(240, 100, 12, 8000, 2000, 32, 4, 16),
            "gpu": Size(2000, 256, 50, 40_000, 5000, 64, 6, 32),
        },
        vision.cifar,
        vision.convolutions,
    ),
    "wrn": Task(
        f"{JPEG}, WRN-16-k without norms (Fixup), k the width",
        {
            "cpu": Size(300, 50, 15, 5000, 2000, 1, 2, 16),
            "gpu": Size(4000, 128, 100, 40_000, 5000, 4, 2, 32),
        },
        vision.cifar,
        lambda size: WideResNet(size.width),
    ),
    "resnet": Task(
        f"{JPEG}, ResNet-18's form with batch norm",
        {
            "cpu": Size(300, 50, 15, 5000, 2000, 8, 2, 16),
            "gpu": Size(4000, 128, 100, 40_000, 5000, 64, 2, 32),
        },
        vision.cifar,
        vision.resnet,
    ),
    "gpt": Task(
        "characters of Python's language reference (pydoc_data.topics), small GPT",
        {
            "cpu": Size(400, 32, 20, 5000, 400, 64, 2, 64),
            "gpu": Size(3000, 64, 100, 50_000, 150, 256, 6, 256),
        },
        text.data,
        text.network,
        measure="nll",
    ),
}
