"""Builds ``memlistener.kvm._kvm``; run by setup.py, never imported by the library."""

import sysconfig
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent

ffibuilder = FFI()
ffibuilder.cdef((HERE / "_cdef.h").read_text())
# The C preprocessor sorts the architectures out in _source.c, but cdef has none.
if sysconfig.get_platform().endswith("x86_64"):
    ffibuilder.cdef((HERE / "_cdef_x86.h").read_text())
ffibuilder.set_source(
    "memlistener.kvm._kvm",
    (HERE / "_source.c").read_text(),
    # setup.py has tried the compiler; should it fail all the same, go on without KVM.
    optional=True,
)
