"""Optimisers: steps and time to a target, ours beside first-order and second-order methods.

The protocol, fixed before the final seeds:

1. *Search.* Each method draws as many settings from its stated ranges, by one Latin hypercube, and
   trains with each once: seed 0, the full horizon. The best is the one with the best validation
   score at the end.
2. *Schedule.* With it, seed 0 at the compressed horizons (warm-up and decay are parts of the
   horizon). A method's horizon is the one that takes the fewest steps to the best score that a
   first-order method reached on seed 0; the full one where none does.
3. *Finals.* Seeds 1 to 5 at all horizons, measured on test examples. The target is the lowest final
   score, over seeds, of the first-order method with the best mean at its full horizon, so that each
   of its seeds reaches it.
4. *Cost.* Steps of each method between steps of AdamW on the same batches.

Time is that of the training steps alone; evaluations are left out.
"""
