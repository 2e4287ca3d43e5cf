"""What memlistener costs, measured. Run ``python -m benchmarks``.

==============  ================================================================
engine          commits, rendering, look-ups and memory: no KVM
alternatives    simpler ways of doing the same, measured beside ours
kvm             brackets, kicks, exits and policies, on a real /dev/kvm beside C
measure         `Figure`, and how samples are taken
report          the table
plot            docs/figures/commit_cost.svg
==============  ================================================================

A group is a module with ``BENCHMARKS``: functions by name that take `Settings`
and return figures. What is compared is measured in the same run and in turns,
so that a busy machine slows both.
"""
