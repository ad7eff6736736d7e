"""Measuring the ops: named workloads, timing beside peers, one record for every result, and what is made of records.

To measure: `workloads` names what is measured, `inputs` makes its tensors and checks results, `layers` are what is no single op, `peers/`
the kernels of others, `timing` and `ceilings` hold the clock, `measure` does one job, `plan` lists jobs, `runner` runs them where they may
crash.
To keep: `record` and `machine`. To look at: `compare`, `formats`, `readme`, `site/`. Without running: `static` and `ncu`. `tune` writes the
Triton kernels' tables.

What measures needs torch alone, so that it runs on a host without network; what reads results needs the extra `bench`.
"""
