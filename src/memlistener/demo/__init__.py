"""``memlistener demo``: a guest runs while its memory map changes under it.

========  ====================================================================
guest     what the guest executes and checks, and how it is laid out in memory
windows   the kinds of change: split, move, device, rom, code
scripted  the same guest as a script, for machines without KVM
scenario  the machine and the transactions: start reading here
report    what came of it, as a record, a table and JSON
progress  how it shows that it is getting on
command   the command line
========  ====================================================================
"""
