"""Errors of the caller's model that mean the machine, whatever the model did."""

import torch

#: What torch and its allocators say, in errors that may have no class of their own.
OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "allocate memory",
    "alloc_failed",
    "bad_alloc",
    "bad allocation",
)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that memory ran out.

    Running the model again would only take longer to say the same, and might bring the machine
    down.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if isinstance(link, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(link, RuntimeError) and any(w in str(link).lower() for w in OUT_OF_MEMORY):
            return True
        seen.add(id(link))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return False
