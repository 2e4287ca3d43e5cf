"""``memlistener mirror``: a running guest's RAM is copied to a file while its map changes.

This is how a guest moves to another host (pre-copy): its memory is copied while it
runs, then what it has written since, and so on; at last it is stopped, and what is
left is copied. Here transactions split, merge, resize and move its memslots all
the while, and in the end every byte of the file is compared with the RAM: a page
whose write got lost between two bitmaps differs (rule B12).

========  ====================================================================
guest     what the guest executes: it writes to all of its memory
layout    how its memory is mapped, and the changes: move, split, merge, ...
scripted  the same guest as a script, for machines without KVM
precopy   rounds of copying what is dirty, and the comparison
scenario  the machine and all that goes on in it: start reading here
report    what came of it, as a record, a table and JSON
progress  how it shows that it is getting on
command   the command line
========  ====================================================================
"""
