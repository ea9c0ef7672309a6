"""The demo: networks on real data that tune their own hyperparameters while they train.

Read it in this order: `settings` (every number), `data`, `models`, `training` (the loops to copy),
`problem`, `answers`, `methods` and `regression` (what is compared), `metrics`, `experiment` (the
loop over seeds), `report` and `pictures` (what is written). Needs the extra:
``pip install "kfac-laplace[demo]"``.
"""
