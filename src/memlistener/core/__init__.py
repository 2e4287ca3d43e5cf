"""The pure core: no trio, no cffi, no threads, no files and no clock.

Everything here is synchronous and deterministic: a tree of regions goes in,
views and events come out. The shell around it (`memlistener.memory`) decides
when, and tells the listeners.
"""
